"""Whole runs on a CUDA device, each a command: resume, profile, recomputation, compiled blocks, sampling."""

from __future__ import annotations

import gzip
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from diffmoe_dist.config import ProfileConfig
from diffmoe_dist.engine.profiling import Profiler, Timings
from tests.commands import ENV, run
from tests.engine.runs import TINY, curve, metrics, whole_state

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
# What tests.commands sets so that no other test sees a GPU.
ON_DEVICE = {key: value for key, value in ENV.items() if key not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
ON_DEVICE |= {key: os.environ[key] for key in ("CUDA_VISIBLE_DEVICES",) if key in os.environ}


def train(run_dir: Path, digits: Path, device: str, *settings: str) -> None:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    file = run_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**TINY, "run_dir": str(run_dir), "data": {"shards": str(digits)}}))
    command = (sys.executable, "-m", "diffmoe_dist.train", "--config", file, f"device={device}", *settings)
    ended = run(*command, env=ON_DEVICE)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        pytest.param("cpu", "bf16_mixed", marks=pytest.mark.slow),  # the others: tests/engine/test_one_curve.py
        *(pytest.param("cuda", precision, marks=pytest.mark.gpu) for precision in ("fp32", "bf16", "bf16_mixed")),
    ],
)
def test_a_deterministic_run_that_is_resumed_has_the_bits_of_one_that_is_not(
    device: str, precision: str, digits: Path, tmp_path: Path
) -> None:
    settings = (f"precision={precision}", "deterministic=true", "checkpoint.every=3")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole, digits, device, *settings, "train.steps=6")
    train(resumed, digits, device, *settings, "train.steps=3")
    train(resumed, digits, device, *settings, "train.steps=6")
    assert len(curve(whole)) == 6 and curve(whole) == curve(resumed)
    for kind in ("master", "ema"):
        ours, theirs = (whole_state(folder, digits, kind, 6) for folder in (whole, resumed))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.gpu
def test_recomputation_gives_the_same_bits(digits: Path, tmp_path: Path) -> None:
    # On a CPU: tests/engine/test_recompute.py.
    settings = ("precision=bf16", "deterministic=true", "train.steps=4")
    for mode in ("none", "mlp", "block"):
        train(tmp_path / mode, digits, "cuda", *settings, f"train.recompute={mode}")
    assert curve(tmp_path / "none") == curve(tmp_path / "mlp") == curve(tmp_path / "block")


@pytest.mark.gpu
def test_compiled_blocks_learn_as_others(digits: Path, tmp_path: Path) -> None:
    # On a CPU tests/engine/test_compile.py holds it closer.
    for compiled in ("false", "true"):
        train(tmp_path / compiled, digits, "cuda", "train.steps=6", f"train.compile={compiled}")
    eager, compiled_curve = (curve(tmp_path / name) for name in ("false", "true"))
    assert max(abs(a - b) for a, b in zip(eager, compiled_curve, strict=True)) < 1e-4


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_a_run_traces_steps_times_their_parts_and_samples(device: str, digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(run_dir, digits, device, "train.steps=4", "profile.steps=[2,3]", "precision=bf16")
    with gzip.open(run_dir / "profile/steps-2-3-rank-0.json.gz", "rt") as file:
        categories = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert "cpu_op" in categories and ("kernel" in categories) == (device == "cuda")
    last = metrics(run_dir)[-1]
    assert all(last[f"seconds_{part}"] > 0 for part in ("forward", "backward", "optimizer"))
    assert last["peak_memory_bytes"] > 0
    options = ("--num", "4", "--steps", "2", "--cfg-scale", "2", "--device", device, "--out", tmp_path / "samples")
    ended = run(sys.executable, "-m", "diffmoe_dist.sample", "--checkpoint", run_dir, *options, env=ON_DEVICE)
    assert ended.returncode == 0, ended.stderr
    assert np.load(tmp_path / "samples/samples.npz")["arr_0"].shape == (4, 8, 8, 1)


@pytest.mark.gpu
def test_samples_are_scored_while_training(digits: Path, tmp_path: Path) -> None:
    features = np.random.default_rng(0).random((50, 12))
    extractor = "tests.evaluation.colours:colours"
    np.savez(tmp_path / "r.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False), extractor=extractor)
    scores = ("fid.every=2", "fid.num=6", f"fid.features={extractor}", f"fid.reference={tmp_path / 'r.npz'}")
    train(tmp_path / "run", digits, "cuda", "train.steps=4", "sample.steps=2", *scores)
    found = [line["frechet_distance_6"] for line in metrics(tmp_path / "run") if "frechet_distance_6" in line]
    assert len(found) == 2 and all(map(math.isfinite, found))


@pytest.mark.gpu
def test_parts_of_a_step_are_timed_on_the_device_and_not_where_the_host_is() -> None:
    timings = Timings(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):  # the last ones find the library started
        with timings.part("forward"):
            for _ in range(20):
                a @ a
        torch.cuda.synchronize()
        seconds = timings.mean_since_last(steps=1)["seconds_forward"]
    assert 2 * 4096**3 * 20 / seconds < 2e15  # no GPU is as fast as a host that does not wait looks


@pytest.mark.gpu
def test_memory_that_runs_out_leaves_a_snapshot(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(memory_snapshot=True), tmp_path, 0, torch.device("cuda"))
    try:
        with pytest.raises(torch.OutOfMemoryError), profiler.step(3):
            torch.empty(2**50, device="cuda")
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    assert (tmp_path / "profile/out-of-memory-step-3-rank-0.pickle").stat().st_size > 0
