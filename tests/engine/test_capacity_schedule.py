"""`moe.capacity_schedule` by optimizer steps: a capacity that falls, and goes on falling after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffmoe_dist.engine.weights import find_model, read_model
from tests.distributed import run_ranks
from tests.engine.runs import curve, train_all

SCHEDULE = {"moe": {"capacity_schedule": [1, 5]}}
THREE, SIX = {**SCHEDULE, "train": {"steps": 3}}, {**SCHEDULE, "train": {"steps": 6}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    whole, resumed = folder / "whole", folder / "resumed"
    run_ranks(1, train_all, digits, [(whole, SIX), (resumed, THREE), (resumed, SIX)])
    return folder


def test_every_token_meets_all_four_experts_at_first_and_one_on_average_after_the_schedule(runs: Path) -> None:
    assert curve(runs / "whole", "capacity") == [4, 4, 3.25, 2.5, 1.75, 1]


def test_a_resume_within_the_schedule_goes_on_with_the_capacities_and_losses_of_the_run(runs: Path) -> None:
    for name in ("capacity", "loss", "grad_norm"):
        assert curve(runs / "resumed", name) == curve(runs / "whole", name)


def test_a_run_that_ends_within_the_schedule_finds_thresholds_for_the_capacity_of_inference(runs: Path) -> None:
    """Step 3 is trained at C = 3.25."""
    model, _ = read_model(find_model(runs / "resumed" / "checkpoints" / "step-00000003"), "cpu", [])
    torch.manual_seed(0)
    routing = model(torch.randn(64, 1, 8, 8), torch.rand(64) * 1000, torch.arange(64) % 10).routing
    capacity = sum(float(stats.tokens_per_expert.sum()) for stats in routing) / (len(routing) * 64 * 16)
    assert 0.5 < capacity < 1.5, capacity
