"""Weights of another model as a beginning, and data without labels: what begins anew, and that the curve is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffmoe_dist import load_model
from diffmoe_dist.engine.conversion import export_checkpoint
from diffmoe_dist.engine.fine_tuning import tensors_anew
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.freezing import told
from diffmoe_dist.sampling.job import sample_to_folder
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.commands import start
from tests.distributed import run_ranks
from tests.engine.runs import curve, empty_model, tiny_config, train_all

SPLIT = {"parallel": {"expert": 2}}
COLOUR = {"in_channels": 3}
TABLE = "y_embedder.embedding_table.weight"
TEXT = {
    "model": {"condition": "text", "num_classes": 0, "text_hidden_size": 8, "text_max_length": 4},
    "data": {"text": "unused"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fine-tuning")


@pytest.fixture(scope="module")
def runs(folder: Path, digits: Path) -> Path:
    """A run on ten classes, runs that start from its weights or without classes, and one from those to ten."""
    drawn = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    for number, image in enumerate(drawn):
        for place in (folder / f"all/{number % 10}", folder / f"classes/{number % 3}", folder / "plain"):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number}.png")
    for name in ("all", "classes", "plain"):
        packed = start("data_tools.__main__", "pack", folder / name, folder / f"shards-{name}", folder=folder)[0]
        assert packed.wait() == 0, packed.stderr
    everything: dict[str, Any] = {"model": COLOUR, "data": {"shards": str(folder / "shards-all")}}
    run_ranks(1, train_all, digits, [(folder / "ten", {**everything, "train": {"steps": 3}, "optim": {"lr": 1e-2}})])
    export_checkpoint(folder / "ten", folder / "weights")
    started: dict[str, Any] = {"train": {"steps": 20, "initial_weights": str(folder / "weights")}}
    three = {**started, "model": {"num_classes": 3, **COLOUR}, "data": {"shards": str(folder / "shards-classes")}}
    more = {**everything, **started, "moe": {"num_experts": 8}}
    plain_data = {"data": {"shards": str(folder / "shards-plain")}}
    plain = {"train": {"steps": 20}, "model": {"num_classes": 0, **COLOUR}, **plain_data}
    jobs = {"three": three, "more": more, "plain": plain}
    run_ranks(1, train_and_sample, digits, [(folder / name, job) for name, job in jobs.items()])
    export_checkpoint(folder / "plain", folder / "weights-plain")
    jobs["back"] = {**everything, "train": {"steps": 20, "initial_weights": str(folder / "weights-plain")}}
    run_ranks(1, train_all, digits, [(folder / "back", jobs["back"])])
    half = {name: {**job, "train": {**job["train"], "steps": 10}} for name, job in jobs.items()}
    split = [(folder / f"{name}2", {**part[name], **SPLIT}) for name in jobs for part in (half, jobs)]
    run_ranks(2, train_all, digits, split)
    return folder


def train_and_sample(rank: int, ranks: int, digits: Path, jobs: list[tuple[Path, dict[str, Any]]]) -> None:
    train_all(rank, ranks, digits, jobs)
    plain, cpu, launch = jobs[-1][0], torch.device("cpu"), Launch(rank, ranks, rank, "environment")
    sample_to_folder(SamplingSettings(str(plain), num=3, steps=2, batch_size=3), plain / "samples", cpu, launch)
    with pytest.raises(UserError, match=r"--cfg-scale has no effect with this model, which was trained without class"):
        sample_to_folder(SamplingSettings(str(plain), num=3, cfg_scale=2.0), plain / "guided", cpu, launch)


@pytest.mark.parametrize("name", ["three", "more", "plain", "back"])
def test_the_curve_is_one_on_any_ranks_and_over_a_resume(runs: Path, name: str) -> None:
    alone = curve(runs / name)
    assert len(alone) == 20
    assert curve(runs / f"{name}2") == pytest.approx(alone, abs=1e-6, rel=0)


def test_what_begins_anew_is_told_by_name_and_everything_else_is_taken(runs: Path, digits: Path) -> None:
    weights = load_file(runs / "weights/model.safetensors")
    log = (runs / "three/logs/rank-0.log").read_text()
    assert f"started from the weights in {runs}/weights; from the seed: {TABLE}" in log
    log = (runs / "back/logs/rank-0.log").read_text()
    assert f"started from the weights in {runs}/weights-plain; from the seed: {TABLE}" in log
    log = (runs / "more/logs/rank-0.log").read_text()
    assert "from the seed: blocks.*.mlp.router.gate_weight, " in log and "blocks.*.mlp.experts.w1, " in log
    changes: dict[str, dict[str, Any]] = {
        "three": {"model": {**COLOUR, "num_classes": 3}},
        "more": {"model": COLOUR, "moe": {"num_experts": 8}},
    }
    for name, change in changes.items():
        still = {**change, "train": {"steps": 1, "initial_weights": str(runs / "weights")}, "optim": {"lr": 1e-30}}
        still["data"] = {"shards": str(runs / ("shards-classes" if name == "three" else "shards-all"))}
        run_ranks(1, train_all, digits, [(runs / f"{name}-still", still)])
        initial = empty_model(runs, digits, change).state_dict()
        config = tiny_config(runs, digits, still)
        anew = tensors_anew(config)
        got = load_model(runs / f"{name}-still").state_dict()
        for key, value in got.items():
            if not key.endswith(("threshold", "threshold_updates")):
                assert float((value - (initial if key in anew else weights)[key]).abs().max()) < 1e-20, key


CROSS = [f"blocks.*.cross_attn.{layer}.{part}" for layer in ("q", "kv", "proj") for part in ("weight", "bias")]
EMBEDDERS = [f"y_embedder.{name}.{place}.{part}" for name in ("tokens", "pooled") for place in (0, 2)
             for part in ("weight", "bias")]  # fmt: skip
PREDICTOR = [f"capacity_predictor.{place}.{part}" for place in (0, 2) for part in ("weight", "bias")]
ROUTER = [f"blocks.*.mlp.router.{name}" for name in ("gate_weight", "threshold", "threshold_updates", *PREDICTOR)]
EXPERTS = [f"blocks.*.mlp.experts.{name}" for name in ("w1", "w2", "b1", "b2")]


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({}, ["nothing"]),
        ({"model": {"num_classes": 3}}, [TABLE]),
        ({"model": {"input_size": 16}}, ["pos_embed"]),
        (TEXT, [*EMBEDDERS, *CROSS]),
        ({"moe": {"num_experts": 2}}, [*ROUTER, *EXPERTS]),
    ],
    ids=["nothing", "classes", "resolution", "captions", "experts"],
)
def test_what_begins_anew_follows_from_what_differs(runs: Path, change: dict[str, Any], anew: list[str]) -> None:
    config = tiny_config(runs, runs, {"train": {"initial_weights": str(runs / "weights")}, "model": COLOUR}, change)
    assert sorted(told(tensors_anew(config)).split(", ")) == sorted(anew)


def test_samples_of_a_run_without_classes_have_label_0(runs: Path) -> None:
    with np.load(runs / "plain/samples/samples.npz") as file:
        assert file["arr_0"].shape == (3, 8, 8, 3) and file["arr_1"].tolist() == [0, 0, 0]
    assert json.loads((runs / "plain/samples/sampling.json").read_text())["num"] == 3


def test_conditions_are_not_asked_for_where_there_are_none(tmp_path: Path) -> None:
    none = {"model": {"num_classes": 0}}
    with pytest.raises(UserError, match=r"sample\.cfg_scale=2\.0 has no effect with model\.num_classes=0, which knows"):
        tiny_config(tmp_path, tmp_path, none, {"sample": {"cfg_scale": 2.0}})
    with pytest.raises(UserError, match=r"moe\.unconditional_expert=true has no effect with model\.num_classes=0"):
        tiny_config(tmp_path, tmp_path, none, {"moe": {"router": "prototype"}})
    with pytest.raises(UserError, match=r"train\.label_dropout=0\.2 has no effect with model\.num_classes=0"):
        tiny_config(tmp_path, tmp_path, none, {"train": {"label_dropout": 0.2}})
