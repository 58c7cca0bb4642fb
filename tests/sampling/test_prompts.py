"""Images from prompts: each a function of the weights, the seed, its prompt and which of the prompt's it is."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffmoe_dist
from data_tools.text import TextSettings, encode_text
from diffmoe_dist import encode_captions, load_model
from diffmoe_dist.config import build_config, load_config
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.open import open_data, with_text_encoder
from diffmoe_dist.data.prompts import Prompt, encode_prompts
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.diffusion.samplers import Guidance
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.condition import TextCondition
from diffmoe_dist.sampling.conditions import PromptConditions, open_conditions, run_conditions
from diffmoe_dist.sampling.generate import SamplerSettings, generate
from diffmoe_dist.sampling.job import sample_to_folder
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.commands import start
from tests.data.encoders import save_encoder
from tests.distributed import run_ranks
from tests.engine.captions import save_captioned, text_settings
from tests.engine.runs import TINY, train_one

CPU = torch.device("cpu")
TEXTS = ["a red square", "a blue circle", "", "a circle on a square"]


def train(rank: int, world_size: int, folder: Path) -> None:
    # The high rate brings cross-attention and adaLN away from zero.
    settings = {"train": {"steps": 40}, "optim": {"lr": 1e-2}}
    train_one(rank, world_size, build_config(TINY, text_settings(folder, "run"), settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = save_captioned(tmp_path_factory.mktemp("text-sampling"))
    run_ranks(1, train, out)
    (out / "prompts.txt").write_text("a red square\na blue circle\na circle on a square\n")
    return out


def conditions_of(folder: Path, texts: list[str], negative: str | None = None) -> PromptConditions:
    encoder = TextEncoder.open(folder / "encoder", None, 16, CPU, "--encoder")
    return PromptConditions(encode_prompts([Prompt(text) for text in texts], negative, encoder), 16)


def sample(folder: Path, texts: list[str], scale: float = 3.0, negative: str | None = None) -> dict[str, Tensor]:
    config = load_config(folder / "run/config.yaml")
    images = generate(
        load_model(folder / "run"), build_objective(config), list(range(len(texts))),
        conditions_of(folder, texts, negative), SamplerSettings("euler", steps=4, guidance=Guidance(scale)),
    ).images  # fmt: skip
    return dict(zip(texts, images, strict=True))


def test_an_image_depends_on_its_prompt_and_not_on_the_order_or_the_company_of_prompts(folder: Path) -> None:
    together = sample(folder, TEXTS)
    backwards = sample(folder, TEXTS[::-1])
    for text in TEXTS:
        # Batches of another size, and rows in another place, round the matrix products differently.
        assert torch.allclose(backwards[text], together[text], rtol=0, atol=1e-5), text
        assert torch.allclose(sample(folder, [text])[text], together[text], rtol=0, atol=1e-5), text


def test_the_prompt_matters(folder: Path) -> None:
    conditions = conditions_of(folder, TEXTS)
    model, config = load_model(folder / "run"), load_config(folder / "run/config.yaml")
    z, t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1), torch.rand(1)
    prediction = model(z, build_objective(config).model_time(t.expand(4)), conditions.of([0, 1, 2, 3]))
    differences = [(prediction.prediction[i] - prediction.prediction[0]).abs().max() for i in (1, 2, 3)]
    assert min(differences) > 1e-3


def test_an_empty_prompt_is_the_null_condition(folder: Path) -> None:
    conditions = conditions_of(folder, TEXTS)
    config = load_config(folder / "run/config.yaml")
    reader = run_conditions(config, open_data(config))
    empty, null, stored = conditions.of([2]), conditions.null(1), reader.null(1)
    for name in ("tokens", "mask", "pooled", "null"):
        assert torch.equal(getattr(empty, name), getattr(null, name)), name
        assert torch.equal(getattr(stored, name), getattr(null, name)), name
    assert null.null.all() and not conditions.of([0, 1, 3]).null.any()  # type: ignore[union-attr]
    # Guidance away from what is asked for changes nothing.
    weak, strong = (sample(folder, [""], scale)[""] for scale in (1.5, 7.0))
    assert torch.allclose(weak, strong, atol=1e-5)


def test_a_negative_prompt_takes_the_place_of_the_empty_caption_in_guidance(folder: Path) -> None:
    plain, away = (sample(folder, ["a red square"], negative=negative) for negative in (None, "a circle"))
    assert not torch.allclose(plain["a red square"], away["a red square"], atol=1e-3)
    # Away from the prompt itself there is nothing to go along.
    first, second = (sample(folder, ["a circle"], scale, negative="a circle")["a circle"] for scale in (1.5, 7.0))
    assert torch.allclose(first, second, atol=1e-5)


def settings_for(folder: Path, **changes: Any) -> SamplingSettings:
    plain = SamplingSettings(
        str(folder / "run"), num=None, steps=3, cfg_scale=2.0, seed=0, sampler=None, batch_size=2,
        prompts=str(folder / "prompts.txt"), encoder=str(folder / "encoder"),
    )  # fmt: skip
    return replace(plain, **changes)


def run_jobs(rank: int, ranks: int, jobs: list[tuple[SamplingSettings, Path]]) -> None:
    for settings, out in jobs:
        settings.check()
        sample_to_folder(settings, out, CPU, Launch(rank, ranks, rank, "environment"))


def test_a_job_samples_the_same_images_on_any_ranks_with_experts_sharded_or_not(folder: Path, tmp_path: Path) -> None:
    settings = settings_for(folder, num=6)
    run_ranks(1, run_jobs, [(settings, tmp_path / "one"), (replace(settings, batch_size=5), tmp_path / "blocks")])
    run_ranks(2, run_jobs, [(replace(settings, expert=2), tmp_path / "two")])

    one = np.load(tmp_path / "one/samples.npz")
    assert one["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]
    for other in ("two", "blocks"):
        images = np.load(tmp_path / other / "samples.npz")["arr_0"].astype(int)
        assert (abs(images - one["arr_0"]) <= 1).all()  # a grey value may round the other way
    assert (one["arr_0"][0] != one["arr_0"][3]).any(), "the second image of a prompt is another one"
    lines = [json.loads(line) for line in (tmp_path / "one/prompts.jsonl").read_text().splitlines()]
    texts = (folder / "prompts.txt").read_text().splitlines()
    assert lines == [{"prompt": text} for text in texts * 2]


def test_precomputed_prompts_give_the_same_images(folder: Path, tmp_path: Path) -> None:
    command = ("encode-prompts", folder / "prompts.txt", tmp_path / "prompts.npz")
    options = ("--encoder", folder / "encoder", "--max-length", "16")
    encoding = start("data_tools.__main__", *command, *options, folder=tmp_path)[0]
    assert encoding.wait() == 0, encoding.stderr
    precomputed = settings_for(folder, prompts=str(tmp_path / "prompts.npz"), encoder=None)
    run_ranks(1, run_jobs, [(settings_for(folder), tmp_path / "live"), (precomputed, tmp_path / "precomputed")])

    live, precomputed_images = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("live", "precomputed"))
    assert live.shape == (3, 8, 8, 3) and np.array_equal(live, precomputed_images)


def test_a_prompt_longer_than_the_encoders_captions_is_cut_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = "a red square on " * 10
    with caplog.at_level(logging.WARNING, "diffmoe_dist.data"):
        long = conditions_of(folder, [words]).of([0])
    assert "cut to 16" in caplog.text
    longer = conditions_of(folder, [words + "a blue circle"]).of([0])
    assert torch.equal(long.tokens, longer.tokens)  # type: ignore[union-attr]


def test_an_encoder_that_is_not_the_models_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_encoder(tmp_path / "t5", "t5")
    config = load_config(folder / "run/config.yaml")
    with pytest.raises(UserError, match=r"--encoder .*t5: is not the encoder that the model was trained with: SHA-256"):
        open_conditions(settings_for(folder, encoder=str(other)), config, CPU)
    base = ShardIndex.open(folder / "shards")
    encode_text(base, tmp_path / "text", TextSettings(other, max_length=16))
    with pytest.raises(UserError, match=r"model\.text_encoder_sha256=.*, but the checkpoint .* is of another model"):
        run_on_other_captions(folder, tmp_path / "text")


def run_on_other_captions(folder: Path, text: Path) -> None:
    from diffmoe_dist.config import for_world
    from diffmoe_dist.data.open import open_data
    from diffmoe_dist.engine.resume import find_start

    sizes = {"model": {"text_pooled_size": 0}, "data": {"text": str(text)}}
    config = build_config(TINY, text_settings(folder, "run"), sizes)
    config = for_world(config, 1)
    data = open_data(config)
    config = with_text_encoder(config, data)
    # As if the other encoder differed in its weights alone.
    config = replace(config, model=replace(config.model, text_pooled_size=16))
    find_start(config, data, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": None}, r"--num is missing"),
        ({"prompts": None, "num": 3}, r"--encoder has no effect without --prompts or --prompt; remove it"),
        ({"prompts": None, "num": 3, "encoder": None}, r"--prompts is missing: this model is conditioned on captions"),
        ({"prompt": "a cat"}, r"--prompts and --prompt: give one of them"),
        ({"encoder": None}, r"--encoder is missing: the folder of the text encoder"),
        ({"labels": "random"}, r"--labels random: this model is conditioned on captions"),
        ({"classes": (1, 2)}, r"--classes \(1, 2\): this model is conditioned on captions"),
        ({"cfg_scale": 1.0, "negative_prompt": "a cat"}, r"--negative-prompt has no effect without guidance"),
        ({"prompts": "some.npz"}, r"--encoder has no effect with --prompts some\.npz, whose prompts are encoded"),
        ({"prompt": "a cat", "prompts": None, "geneval": True}, r"--geneval needs --prompts"),
    ],
)
def test_options_of_prompts_that_would_be_ignored_or_do_not_fit_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    settings = settings_for(folder, **changes)
    with pytest.raises(UserError, match=message):
        settings.check()
        open_conditions(settings, load_config(folder / "run/config.yaml"), CPU)


def test_a_model_that_is_conditioned_on_classes_takes_no_prompts(folder: Path) -> None:
    config = build_config(TINY, training=False)
    with pytest.raises(UserError, match=r"--prompts .*: this model is conditioned on classes; give --num"):
        open_conditions(settings_for(folder), config, CPU)


def test_captions_that_are_encoded_in_python_are_those_of_the_sampler(folder: Path) -> None:
    ours, theirs = encode_captions(TEXTS, folder / "encoder", 16), conditions_of(folder, TEXTS).of([0, 1, 2, 3])
    assert isinstance(theirs, TextCondition)
    for name in ("tokens", "mask", "pooled", "null"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_prompts_sampled_from_python_are_those_of_the_command(folder: Path, tmp_path: Path) -> None:
    run_ranks(1, run_jobs, [(settings_for(folder, num=4, negative_prompt="a cat"), tmp_path / "out")])
    model = load_model(folder / "run")
    texts = (folder / "prompts.txt").read_text().splitlines()
    options: Any = {"steps": 3, "cfg_scale": 2.0, "batch_size": 2, "encoder": folder / "encoder"}

    made = diffmoe_dist.sample(model, texts, num=4, negative_prompt="a cat", **options)

    with np.load(tmp_path / "out/samples.npz") as file:
        assert np.array_equal(made.to_uint8(), file["arr_0"]) and made.labels == file["arr_1"].tolist()
    captions, negative = (encode_captions(given, folder / "encoder", 16) for given in (texts, ["a cat"]))
    encoded = diffmoe_dist.sample(model, prompts=captions, negative_prompt=negative, steps=3, cfg_scale=3.0)
    assert encoded.labels == [0, 1, 2] and encoded.images.isfinite().all()
    expected = model(encoded.images, 0.5, captions).prediction
    assert expected.shape == encoded.images.shape
    for prompts, changes, message in (
        (texts, {"encoder": None}, r"encoder is missing: the folder of the text encoder"),
        ([3], {}, r"prompts: 3 is no text"),
        (captions, {"encoder": None}, r"negative_prompt: to guide captions that are encoded, give an encoded one"),
        (None, {}, r"prompts is missing: this model is conditioned on captions"),
    ):
        with pytest.raises(UserError, match=message):
            diffmoe_dist.sample(model, prompts, **{**options, **changes})
    with pytest.raises(UserError, match="y is a int, but this model is conditioned on captions; give what encode_capt"):
        model(encoded.images, 0.5, 3)
