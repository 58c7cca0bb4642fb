"""The study's runs: what is done is not done again, and a committed curve is one that today's code makes."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from diffmoe_dist.engine.run_log import read_metrics
from diffmoe_dist.errors import UserError
from studies.routing import driver, larger
from studies.routing.driver import Workplace, conditions, curve, drive, make_one, training_arguments
from studies.routing.measure import threshold_of_capacity_1
from studies.routing.results import RESULTS, keep_conditions, read_result, read_results, write_result
from studies.routing.systems import BASE_CONFIG, CONSTANT, LEARNING_RATES, SYSTEMS, Run
from tests.commands import start

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


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A study of a tiny model and 200 images, whose commands start fast."""

    def write(name: str, dimensions: tuple[int, ...], values: np.ndarray) -> None:
        head = bytes([0, 0, 8, len(dimensions)]) + b"".join(size.to_bytes(4, "big") for size in dimensions)
        (tmp_path / name).write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))

    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        write(f"{part}-images-idx3-ubyte.gz", (200, 28, 28), generator.integers(256, size=(200, 28, 28)))
        write(f"{part}-labels-idx1-ubyte.gz", (200,), np.arange(200) % 10)
    tiny = {
        "model": {"depth": 2, "hidden_size": 32, "num_heads": 2}, "checkpoint": {"every": 2},
        "train": {"steps": 4, "global_batch_size": 16}, "log": {"every": 2}, "validation": {"every": 2, "images": 32},
    }  # fmt: skip
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(BASE_CONFIG), tiny), tmp_path / "base.yaml")
    for name, value in {
        "FASHION_MNIST": tmp_path, "BASE_CONFIG": tmp_path / "base.yaml", "SAMPLES": 20,
        "_SAMPLER": ("--steps", "2", "--batch-size", "20", "--device", "cpu"), "SEARCHED": (0.1, 0.9),
    }.items():  # fmt: skip
        monkeypatch.setattr(driver, name, value)
    place = Workplace(tmp_path / "work")
    monkeypatch.setattr(driver, "command", Commands(tmp_path))
    place.pack()
    place.look_at_training_images()
    return place


class Commands:
    """Runs those of the driver, and counts them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun: list[str] = []

    def __call__(self, module: str, *arguments: str) -> None:
        self.begun.append(module)
        (process,) = start("data_tools.__main__" if module == "data_tools" else module, *arguments, folder=self.folder)
        assert process.wait() == 0, process.stderr


@pytest.mark.slow
def test_a_run_is_trained_sampled_by_every_rule_measured_and_not_done_again(small: Workplace, tmp_path: Path) -> None:
    run, results, commands = Run("global_pool", 0, 1e-3), tmp_path / "results", driver.command
    assert isinstance(commands, Commands)

    make_one(run, small, results)
    first, begun = (results / f"{run.name}.json").read_text(), list(commands.begun)
    make_one(run, small, results)

    assert begun[-6:].count("diffmoe_dist.sample") == 4 and commands.begun == begun
    assert (results / f"{run.name}.json").read_text() == first
    result = read_result(results / f"{run.name}.json")
    assert (result["name"], result["settings"], result["steps"]) == (run.name, run.overrides, 4)
    assert set(result["curve"]["validation"]) == {"2", "4"}
    assert set(result["measures"]) == set(SYSTEMS["global_pool"].rules)
    for rule, measures in result["measures"].items():
        held_out, samples = measures["held_out"], measures["samples"]
        assert len(held_out["by_level"]) == 10 and len(held_out["by_block"]) == 2
        assert held_out["loss"] == pytest.approx(sum(held_out["by_block"]) / 2, abs=1e-6)
        assert (samples["num"], samples["nfe"]) == (20, 2)
        assert sum(held_out["load"][0]) == pytest.approx(held_out["capacity"] * 200 * 49)
        assert (measures["constant_threshold"] is not None) == (rule == CONSTANT)
    assert result["measures"]["static"]["held_out"]["capacity"] == pytest.approx(1.0, abs=2e-3)


@pytest.mark.slow
def test_larger_runs_are_trained_and_sampled_and_one_that_ended_early_has_its_curve_alone(
    small: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, here = tmp_path / "larger", {"data": {"workers": 0}}  # a test's process may have no children
    base = OmegaConf.merge(OmegaConf.load(larger.LARGER_CONFIG), OmegaConf.load(tmp_path / "base.yaml"), here)
    OmegaConf.save(base, tmp_path / "larger.yaml")
    dense, ours = Run("dense", 0, 1e-3), Run("global_pool", 0, 1e-3)

    def run_all(commands: dict[Run, list[str]], place: Workplace, kind: str, seconds: float = 0) -> list[Run]:
        ended_early = [ours] if kind == "train" else []
        for run, command in commands.items():
            driver.command(*command, *(["train.steps=2"] if run in ended_early else []))
        return [run for run in commands if run not in ended_early]

    for name, value in {
        "LARGER_CONFIG": tmp_path / "larger.yaml", "larger_runs": lambda: [dense, ours], "_run_all": run_all,
        "SAMPLES": 20, "_SAMPLER": ("--steps", "2", "--batch-size", "20"),
    }.items():  # fmt: skip
        monkeypatch.setattr(larger, name, value)

    larger.train_and_sample(small, results, minutes=1)

    found, early = (read_result(results / f"{run.name}.json") for run in (dense, ours))
    assert (found["steps"], early["steps"], early["samples"]) == (4, 2, None)
    assert found["samples"]["num"] == 20 and set(found["curve"]["validation"]) == {"2", "4"}


def test_results_that_were_made_otherwise_are_refused(tmp_path: Path) -> None:
    keep_conditions(tmp_path, conditions())
    keep_conditions(tmp_path, conditions())

    with pytest.raises(UserError, match=r"made with another samples, sampler; write to another --results"):
        keep_conditions(tmp_path, {**conditions(), "samples": 10, "sampler": []})


@pytest.mark.slow
def test_the_first_losses_of_a_committed_curve_are_found_again(tmp_path: Path) -> None:
    if not driver.FASHION_MNIST.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    result = next(one for one in read_results(RESULTS).values() if one["system"] == "global_pool")
    run = Run(result["system"], result["seed"], result["lr"])
    place = Workplace(tmp_path)
    place.pack()

    fewer = [f"train.steps={STEPS}", "validation.images=64"]
    driver.command("diffmoe_dist.train", *training_arguments(run, tmp_path / "run", place), *fewer)

    found = {str(line["step"]): line["loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")}
    assert found == pytest.approx({step: result["curve"]["first"][step] for step in ("10", "20")}, abs=1e-5)


def test_every_committed_result_is_of_the_settings_that_the_study_has_now() -> None:
    for name, result in read_results(RESULTS).items():
        run = Run(result["system"], result["seed"], result["lr"])
        assert (run.name, result["settings"], result["steps"]) == (name, run.overrides, 2000)
    assert read_result(RESULTS / "conditions.json") == conditions()
