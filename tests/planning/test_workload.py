"""What a rank computes in a micro-step, by hand."""

from __future__ import annotations

from tests.planning.plans import PROTOTYPE, SHARDED, plan_of


def test_a_measured_capacity_takes_the_settings_place() -> None:
    one, two = (plan_of(SHARDED, 2, capacity=capacity) for capacity in (1.0, 2.0))
    assert two.work.assignments == 2 * one.work.assignments
    assert (one.work.capacity, two.work.capacity) == (1.0, 2.0)
    assert plan_of({"moe": {"capacity": 0.3}}, 2).work.capacity == 4 * 19 / 256, "int(256 / 4 * 0.3) slots an expert"


def test_images_without_a_condition_count_in_the_capacity_and_do_not_travel() -> None:
    settings = {**PROTOTYPE, "train": {"label_dropout": 0.25}}
    work = plan_of(settings, 2).work
    assert (work.tokens, work.assignments, work.unconditional, work.capacity) == (128, 96, 32, 1.0)
