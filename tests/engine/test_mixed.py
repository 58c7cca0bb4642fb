"""Runs of precision=bf16_mixed: their curves on one rank, on two and over a resume, and what is done with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.digits import DigitsSource
from data_tools.pack import PackSettings, pack
from diffmoe_dist import load_model
from diffmoe_dist.config import load_config
from tests.commands import start
from tests.distributed import run_ranks
from tests.engine.runs import curve, metrics, train_one
from tests.machine import ROOT

pytestmark = pytest.mark.slow

STEPS = 20


def train_each(rank: int, world_size: int, digits: Path, jobs: dict[Path, list[str]]) -> None:
    for run_dir, overrides in jobs.items():
        name = "prototype" if "prototype" in run_dir.name else "global_pool"
        settings = ["precision=bf16_mixed", f"run_dir={run_dir}", f"data.shards={digits}", "log.every=1"]
        config = load_config(ROOT / f"configs/debug/{name}.yaml", [*settings, f"train.steps={STEPS}", *overrides])
        train_one(rank, world_size, config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    root = tmp_path_factory.mktemp("mixed")

    def go(world_size: int, **jobs: list[str]) -> None:
        run_ranks(world_size, train_each, digits, {root / name: overrides for name, overrides in jobs.items()})

    pack(DigitsSource(), root / "held-out", PackSettings(seed=1))
    held_out = [
        f"validation.shards={root / 'held-out'}",
        "validation.every=10",
        "validation.images=32",
        "sample.every=10",
    ]
    ten = ["train.steps=10"]
    go(1, prototype1=[*held_out, "sample.num=4", "sample.steps=4"], global_pool1=[], prototype_fp32=["precision=fp32"])
    ep2 = ["parallel.expert=2"]
    zero2 = ["parallel.zero_stage=2", *ep2]
    go(2, prototype2=ep2, global_pool2=zero2, prototype_half=[*ep2, *ten])
    for name in ("prototype_resumed", "prototype_changed"):
        shutil.copytree(root / "prototype_half", root / name)
    go(2, prototype_resumed=ep2, prototype_changed=[*ep2, "precision=fp32"])
    return root


def test_the_first_step_is_the_same_on_one_rank_and_on_two(runs: Path) -> None:
    # Of the same weights: only the order of sums differs, and gradients are rounded.
    for name in ("prototype", "global_pool"):
        one, two = (metrics(runs / f"{name}{ranks}")[0] for ranks in (1, 2))
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-6), name
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3), name


@pytest.mark.parametrize("name", ["prototype", "global_pool"])
def test_curves_of_one_rank_and_two_differ_by_rounding_alone(runs: Path, name: str) -> None:
    # Each rank rounds its own part of a gradient to bf16, 2^-9 of it, and a token that stands between two experts falls
    # to either side: measured 1.3e-3 at most.
    assert curve(runs / f"{name}2") == pytest.approx(curve(runs / f"{name}1"), abs=6e-3, rel=0)


def test_ten_steps_and_a_resume_are_twenty_steps_bit_for_bit(runs: Path) -> None:
    for key in ("loss", "loss_contrastive", "grad_norm"):
        assert curve(runs / "prototype_resumed", key) == curve(runs / "prototype2", key)


def test_it_has_the_losses_it_always_had_which_are_near_those_of_fp32(runs: Path) -> None:
    golden = json.loads((ROOT / "tests/golden/prototype_bf16_mixed.json").read_text())
    # Processors without bf16 instructions round sums in another order.
    assert curve(runs / "prototype1") == pytest.approx(golden, abs=5e-3)
    fp32 = curve(runs / "prototype_fp32")
    assert curve(runs / "prototype1") == pytest.approx(fp32, abs=1e-2), "measured 3.0e-3"
    assert curve(runs / "prototype1")[0] != fp32[0]


def test_a_resume_in_another_precision_goes_on_and_says_so(runs: Path) -> None:
    assert "precision bf16_mixed -> fp32" in (runs / "prototype_changed/logs/rank-0.log").read_text()
    assert curve(runs / "prototype_changed") == pytest.approx(curve(runs / "prototype2"), abs=6e-3)


def test_a_run_validates_samples_and_keeps_fp32_weights(runs: Path) -> None:
    run = runs / "prototype1"
    assert isinstance(metrics(run)[9]["loss_val"], float)
    assert list(run.glob("samples/*.png"))
    assert {parameter.dtype for parameter in load_model(run).parameters()} == {torch.float32}


def test_its_checkpoint_is_exported_sampled_scored_and_reported_in_its_precision(runs: Path, tmp_path: Path) -> None:
    def do(module: str, *arguments: object) -> None:
        (command,) = start(f"diffmoe_dist.{module}", *arguments, folder=tmp_path)
        assert command.wait() == 0, command.stderr

    run_dir, weights = runs / "prototype1", tmp_path / "weights"
    do("convert", "--to", "safetensors", "--checkpoint", run_dir, "--out", weights)
    sample = ("sample", "--num", 4, "--steps", 4, "--device", "cpu", "--checkpoint")
    do(*sample, run_dir, "--out", tmp_path / "samples")
    do(*sample, weights, "--out", tmp_path / "of_weights")
    do(*sample, run_dir, "--out", tmp_path / "fp32", "--precision", "fp32")
    found = {}
    for name in ("samples", "of_weights", "fp32"):
        found[name] = json.loads((tmp_path / name / "sampling.json").read_text())
        found[name]["images"] = np.load(tmp_path / name / "samples.npz")["arr_0"]
    assert [job["precision"] for job in found.values()] == ["bf16_mixed", "bf16_mixed", "fp32"]
    assert len({job["weights"] for job in found.values()}) == 1, "which are fp32"
    assert np.array_equal(found["samples"]["images"], found["of_weights"]["images"])
    distance = np.abs(found["samples"]["images"].astype(int) - found["fp32"]["images"])
    assert 0 < distance.mean() < 4, "gray levels"

    colours = ("--features", "tests.evaluation.colours:colours", "--device", "cpu")
    do("evaluate", "--make-reference", tmp_path / "reference.npz", "--shards", runs / "held-out", *colours)
    sampled = ("--samples", run_dir, "--num", 4, "--steps", 4, "--out", tmp_path / "scores.json")
    do("evaluate", *sampled, "--reference", tmp_path / "reference.npz", *colours)
    assert json.loads((tmp_path / "scores.json").read_text())["sampling"]["precision"] == "bf16_mixed"
    do("report", "--run", run_dir, "--samples", tmp_path / "samples", "--device", "cpu")
    assert "bf16_mixed" in (run_dir / "report.html").read_text()
