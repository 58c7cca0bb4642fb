"""Every configuration that is shipped, on data of its kind: what `--dry-run` says of it on eight ranks."""

from __future__ import annotations

import hashlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.folder import ShardFolder
from data_tools.shards import write_shard
from diffmoe_dist.config import Config, for_world, load_config
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.engine.dry_run import build_on_meta
from tests.data.folders import png, random_images, write_folder
from tests.machine import ROOT

RANKS = 8
RECIPES = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml"))
SAMPLES = 2


def write_data(config: Config, folder: Path) -> dict[str, Any]:
    """The settings of two images with everything that this configuration trains on."""
    model, has_latents = config.model, config.data.latents is not None
    images = random_images(SAMPLES, 8 if has_latents else model.input_size, 3 if has_latents else model.in_channels)
    samples = [{"png": png(image.squeeze()), "cls": str(n).encode(), "txt": b"a"} for n, image in enumerate(images)]
    classes = [str(number) for number in range(model.num_classes)]
    if not classes:
        for sample in samples:
            del sample["cls"]
    channels = 3 if has_latents else model.in_channels
    base = write_folder(folder / "shards", samples, [SAMPLES], class_names=classes, channels=channels)
    places = {"shards": str(folder / "shards")}
    if has_latents:
        places["latents"] = write_latents(base, model.in_channels, model.input_size, folder / "latents")
    if model.condition == "text":
        places["text"] = write_text(base, config, folder / "text")
    return places


def write_latents(base: ShardIndex, channels: int, size: int, out: Path) -> str:
    spec = {
        "parametrisation": "mean_logvar", "channels": channels, "height": size, "width": size,
        "views": ["plain", "flip"],
        "scale": [0.18215] * channels, "shift": [0.0] * channels, "input_range": [-1.0, 1.0], "image_size": size * 8,
        "crop": "adm", "vae_sha256": "0" * 64,
    }  # fmt: skip
    payload = np.ones((2, 2 * channels, size, size), dtype=np.float16)
    side = ShardFolder(out, ["side-000000.tar"], {"command": "a test"})
    side.claim()
    return write_side(base, side, {"latent.npy": payload}, {"latents": spec})


def write_text(base: ShardIndex, config: Config, out: Path) -> str:
    model = config.model
    tokens, pooled = np.ones((3, model.text_hidden_size), np.float16), np.ones(model.text_pooled_size, np.float16)
    fields = {"0.text.npy": tokens} | ({"0.pooled.npy": pooled} if model.text_pooled_size else {})
    nulls = {name: f"null.{name[2:]}" for name in fields}
    spec: dict[str, Any] = {
        "encoder": "clip", "encoder_sha256": "1" * 64, "max_length": model.text_max_length,
        "hidden_size": model.text_hidden_size, "pooled_size": model.text_pooled_size, "null_pooled": None,
    }  # fmt: skip
    side = ShardFolder(out, ["side-000000.tar"], {"command": "a test"}, other_files=tuple(nulls.values()))
    side.claim()
    for name, kind in zip(fields, ("null", "null_pooled"), strict=False):
        np.save(out / nulls[name], fields[name])
        spec[kind] = {"name": nulls[name], "sha256": hashlib.sha256((out / nulls[name]).read_bytes()).hexdigest()}
    return write_side(base, side, fields, {"text": spec})


def write_side(base: ShardIndex, side: ShardFolder, fields: dict[str, np.ndarray], description: Any) -> str:
    payloads = {}
    for name, values in fields.items():
        np.save(file := io.BytesIO(), values)
        payloads[name] = file.getvalue()
    (slot,) = side.slots
    slot.save(write_shard(slot.begin(), ((base.key(sample), payloads) for sample in range(SAMPLES))))
    side.finish({"base": {"fingerprint": base.fingerprint, "keys_sha256": base.meta.keys.sha256}, **description})
    return str(side.out)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings of data for a configuration, the same ones for all that train on one kind."""
    written: dict[Any, dict[str, Any]] = {}

    def of(config: Config) -> dict[str, Any]:
        model = config.model
        kind = (model.in_channels, model.input_size, model.num_classes, model.text_hidden_size, model.text_max_length)
        if kind not in written:
            written[kind] = write_data(config, tmp_path_factory.mktemp("data"))
        return written[kind]

    return of


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_dry_runs_on_eight_ranks(recipe: str, data: Any, tmp_path: Path) -> None:
    """With two blocks; all are alike, and the planner's tests count the whole models."""
    read = partial(load_config, ROOT / "configs" / recipe)
    config = read(["data.shards=unused", f"run_dir={tmp_path}"])
    model = config.model
    shallow = ["model.size=null", "model.depth=2", f"model.hidden_size={model.hidden_size}"]
    shallow += [f"model.num_heads={model.num_heads}"]
    experts = 1 if config.experts is None else min(RANKS, config.experts.num_experts & -config.experts.num_experts)
    places = [f"data.{name}={folder}" for name, folder in data(config).items()]
    config = for_world(read([*places, *shallow, f"run_dir={tmp_path}", f"parallel.expert={experts}"]), RANKS)
    lines = build_on_meta(config, RANKS).splitlines()
    said = {line.partition(":")[0]: line.partition(":")[2] for line in lines}
    assert said["start"].strip() == "step 0, there is no checkpoint"
    assert f" x {RANKS} ranks x " in said["batch"] and list(tmp_path.iterdir()) == []
