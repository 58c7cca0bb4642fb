"""The larger model's runs: what is compared is comparable, and a run that is stopped leaves its curve."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffmoe_dist.config import load_config
from diffmoe_dist.model.accounting import account
from studies.routing import larger
from studies.routing.driver import Workplace, training_arguments
from studies.routing.larger import LARGER_CONFIG, LARGER_RATES, larger_runs
from studies.routing.results import RESULTS, read_result, read_results
from studies.routing.systems import BASE_CONFIG, Run


def test_both_systems_activate_as_many_parameters_sixteen_times_those_of_the_study() -> None:
    def activated(run: Run, base_config: Path) -> float:
        _, config, *overrides = training_arguments(run, Path("run"), Workplace(Path("work")), base_config)
        return account(load_config(config, overrides)).activated(1.0)

    dense, ours = (activated(run, LARGER_CONFIG) for run in larger_runs()[:2])
    assert ours == pytest.approx(dense, rel=0.004)
    assert dense / activated(larger_runs()[0], BASE_CONFIG) == pytest.approx(16, rel=0.1)


def test_the_committed_results_are_of_the_settings_that_it_has_now() -> None:
    found = read_results(RESULTS / "larger")
    assert {name: result["settings"] for name, result in found.items()} == {r.name: r.overrides for r in larger_runs()}
    assert read_result(RESULTS / "larger/conditions.json")["config"] == OmegaConf.to_container(
        OmegaConf.load(LARGER_CONFIG)
    )
    assert 1e-4 in LARGER_RATES


def test_what_still_trains_when_the_minutes_are_over_is_stopped() -> None:
    first, second = larger_runs()[:2]
    processes = {first: subprocess.Popen(["true"]), second: subprocess.Popen(["sleep", "60"])}

    larger._wait(processes, time.monotonic() + 0.1)

    assert [process.returncode for process in processes.values()] == [0, -9]
