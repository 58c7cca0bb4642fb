"""Schedules and objectives in training: one loss curve on one rank and on two, and across a resume."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffmoe_dist.config import Config, learning_rate
from diffmoe_dist.data.batch import BatchBuffer
from diffmoe_dist.engine.noising import with_one_time
from diffmoe_dist.engine.sharded_state import MASTER
from tests.distributed import run_ranks
from tests.engine.runs import curve, make_trainer, tiny_config, train_all

pytestmark = pytest.mark.slow

# A schedule and an objective each, which do not touch.
RECIPES: dict[str, dict[str, Any]] = {
    "cosine, shifted times": {
        "optim": {"schedule": "cosine", "warmup_steps": 5, "final_lr": 1e-4},
        "objective": {"logit_mean": -0.5, "logit_std": 1.5, "time_shift": 3.0},
    },
    "wsd, min-SNR without a variance": {
        "optim": {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 12},
        "objective": {"name": "ddpm", "time_distribution": None, "time_scale": None, "min_snr_gamma": 5.0},
    },
    "milestones, one mode-weighted time": {
        "optim": {"schedule": "milestones", "milestones": [7, 12]},
        "objective": {"time_distribution": "mode", "mode_scale": 0.8, "same_t_per_batch": True},
    },
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_logged_rate_is_that_of_the_step(runs: Path, digits: Path, recipe: str) -> None:
    config = tiny_config(runs, digits, RECIPES[recipe], TWENTY)
    expected = [learning_rate(config, step) for step in range(1, 21)]
    assert curve(runs / "one" / recipe, "lr") == expected and len(set(expected)) > 2


def test_the_rate_of_a_step_is_what_moves_the_weights(runs: Path, digits: Path) -> None:
    recipe = "wsd, min-SNR without a variance"
    config = tiny_config(runs, digits, RECIPES[recipe], TWENTY)
    (moved,) = run_ranks(1, change_of_weights, digits, runs / "last", config)
    assert moved == [pytest.approx(learning_rate(config, step), rel=1e-2) for step in (1, 2)]


def change_of_weights(rank: int, world_size: int, digits: Path, run_dir: Path, config: Config) -> list[float]:
    """The largest change of a weight in each of the first two steps: where gradients keep their sign, AdamW's rate."""
    trainer = make_trainer(rank, world_size, replace(config, run_dir=str(run_dir)))
    changes = []
    for _ in range(2):
        before = [flat.clone() for flat in trainer.state.flat[MASTER]]
        trainer.train_step()
        after = trainer.state.flat[MASTER]
        changes.append(max(float((new - old).abs().max()) for new, old in zip(after, before, strict=True)))
    trainer.close()
    return changes


def test_one_time_of_a_batch_is_a_function_of_the_images_seen_and_of_the_seed() -> None:
    def uniforms(rows: int, seed: int, images_seen: int) -> list[float]:
        batch = BatchBuffer(rows, channels=1, image_size=2).batch()
        found: list[float] = with_one_time(batch, seed, images_seen).time_uniform.tolist()
        return found

    drawn = [uniforms(2, 0, 16 * step)[0] for step in range(1000)]
    assert uniforms(5, 0, 32) == [drawn[2]] * 5 and uniforms(1, 1, 32) != [drawn[2]]
    # 1000 numbers of a uniform distribution: the mean of a quarter is off by up to 4 sqrt(3 / 16 / 1000).
    for quarter in range(4):
        share = sum(quarter / 4 <= number < (quarter + 1) / 4 for number in drawn) / 1000
        assert share == pytest.approx(0.25, abs=0.055)
