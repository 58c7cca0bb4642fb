"""What takes the time of a step."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.recompute import apply_recompute
from diffmoe_dist.planning.step_time import recomputed_flops
from tests.planning.plans import DENSE, Case, plan_of


def test_a_slower_network_is_what_bounds_groups_that_span_nodes() -> None:
    settings = {"model": {"hidden_size": 512, "num_heads": 8}, "precision": "bf16", "parallel": {"expert": 4}}
    assert plan_of(settings, 4, 1).bound_by == "communication"
    assert plan_of(settings, 4, 1).step_seconds > plan_of(settings, 4, 4).step_seconds
    big = {
        "model": {"depth": 8, "hidden_size": 1024, "num_heads": 16, "input_size": 32},
        "moe": {"pool": "rank"}, "train": {"global_batch_size": 256},
    }  # fmt: skip
    assert plan_of(big, 1).bound_by == "compute"


@pytest.mark.parametrize("mode", ["mlp", "block"])
@pytest.mark.parametrize(
    "settings",
    [DENSE, {}, {"moe": {"router": "expert_choice", "activation": "swiglu", "shared_experts": 1}}],
    ids=["dense", "global pool", "swiglu"],
)
def test_the_operations_that_backward_does_again_are_those_it_does_again(settings: Case, mode: str) -> None:
    plan = plan_of({**settings, "train": {"recompute": mode}}, 1)
    model = DiT(plan.config)
    initialize(model, 0)
    once = _flops(model)
    apply_recompute(model, plan.config.train.recompute)
    images = plan.config.train.global_batch_size
    expected = images * recomputed_flops(plan.config, plan.accounting, plan.work.capacity)
    assert _flops(model) - once == pytest.approx(expected)


def _flops(model: DiT) -> int:
    """Of a forward and a backward pass, the operations of matrix products and attention."""
    # torch counts no other kernel of attention on a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(16, 1, 8, 8), torch.rand(16), torch.zeros(16, dtype=torch.int64)).prediction.sum().backward()
    return counter.get_total_flops()


def test_recomputation_takes_time_and_is_no_arithmetic_of_the_model() -> None:
    big = {"model": {"hidden_size": 1024, "num_heads": 16, "input_size": 32}}
    once, again = (plan_of({**big, "train": {"recompute": mode}}, 1) for mode in ("none", "block"))
    assert again.seconds["arithmetic"] > 1.2 * once.seconds["arithmetic"]
    flops = [plan.mfu * plan.step_seconds for plan in (once, again)]
    assert flops[0] == pytest.approx(flops[1])
