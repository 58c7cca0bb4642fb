"""The data settings: what opens, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from diffmoe_dist.config import Config, build_config, load_config, save_config
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.open import open_data, open_held_out
from diffmoe_dist.data.stream import StreamedData
from diffmoe_dist.errors import UserError
from diffmoe_dist.sampling.generate import open_decoder
from tests.data.folders import png, random_images, write_folder
from tests.data.test_latents import save_autoencoder
from tests.engine.runs import TINY

MODEL = {"model": {"input_size": 8, "in_channels": 3, "num_classes": 2}}


def _config(data: dict[str, Any], **layers: Any) -> Config:
    return build_config(TINY, MODEL, {"run_dir": "runs/x", "data": data}, layers)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two folders of colour images: all of 8 pixels, and of many sizes."""
    folder = tmp_path_factory.mktemp("data")
    samples = [{"png": png(image), "cls": b"0"} for size in (8, 12) for image in random_images(3, size)]
    write_folder(folder / "same", samples[:3], [3], image_size=8)
    write_folder(folder / "sizes", samples, [6])
    return str(folder / "same"), str(folder / "sizes")


def test_a_mixture_opens_with_its_weights(shards: tuple[str, str]) -> None:
    entries = [{"shards": shards[0]}, {"shards": shards[1], "weight": 2.5}]
    data = open_data(_config({"mixture": entries}))
    assert isinstance(data, TrainingData)
    assert data.weights == (1.0, 2.5) and data.first_ids == (0, 3)


def test_a_mixture_survives_being_saved_and_given_on_the_command_line(shards: tuple[str, str], tmp_path: Path) -> None:
    config = _config({"mixture": [{"shards": shards[0]}, {"shards": shards[1], "weight": 2.5}]})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    again = load_config(tmp_path / "config.yaml", [f"data.mixture=[{{shards: {shards[1]}, weight: 3}}]"])
    assert [(entry.shards, entry.weight) for entry in again.data.mixture] == [(shards[1], 3.0)]


def test_a_stream_opens_without_looking_at_its_shards() -> None:
    data = open_data(_config({"shards": "https://example.org/a-{000..009}.tar", "stream": True}))
    assert isinstance(data, StreamedData) and len(data.urls) == 10


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({}, "data.shards is not set"),
        ({"shards": "a", "mixture": [{"shards": "b"}]}, "data.mixture names its own shards"),
        ({"mixture": [{"shards": "b"}, {"weight": 2}]}, r"data.mixture\[1\].shards is not set"),
        ({"mixture": [{"shards": "b", "weight": 0}]}, r"data.mixture\[0\].weight=0.0 must be above 0"),
        ({"mixture": [{"shards": "b", "wait": 1}]}, "wait"),
        ({"shards": "a", "text": "b"}, "data.text=b has no effect with model.condition=class"),
        ({"shards": "a", "latents": "b", "stream": True}, "data.stream=true reads one stream of images"),
        ({"shards": "a", "allow_pipe": True}, "data.allow_pipe=true has no effect without data.stream=true"),
    ],
)
def test_contradicting_data_settings_are_refused(data: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        _config(data)


def test_images_of_many_sizes_fit_every_model_and_images_of_one_size_only_theirs(shards: tuple[str, str]) -> None:
    other = {"model": {"input_size": 16}}
    assert isinstance(open_data(_config({"shards": shards[1]}, **other)), TrainingData)
    with pytest.raises(UserError, match="model.input_size=16, but data.shards=.*same has 8; set it to 8"):
        open_data(_config({"shards": shards[0]}, **other))


def test_a_folder_that_does_not_open_is_named_by_its_own_setting(shards: tuple[str, str]) -> None:
    validation = {"every": 1, "images": 4, "shards": "nowhere"}
    for data, layers, named in (
        ({"shards": "nowhere"}, {}, "data.shards=nowhere: no such folder"),
        ({"shards": shards[0], "latents": "nowhere"}, {}, "data.latents=nowhere: no such folder"),
        ({"shards": shards[0], "latents": shards[1]}, {}, f"data.latents={shards[1]}: not a side folder"),
        ({"mixture": [{"shards": shards[0]}, {"shards": "nowhere"}]}, {}, "data.mixture[1].shards=nowhere: no such"),
        ({"shards": shards[0]}, {"validation": validation}, "validation.shards=nowhere: no such folder"),
    ):
        config = _config(data, **layers)
        with pytest.raises(UserError, match=f"^{re.escape(named)}"):
            open_held_out(config, open_data(config))


@pytest.mark.parametrize(
    ("setting", "command"),
    [("shards", "pack SOURCE"), ("latents", "encode-latents BASE"), ("text", "encode-text BASE")],
)
def test_a_folder_that_is_missing_is_told_the_command_that_makes_one_of_its_kind(
    shards: tuple[str, str], tmp_path: Path, setting: str, command: str
) -> None:
    (tmp_path / "begun").mkdir()
    for folder, problem in (("nowhere", "no such folder"), ("begun", "index.json is missing")):
        folders: dict[str, Any] = {"shards": shards[0], setting: tmp_path / folder}
        with pytest.raises(UserError, match=f"{setting}=.*{problem}; .*: python -m data_tools {command} OUT"):
            DataSet.open(**folders, section="data.mixture[0]")


def test_the_same_data_twice_in_a_mixture_or_in_validation_are_refused_by_whatever_path(
    shards: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(shards[0])
    link, validation = str(tmp_path / "link"), {"every": 1, "images": 4, "shards": str(tmp_path / "link")}
    mixture = [{"shards": shards[0]}, {"shards": shards[1]}]
    twice = _config({"mixture": [*mixture, {"shards": link}]})
    with pytest.raises(UserError, match=rf"{link} holds the data of data\.mixture\[0\]\.shards=.*; name them once"):
        open_data(twice)
    stream = {"shards": f"{shards[0]}/test-000000.tar", "stream": True}
    for data in ({"shards": shards[0]}, {"mixture": mixture}, stream):
        config = _config(data, validation=validation)
        with pytest.raises(UserError, match="validation.shards=.*link holds the images that are trained on"):
            open_held_out(config, open_data(config))


def test_a_decoder_is_for_latents_and_latents_need_one(shards: tuple[str, str], tmp_path: Path) -> None:
    pixels, latents = _config({"shards": shards[0]}), _config({"shards": shards[0]}, model={"in_channels": 4})
    with pytest.raises(UserError, match="--decoder=vae: this model makes pixels"):
        open_decoder(pixels, "vae", "--decoder", "cpu")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model.in_channels=4: this model makes latents; give --decoder"):
        open_decoder(latents, None, "--decoder", "cpu")  # type: ignore[arg-type]
    folder = save_autoencoder(tmp_path / "vae")
    sixteen = _config({"shards": shards[0]}, model={"in_channels": 16})
    with pytest.raises(UserError, match="--decoder=.*vae: has 4 latent channels, the model 16"):
        open_decoder(sixteen, str(folder), "--decoder", "cpu")  # type: ignore[arg-type]
    assert open_decoder(latents, str(folder), "--decoder", "cpu") is not None  # type: ignore[arg-type]
