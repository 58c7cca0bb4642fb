"""The study's runs: what is done is not done again, and a committed curve is one that today's code makes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from diffmoe_dist.engine.run_log import read_metrics
from diffmoe_dist.errors import UserError
from studies.routing import driver
from studies.routing.driver import RESULTS, Workplace, curve, drive, read_results, training_arguments, write_result
from studies.routing.measure import threshold_of_capacity_1
from studies.routing.systems import LEARNING_RATES, Run

STEPS = 20


def test_a_curve_has_the_first_losses_one_by_one_then_means_and_those_of_validation() -> None:
    lines = [{"step": step, "loss": float(step), "loss_diffusion": float(step)} for step in range(10, 121, 10)]
    lines[4]["loss_val"] = 0.5

    found = curve(lines)

    assert found["first"] == {"10": 10.0, "20": 20.0, "30": 30.0, "40": 40.0}
    assert found["training"] == {"50": 30.0, "100": 80.0, "150": 115.0}
    assert found["validation"] == {"50": 0.5}


def test_the_constant_threshold_is_where_the_measured_capacity_crosses_1() -> None:
    points = [
        {"threshold": 0.3, "capacity": 0.8},
        {"threshold": 0.1, "capacity": 2.0},
        {"threshold": 0.2, "capacity": 1.2},
    ]

    assert threshold_of_capacity_1(points) == pytest.approx(0.25)


class FakeRuns:
    """In the place of the processes of runs: each ends at once, having written its result, but those that fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: str = "") -> None:
        self.begun: list[str] = []
        self.failing = failing
        monkeypatch.setattr(driver, "_start", self.start)
        monkeypatch.setattr(driver, "_SECONDS_BETWEEN_LOOKS", 0)
        for name in ("pack", "look_at_training_images"):
            monkeypatch.setattr(Workplace, name, lambda self: None)

    def start(self, run: Run, place: Workplace, results: Path) -> Any:
        self.begun.append(run.name)
        if run.name != self.failing:
            loss = {"held_out": {"loss": abs(run.lr - LEARNING_RATES[2])}}
            result = {"system": run.system, "seed": run.seed, "lr": run.lr, "measures": {"own": loss}}
            write_result(results / f"{run.name}.json", result)
        return subprocess.Popen(["false" if run.name == self.failing else "true"])


def test_the_driver_chooses_the_learning_rate_and_makes_what_has_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = LEARNING_RATES[2]
    monkeypatch.setattr("studies.routing.systems.planned_runs", lambda lr: [Run("token_choice", 0, lr)])
    runs = FakeRuns(monkeypatch)
    begun_before = Run("dense", 0, LEARNING_RATES[0])
    runs.start(begun_before, Workplace(tmp_path), tmp_path)

    drive(Workplace(tmp_path), tmp_path, jobs=2)

    assert runs.begun.count(begun_before.name) == 1
    assert runs.begun[-1] == Run("token_choice", 0, best).name
    assert len(read_results(tmp_path)) == len(LEARNING_RATES) + 1


def test_a_run_that_fails_is_named_and_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = FakeRuns(monkeypatch, failing=Run("dense", 0, LEARNING_RATES[1]).name)

    with pytest.raises(UserError, match=runs.failing):
        drive(Workplace(tmp_path), tmp_path, jobs=1)

    assert runs.begun.count(runs.failing) == 1
    assert len(read_results(tmp_path)) == len(LEARNING_RATES) - 1


@pytest.mark.slow
def test_the_first_losses_of_a_committed_curve_are_found_again(tmp_path: Path) -> None:
    committed = read_results(RESULTS)
    if not driver.FASHION_MNIST.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    assert committed
    result = next(iter(committed.values()))
    run = Run(result["system"], result["seed"], result["lr"])
    place = Workplace(tmp_path)
    place.pack()

    driver.command("diffmoe_dist.train", *training_arguments(run, tmp_path / "run", place), f"train.steps={STEPS}")

    found = {str(line["step"]): line["loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")}
    assert found == pytest.approx({step: result["curve"]["first"][step] for step in ("10", "20")}, abs=1e-5)


def test_every_committed_result_is_of_the_settings_that_the_study_has_now() -> None:
    for name, result in read_results(RESULTS).items():
        run = Run(result["system"], result["seed"], result["lr"])
        assert (run.name, result["settings"], result["steps"]) == (name, run.overrides, 2000)
