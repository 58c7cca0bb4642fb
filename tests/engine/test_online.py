"""Encoding images and captions as they are read, in the place of side folders."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.latents import LatentSettings, encode_latents
from diffmoe_dist.config import Config, build_config, for_world
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import Autoencoder
from diffmoe_dist.data.loader import TrainingLoader
from diffmoe_dist.data.open import open_data, with_text_encoder
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.data.text import captions_of
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.engine.resume import find_start
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.condition import TextCondition
from diffmoe_dist.sampling.conditions import run_conditions
from diffmoe_dist.sampling.generate import open_decoder
from diffmoe_dist.sampling.job import sample_to_folder
from diffmoe_dist.sampling.settings import SamplingSettings
from diffmoe_dist.train import open_periodic_jobs
from tests.data.encoders import save_encoder
from tests.data.folders import png, random_images, write_folder
from tests.data.test_latents import save_autoencoder
from tests.distributed import run_ranks
from tests.engine.captions import save_captioned, text_settings
from tests.engine.runs import TINY, curve, train_one

MODEL = {"input_size": 4, "in_channels": 4}


def online(folder: Path, **changes: Any) -> dict[str, Any]:
    places = {"text": None, "text_encoder": str(folder / "encoder"), "autoencoder": str(folder / "vae"), "flip": True}
    return {"model": MODEL, "data": {**places, **changes}}


def side(folder: Path) -> dict[str, Any]:
    return {"model": MODEL, "data": {"latents": str(folder / "latents"), "flip": True}}


def config_of(folder: Path, settings: dict[str, Any], run: str = "unused") -> Config:
    return build_config(TINY, text_settings(folder, run), {"train": {"steps": 5}}, settings)


def train(rank: int, world_size: int, folder: Path) -> None:
    for name, settings in {f"online-{world_size}": online(folder), f"side-{world_size}": side(folder)}.items():
        train_one(rank, world_size, config_of(folder, settings, name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = save_captioned(tmp_path_factory.mktemp("online"))
    encode_latents(ShardIndex.open(out / "shards"), out / "latents", LatentSettings(save_autoencoder(out / "vae"), 8))
    run_ranks(1, train, out)
    run_ranks(2, train, out)
    return out


def first_batch(config: Config, workers: int = 0) -> Batch:
    data = open_data(config)
    assert isinstance(data, TrainingData)
    loader = TrainingLoader(data, BatchSplit(30, 30), seed=3, flip=True, num_workers=workers)
    batch = next(loader)
    loader.close()
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_the_one_that_side_folders_would_have_given(folder: Path, workers: int) -> None:
    stored, read = first_batch(config_of(folder, side(folder))), first_batch(config_of(folder, online(folder)), workers)
    for name in ("noise", "time_uniform", "drop_uniform", "sample_ids"):
        assert torch.equal(getattr(read, name), getattr(stored, name)), name
    assert read.images.shape == (30, 4, 4, 4)
    # Images that are encoded together round the last bit before fp16 differently.
    assert torch.allclose(read.images, stored.images, rtol=0, atol=2e-3 * float(stored.images.abs().max()))
    for text in ("text", "null_text"):
        for name in ("mask", "null"):
            assert torch.equal(getattr(getattr(read, text), name), getattr(getattr(stored, text), name)), (text, name)
        for name in ("tokens", "pooled"):
            ours, theirs = (getattr(getattr(batch, text), name).float() for batch in (read, stored))
            assert torch.allclose(ours, theirs, rtol=2e-3, atol=2e-3), (text, name)


def test_one_seed_gives_one_loss_curve_on_any_ranks_also_when_encoding_as_it_reads(folder: Path) -> None:
    one = curve(folder / "online-1")
    assert len(one) == 5 and curve(folder / "online-2") == pytest.approx(one, abs=1e-6, rel=0)
    assert one == pytest.approx(curve(folder / "side-1"), abs=1e-3)


def test_what_a_sample_gives_does_not_depend_on_its_micro_batch(folder: Path) -> None:
    data = open_data(config_of(folder, online(folder)))
    assert isinstance(data, TrainingData)
    parts = []
    for micro in (30, 5):
        loader = TrainingLoader(data, BatchSplit(30, micro), seed=3, flip=True)
        batches = [next(loader) for _ in range(30 // micro)]
        parts.append([torch.cat([batch.images for batch in batches])])
        parts[-1] += [torch.cat([batch.text.tokens for batch in batches])]  # type: ignore[union-attr]
    assert all(torch.equal(whole, split) for whole, split in zip(*parts, strict=True))


def test_samples_of_a_run_use_its_own_captions_and_autoencoder(folder: Path) -> None:
    configs = [config_of(folder, settings) for settings in (online(folder), side(folder))]
    conditions = [run_conditions(config, open_data(config)) for config in configs]
    assert [conditions[0].name(number) for number in range(4)] == [conditions[1].name(number) for number in range(4)]
    ours, theirs = (of_run.of([0, 1, 2]) for of_run in conditions)
    assert isinstance(ours, TextCondition) and isinstance(theirs, TextCondition)
    assert torch.allclose(ours.tokens.float(), theirs.tokens.float(), rtol=2e-3, atol=2e-3)
    decode = open_decoder(config_of(folder, online(folder)), None, "sample.decoder", torch.device("cpu"))
    assert decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 8, 8)


def count_openings(rank: int, ranks: int, folder: Path) -> dict[str, int]:
    """How often a sampling job opens each encoder that its captions, images and calibration need."""
    opened: Counter[str] = Counter()
    settings = SamplingSettings(
        str(folder / "online-1"), num=2, steps=1, batch_size=2, recalibrate=1, prompt="a square",
        encoder=str(folder / "encoder"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for kind in (TextEncoder, Autoencoder):

            def counted(*arguments: Any, name: str = kind.__name__, open_one: Any = kind.open) -> Any:
                opened[name] += 1
                return open_one(*arguments)

            patch.setattr(kind, "open", counted)
        sample_to_folder(settings, folder / "samples", torch.device("cpu"), Launch(rank, ranks, rank, "environment"))
    return dict(opened)


def test_a_sampling_job_that_recalibrates_opens_each_encoder_once(folder: Path) -> None:
    assert run_ranks(1, count_openings, folder) == [{"TextEncoder": 1, "Autoencoder": 1}]


def test_a_run_does_not_go_on_with_another_encoder(folder: Path, tmp_path: Path) -> None:
    def start(settings: dict[str, Any]) -> None:
        config = for_world(config_of(folder, settings, "online-1"), 1)
        data = open_data(config)
        find_start(with_text_encoder(config, data), data, 1)

    start(online(folder))
    other = save_autoencoder(tmp_path / "vae", scaling_factor=0.5)
    with pytest.raises(UserError, match=r"data\.shards holds other data"):
        start(online(folder, autoencoder=str(other)))
    encoder = save_encoder(tmp_path / "encoder", "clip")
    (encoder / "added.txt").write_text("a file more")  # of another download, say
    with pytest.raises(UserError, match=r"model\.text_encoder_sha256=.* of another model"):
        start(online(folder, text_encoder=str(encoder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "t"}, r"data\.text_encoder=.*encoder encodes what data\.text holds already; give one of them"),
        ({"latents": "l"}, r"data\.autoencoder=.*vae encodes what data\.latents holds already; give one of them"),
        ({"text_encoder": None, "tokenizer": "k"}, r"data\.tokenizer=k has no effect without data\.text_encoder"),
        ({"text_encoder": None}, r"data\.text is not set, but model\.condition=text; .* or give data\.text_encoder"),
        ({"text_encoder": "nowhere"}, r"data\.text_encoder=nowhere: no config\.json that can be read"),
        ({"autoencoder": "nowhere"}, r"data\.autoencoder=nowhere: no config\.json that can be read"),
    ],
)
def test_encoders_that_contradict_folders_or_are_not_there_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_data(config_of(folder, online(folder, **changes)))


def test_an_autoencoder_that_does_not_fit_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.in_channels=3, but data\.shards=.* has 4; set it to 4"):
        open_data(config_of(folder, {**online(folder), "model": {"input_size": 4, "in_channels": 3}}))


def test_shards_without_captions_are_refused_and_captions_that_are_no_text_left_out(
    folder: Path, tmp_path: Path
) -> None:
    images = [{"png": png(image)} for image in random_images(4, 8)]
    bare = write_folder(tmp_path / "bare", images, [4], class_names=[])
    with pytest.raises(UserError, match=r"data\.shards=.*bare: holds no captions \(png\); pack some with them"):
        open_data(config_of(folder, online(folder, shards=str(bare.folder))))
    empty = write_folder(tmp_path / "empty", [{"txt": b" ", "json": b"{}", **image} for image in images], [4])
    with pytest.raises(UserError, match=r"data\.shards=.*empty: none of \d samples has a caption; pack some with them"):
        open_data(config_of(folder, online(folder, shards=str(empty.folder))))
    half = json.dumps({"captions": ["a \ud800 circle", "a square"]}).encode()  # half of a character
    odd = write_folder(tmp_path / "odd", [{**image, "json": half} for image in images], [4], class_names=[])
    assert captions_of(odd, 0) == ["a square"]


def test_a_caption_that_is_cut_is_logged_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = open_data(config_of(folder, online(folder)))
    assert isinstance(data, TrainingData) and data.encoders is not None and data.encoders.text is not None
    data.encoders.text.max_length = 4
    with caplog.at_level(logging.WARNING, "diffmoe_dist.data"):
        for _ in range(2):
            data.encoders._warn_once_of_a_cut(["a red square on a red square"])
    assert caplog.text.count("captions are cut to model.text_max_length=4") == 1


def test_a_decoder_of_another_scale_than_the_encoding_autoencoder_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_autoencoder(tmp_path / "vae", scaling_factor=0.5)
    with pytest.raises(UserError, match=r"takes latents of another scale or shift than data\.autoencoder="):
        open_decoder(config_of(folder, online(folder)), str(other), "--decoder", torch.device("cpu"))


def test_a_run_that_encodes_samples_and_scores_opens_its_autoencoder_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_autoencoder = Autoencoder.open

    def count(folder: str, *arguments: Any) -> Autoencoder:
        opened.append(folder)
        return open_autoencoder(folder, *arguments)

    monkeypatch.setattr(Autoencoder, "open", count)
    colours, reference = "tests.evaluation.colours:colours", tmp_path / "colours.npz"
    np.savez(reference, mu=np.zeros(12), sigma=np.eye(12), extractor=np.array(colours))
    score = {"every": 1, "features": colours, "reference": str(reference)}
    config = config_of(folder, {**online(folder), "sample": {"every": 1}, "fid": score})

    jobs = open_periodic_jobs(config, open_data(config), torch.device("cpu"))

    assert [job.name for job in jobs] == ["scoring samples", "sampling"]
    assert opened == [str(folder / "vae")]
