"""The larger model's runs: what is compared is comparable, and a run that is stopped leaves its curve."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest
from omegaconf import OmegaConf

from diffmoe_dist.config import load_config
from diffmoe_dist.model.accounting import account
from studies.routing import larger
from studies.routing.driver import Workplace, training_arguments
from studies.routing.larger import LARGER_CONFIG
from studies.routing.results import RESULTS, read_result, read_results
from studies.routing.systems import BASE_CONFIG, Run, larger_runs


def test_both_systems_activate_as_many_parameters_17_times_those_of_the_study() -> None:
    def activated(run: Run, base_config: Path) -> float:
        _, config, *overrides = training_arguments(run, Path("run"), Workplace(Path("work")), base_config)
        return account(load_config(config, overrides)).activated(1.0)

    dense, ours = (activated(run, LARGER_CONFIG) for run in larger_runs()[:2])
    assert ours == pytest.approx(dense, rel=0.004)
    assert dense / activated(larger_runs()[0], BASE_CONFIG) == pytest.approx(17.3, rel=0.01)


def test_beside_its_size_the_larger_model_is_trained_as_the_others() -> None:
    small, large = (OmegaConf.to_container(OmegaConf.load(file)) for file in (BASE_CONFIG, LARGER_CONFIG))
    assert isinstance(small, dict) and isinstance(large, dict)
    for part in ("seed", "objective", "ema", "optim", "log"):
        assert large[part] == small[part]
    changed = {key for part in ("model", "train") for key in large[part] if large[part][key] != small[part][key]}
    assert changed == {"depth", "hidden_size", "num_heads", "steps"}


def test_the_committed_results_are_of_the_settings_that_it_has_now() -> None:
    found = read_results(RESULTS / "larger")
    assert {name: result["settings"] for name, result in found.items()} == {r.name: r.overrides for r in larger_runs()}
    assert read_result(RESULTS / "larger/conditions.json")["config"] == OmegaConf.to_container(
        OmegaConf.load(LARGER_CONFIG)
    )


def test_what_still_runs_when_the_time_is_over_is_stopped_and_what_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(command, stdout=log))
        if command[0] != "sleep":
            started[-1].wait()  # on a busy machine too, before the time is over
        return started[-1]

    monkeypatch.setattr(larger, "_start", start)
    commands = dict(zip(larger_runs(), (["true"], ["sleep", "60"], ["false"]), strict=False))

    assert larger._run_all(commands, Workplace(tmp_path), "train", seconds=0.5) == larger_runs()[:1]
    assert [process.returncode for process in started] == [0, -9, 1]
