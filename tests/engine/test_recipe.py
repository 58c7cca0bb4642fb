"""Schedules and objectives in training: one loss curve on one rank and on two, and across a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from diffmoe_dist.config import learning_rate
from tests.distributed import run_ranks
from tests.engine.runs import curve, tiny_config, train_all

pytestmark = pytest.mark.slow

RECIPES: dict[str, dict[str, Any]] = {
    "cosine": {"optim": {"schedule": "cosine", "warmup_steps": 5, "final_lr": 1e-4}},
    "wsd": {"optim": {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 12}},
    "milestones": {"optim": {"schedule": "milestones", "milestones": [7, 12]}},
}
TWENTY: dict[str, Any] = {"train": {"steps": 20}, "checkpoint": {"every": 10}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Each recipe on two ranks, on one, and on two from the checkpoint at its middle."""
    root = tmp_path_factory.mktemp("runs")
    jobs = {
        kind: [(root / kind / name, RECIPES[name] | TWENTY) for name in RECIPES] for kind in ("two", "one", "resumed")
    }
    run_ranks(2, train_all, digits, jobs["two"], time_limit=300.0)
    run_ranks(1, train_all, digits, jobs["one"], time_limit=300.0)
    shutil.copytree(root / "two", root / "resumed")
    for name in RECIPES:
        shutil.rmtree(root / "resumed" / name / "checkpoints/step-00000020")
    run_ranks(2, train_all, digits, jobs["resumed"], time_limit=300.0)
    return root


@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_have_the_same_losses_on_one_rank_and_on_two(runs: Path, recipe: str) -> None:
    expected = curve(runs / "one" / recipe)
    assert len(expected) == 20
    assert curve(runs / "two" / recipe) == pytest.approx(expected, abs=1e-6, rel=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resume_from_the_middle_is_the_run_bit_for_bit(runs: Path, recipe: str) -> None:
    for name in ("loss", "grad_norm", "lr"):
        assert curve(runs / "resumed" / recipe, name) == curve(runs / "two" / recipe, name)


def test_the_logged_rate_is_the_one_of_the_step_and_the_one_that_trains(runs: Path, digits: Path) -> None:
    for recipe in ("cosine", "wsd", "milestones"):
        config = tiny_config(runs, digits, RECIPES[recipe], TWENTY)
        expected = [learning_rate(config, step) for step in range(1, 21)]
        assert curve(runs / "one" / recipe, "lr") == expected and len(set(expected)) > 2
    losses = [curve(runs / "one" / recipe) for recipe in ("cosine", "wsd", "milestones")]
    # Whatever the rate, the first loss is that of the initial weights, and none that follows an update.
    assert losses[0][0] == losses[1][0] == losses[2][0]
    assert losses[0][1] != losses[1][1] != losses[2][1]
