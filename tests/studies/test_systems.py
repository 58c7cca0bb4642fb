"""What the study compares is comparable, and its runs come in the order of their worth."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffmoe_dist.config import load_config
from diffmoe_dist.model.accounting import Accounting, account
from studies.routing.driver import Workplace, training_arguments
from studies.routing.systems import (
    LEARNING_RATES,
    MAIN_SYSTEMS,
    SENSITIVE_SYSTEMS,
    SYSTEMS,
    VARIANTS,
    Run,
    chosen_learning_rate,
    next_runs,
    planned_runs,
)


def accounting_of(system: str) -> Accounting:
    """From the very arguments that the training command is given."""
    run = Run(system, 0, 1e-3)
    _, config, *overrides = training_arguments(run, Path("run"), Workplace(Path("work")))
    return account(load_config(config, overrides))


@pytest.mark.parametrize("system", sorted(SYSTEMS.keys() - {"dense_wide"}))
def test_every_system_activates_as_many_parameters_as_dense_at_a_capacity_of_1(system: str) -> None:
    within = 0.004 if system in MAIN_SYSTEMS else 0.02
    assert accounting_of(system).activated(1.0) == pytest.approx(accounting_of("dense").total, rel=within)


def test_the_wider_dense_model_has_one_and_a_half_times_as_many() -> None:
    assert accounting_of("dense_wide").total / accounting_of("dense").total == pytest.approx(1.5, abs=0.1)


def test_every_variant_is_measured_under_a_rule_of_its_system_and_no_system_is_left_out() -> None:
    assert {variant.system for variant in VARIANTS.values()} == set(MAIN_SYSTEMS)
    assert all(variant.rule in SYSTEMS[variant.system].rules for variant in VARIANTS.values())


def test_the_learning_rate_is_chosen_by_the_dense_model_alone_before_anything_else_runs() -> None:
    assert {run.lr for run in next_runs([], None)} == set(LEARNING_RATES)
    assert {run.system for run in next_runs([], None)} == {"dense"}
    assert chosen_learning_rate({0.001: 0.2}) is None
    assert chosen_learning_rate(dict(zip(LEARNING_RATES, (0.3, 0.2, 0.1, 0.4, 0.5), strict=True))) == LEARNING_RATES[2]


def test_the_first_runs_are_a_seed_of_every_system_then_other_learning_rates_then_the_next_seed() -> None:
    runs = planned_runs(1e-3)

    first, others, second = runs[:9], runs[9:15], runs[15:24]
    assert [(run.system, run.seed, run.lr) for run in first] == [(system, 0, 1e-3) for system in MAIN_SYSTEMS]
    assert {(run.system, run.seed) for run in others} == {(system, 0) for system in SENSITIVE_SYSTEMS}
    assert {run.lr for run in others} == {2.5e-4, 5e-4, 2e-3}
    assert [(run.system, run.seed, run.lr) for run in second] == [(system, 1, 1e-3) for system in MAIN_SYSTEMS]
    assert len({run.name for run in runs}) == len(runs)


def test_a_finished_run_is_not_made_again_and_runs_with_the_same_settings_are_one() -> None:
    everything = next_runs([], 1e-3)

    assert [run.name for run in everything].count(Run("dense", 0, 1e-3).name) == 1
    assert next_runs([run.name for run in everything[:-1]], 1e-3) == everything[-1:]
