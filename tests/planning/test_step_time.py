"""What takes the time of a step."""

from __future__ import annotations

from tests.planning.plans import plan_of


def test_a_slower_network_is_what_bounds_groups_that_span_nodes() -> None:
    settings = {"model": {"hidden_size": 512, "num_heads": 8}, "precision": "bf16", "parallel": {"expert": 4}}
    assert plan_of(settings, 4, 1).bound_by == "communication"
    assert plan_of(settings, 4, 1).step_seconds > plan_of(settings, 4, 4).step_seconds
    big = {
        "model": {"depth": 8, "hidden_size": 1024, "num_heads": 16, "input_size": 32},
        "moe": {"pool": "rank"}, "train": {"global_batch_size": 256},
    }  # fmt: skip
    assert plan_of(big, 1).bound_by == "compute"
