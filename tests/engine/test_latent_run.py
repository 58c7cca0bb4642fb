"""From latents to images: encode, train, sample, decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.latents import LatentSettings, encode_latents
from diffmoe_dist.config import build_config
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch
from diffmoe_dist.library.export import Parts, export_pipeline
from diffmoe_dist.sampling.generate import open_decoder
from diffmoe_dist.sampling.job import sample_to_folder
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.data.folders import png, random_images, write_folder
from tests.data.test_latents import save_autoencoder
from tests.distributed import run_ranks
from tests.engine.runs import TINY, curve, metrics, train_one

STEPS = 20
SAMPLING = {"num": 5, "steps": 3, "cfg_scale": 1.0, "seed": 0, "sampler": "euler", "batch_size": 2}


def train_and_sample(rank: int, world_size: int, folder: Path, runs: list[tuple[str, int]]) -> None:
    for name, steps in runs:
        train_one(rank, world_size, build_config(TINY, settings(folder, name), {"train": {"steps": steps}}))
    newest = SamplingSettings(str(folder / runs[0][0]), decoder=str(folder / "vae"), **SAMPLING)  # type: ignore[arg-type]
    launch = Launch(rank, world_size, rank, "environment")
    sample_to_folder(newest, folder / f"samples-{world_size}", torch.device("cpu"), launch)


def settings(folder: Path, name: str) -> dict[str, Any]:
    return {
        "run_dir": str(folder / name),
        "data": {"shards": str(folder / "shards"), "latents": str(folder / "latents"), "flip": True},
        "model": {"input_size": 8, "in_channels": 4, "num_classes": 2},
        "moe": {"inference": "threshold"},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latent-run")
    samples = [{"png": png(image), "cls": str(i % 2).encode()} for i, image in enumerate(random_images(30, 16))]
    samples[7] = {**samples[7], "png": b"not an image"}
    base = write_folder(out / "shards", samples, [11, 19])
    encode_latents(base, out / "latents", LatentSettings(save_autoencoder(out / "vae"), 16))
    run_ranks(2, train_and_sample, out, [("two", STEPS), ("resumed", STEPS // 2)])
    run_ranks(1, train_and_sample, out, [("one", STEPS), ("resumed", STEPS)])
    return out


def test_one_seed_gives_one_loss_curve_from_latents_on_any_ranks_and_across_a_resume(folder: Path) -> None:
    one = curve(folder / "one")
    assert len(one) == STEPS and one[-1] < one[0]
    for name in ("two", "resumed"):
        assert curve(folder / name) == pytest.approx(one, abs=1e-6, rel=0)


def test_bad_samples_are_counted_once_whatever_the_number_of_ranks(folder: Path) -> None:
    counts = [[line["bad_samples"] for line in metrics(folder / name)] for name in ("one", "two", "resumed")]
    assert counts[0] == counts[1] == counts[2]
    assert sum(counts[0]) in (10, 11)  # 320 samples are ten epochs of 30 and a part


def test_samples_are_decoded_into_images(folder: Path) -> None:
    images = np.load(folder / "samples-1" / "samples.npz")["arr_0"]
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 0
    assert json.loads((folder / "samples-1" / "sampling.json").read_text())["decoder"] == str(folder / "vae")


def test_a_decoder_of_another_scale_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_autoencoder(tmp_path / "other", scaling_factor=0.5)
    config = build_config(TINY, settings(folder, "one"))
    with pytest.raises(UserError, match="takes latents of another scale or shift than data.latents="):
        open_decoder(config, str(other), "sample.decoder", torch.device("cpu"))
    with pytest.raises(UserError, match="--decoder=.*other: takes latents of another scale or shift"):
        export_pipeline(folder / "one", tmp_path / "pipeline", None, Parts(decoder=str(other)))
    assert open_decoder(config, str(folder / "vae"), "sample.decoder", torch.device("cpu")) is not None
