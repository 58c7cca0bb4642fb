"""Runs from the latents of an AutoencoderDC and the captions of two text encoders, and their sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.latents import LatentSettings, encode_latents
from data_tools.text import TextSettings, encode_text
from diffmoe_dist.config import Config, build_config
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.open import open_data, with_text_encoder
from diffmoe_dist.errors import UserError
from diffmoe_dist.sampling.prompts import open_prompts
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.data.encoders import save_encoder
from tests.data.test_autoencoders import save_deep_compression
from tests.distributed import run_ranks
from tests.engine.captions import save_captioned, text_settings
from tests.engine.runs import TINY, curve, metrics, train_one

pytestmark = pytest.mark.slow

MODEL = {"input_size": 2, "in_channels": 8, "patch_size": 1, "text_max_length": 20, "text_pooled_size": 16}


def config_of(folder: Path, run: str, steps: int = 20, **places: Any) -> Config:
    data = {"latents": str(folder / "latents"), "text": str(folder / "both"), "flip": True, **places}
    settings = text_settings(folder, run)
    return build_config(TINY, settings, {"model": MODEL, "data": data, "train": {"steps": steps}})


def train(rank: int, world_size: int, folder: Path, runs: list[tuple[str, int]]) -> None:
    for name, steps in runs:
        train_one(rank, world_size, config_of(folder, name, steps))


def write_encoders(folder: Path, layer: int) -> Path:
    entries = [{"folder": "encoder", "layer": layer, "max_length": 8}, {"folder": "t5", "max_length": 12}]
    path = folder / f"encoders{layer}.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = save_captioned(tmp_path_factory.mktemp("encoders"))
    base = ShardIndex.open(out / "shards")
    encode_latents(base, out / "latents", LatentSettings(save_deep_compression(out / "vae"), 8))
    save_encoder(out / "t5", "t5")
    encode_text(base, out / "both", TextSettings(write_encoders(out, -2)))
    run_ranks(2, train, out, [("two", 20), ("resumed", 10)])
    run_ranks(1, train, out, [("one", 20), ("resumed", 20)])
    return out


def test_one_seed_gives_one_loss_curve_on_any_ranks_and_after_a_resume_on_others(folder: Path) -> None:
    one = curve(folder / "one")
    assert len(one) == 20 and one[-1] < one[0]
    assert curve(folder / "two") == pytest.approx(one, abs=1e-6, rel=0)
    assert [line["step"] for line in metrics(folder / "resumed")] == list(range(1, 21))
    assert curve(folder / "resumed") == pytest.approx(one, abs=1e-6, rel=0)


def test_encoding_while_training_gives_what_the_side_folders_do(folder: Path) -> None:
    from tests.engine.test_online import first_batch

    encoders: dict[str, Any] = {"autoencoder": str(folder / "vae"), "text_encoder": str(write_encoders(folder, -2))}
    online = config_of(folder, "unused", latents=None, text=None, **encoders)
    ours, theirs = first_batch(online), first_batch(config_of(folder, "unused"))
    torch.testing.assert_close(ours.images, theirs.images, rtol=2e-3, atol=2e-3)
    assert ours.text is not None and theirs.text is not None
    torch.testing.assert_close(ours.text.tokens, theirs.text.tokens, rtol=2e-3, atol=2e-3)
    assert torch.equal(ours.text.mask, theirs.text.mask) and torch.equal(ours.text.null, theirs.text.null)


def test_a_model_is_sampled_with_the_encoders_of_its_shards_and_no_other_layer(folder: Path) -> None:
    config = config_of(folder, "one")
    config = with_text_encoder(config, open_data(config))
    settings = SamplingSettings(str(folder / "one"), prompt="a circle", num=1, encoder=str(write_encoders(folder, -2)))
    assert open_prompts(settings, config, torch.device("cpu")).kind == "clip+t5"
    other = SamplingSettings(str(folder / "one"), prompt="a circle", num=1, encoder=str(write_encoders(folder, -1)))
    with pytest.raises(UserError, match="is not the encoder that the model was trained with"):
        open_prompts(other, config, torch.device("cpu"))
