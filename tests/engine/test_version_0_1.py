"""A checkpoint that version 0.1 wrote, on two ranks with the experts sharded: three steps of the run below."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_dist import load_model
from diffmoe_dist.config import build_config
from tests.distributed import run_ranks
from tests.engine.runs import curve, train_one

SETTINGS: dict[str, Any] = {
    "model": {
        "depth": 2, "hidden_size": 8, "num_heads": 2, "patch_size": 4, "input_size": 8, "in_channels": 1,
        "num_classes": 10,
    },
    "moe": {"router": "global_pool", "num_experts": 2, "capacity_schedule": [1, 3]},
    "objective": {"time_distribution": "logit_normal", "time_scale": 1000.0},
    "train": {"steps": 6, "global_batch_size": 8},
    "optim": {"lr": 1e-3, "clip_grad_norm": 1.0},
    "ema": {"decay": 0.9},
    "log": {"every": 1},
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    shutil.unpack_archive(Path(__file__).with_name("version_0_1.tar.xz"), tmp_path / "run")
    return tmp_path / "run"


def test_a_model_of_version_0_1_loads_and_predicts_what_it_did(run_dir: Path) -> None:
    model = load_model(run_dir)

    prediction = model(torch.ones(2, 1, 8, 8), torch.tensor([100.0, 900.0]), torch.tensor([3, 10])).prediction
    predicted_by_0_1 = [-0.00112457108, -0.00194820005, 0.000450729975, -0.00113124959, -0.00164843211]
    assert prediction.flatten()[::31].tolist() == pytest.approx(predicted_by_0_1, abs=1e-7)
    router: Any = model.moe_layers[0].router
    assert int(router.threshold_updates) == 3


def resume(rank: int, world_size: int, run_dir: Path, digits: Path) -> None:
    layers = {"run_dir": str(run_dir), "data": {"shards": str(digits)}, "parallel": {"expert": world_size}}
    train_one(rank, world_size, build_config(SETTINGS, layers))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_of_version_0_1_goes_on_with_the_losses_it_would_have_had(
    run_dir: Path, digits: Path, world_size: int
) -> None:
    run_ranks(world_size, resume, run_dir, digits)

    assert curve(run_dir, "step") == [4, 5, 6]
    assert curve(run_dir) == pytest.approx([2.69369804859, 2.45787215233, 2.65447843075], abs=1e-6)
    assert curve(run_dir, "grad_norm") == pytest.approx([0.68183273077, 0.59868896008, 0.69762665033], rel=1e-5)
    assert curve(run_dir, "capacity") == pytest.approx([1, 1, 1])
