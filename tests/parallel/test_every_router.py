"""Every router, its experts sharded over ranks, against the same model on one device with the whole batch."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.dit import DiT, DiTOutput
from tests.distributed import run_ranks
from tests.parallel.weights import fill_by_name, small_config

IMAGES, EXPERTS = 8, 4
LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]  # (ranks, expert-parallel size)
# The last two images have no condition: on four ranks, one rank has no other.
LABELS = [0, 5, 1, 2, 3, 0, 5, 5]
ROUTERS: dict[str, dict[str, Any]] = {
    "token_choice": {"router": "token_choice", "top_k": 2, "balance_loss_weight": 0.01},
    "expert_choice": {"router": "expert_choice"},
    "expert_choice_dynamic": {"router": "expert_choice", "capacity_predictor": True, "inference": "count"},
    "global_pool": {"router": "global_pool", "inference": "constant", "constant_threshold": 0.5},
    "swiglu": {"router": "global_pool", "activation": "swiglu", "shared_experts": 2, "inference": "count"},
    "prototype": {"router": "prototype", "balance_loss_weight": 0.1},
    "prototype_top_2": {
        "router": "prototype", "top_k": 2, "scores": "softmax", "activation": "swiglu", "contrastive_tokens": "first",
        "balance_loss_weight": 0.1, "unconditional_expert": False, "blocks": [0, 3],
    },
    "prototype_expert_choice": {"router": "prototype", "variant": "expert_choice", "scores": "sigmoid"},
}  # fmt: skip
NORMED = {"qk_norm": "layer", "head_dim": 6, "activation": "swiglu"}


def make_config(name: str, expert: int) -> Config:
    model = {"depth": 4, "hidden_size": 16, "input_size": 8, **(NORMED if name == "swiglu" else {})}
    return small_config(model, {"num_experts": EXPERTS, **ROUTERS[name]}, {"expert": expert})


@torch.no_grad()
def fill(model: DiT) -> DiT:
    fill_by_name(model, EXPERTS)
    for layer in model.moe_layers:
        if hasattr(layer.router, "threshold"):
            layer.router.get_buffer("threshold").copy_(torch.tensor([0.5, 0.6, 1.0, 0.0]))
    return model


def run_training(model: DiT, part: slice, ranks: int) -> DiTOutput:
    """Forward and backward of a part of the batch."""
    output = model(*inputs(part))
    loss = output.prediction.square().mean()
    for value in output.losses.values():
        loss = loss + value
    (loss / ranks).backward()
    return output


def inputs(part: slice) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(IMAGES, 3, 8, 8, generator=generator), torch.rand(IMAGES, generator=generator)
    return x[part], t[part], torch.tensor(LABELS)[part]


def run(model: DiT, part: slice, ranks: int) -> dict[str, Any]:
    """Forward and backward in training, and forward in evaluation, of a part of the batch."""
    output = run_training(model.train(), part, ranks)
    return {
        "prediction": output.prediction.detach(),
        "losses": {name: value.detach() for name, value in output.losses.items()},
        "load": torch.stack([stats.tokens_per_expert for stats in output.routing]),
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "evaluated": model.eval()(*inputs(part)).prediction.detach(),
    }


def all_cases_on_ranks(rank: int, world_size: int) -> dict[Any, Any]:
    from diffmoe_dist.parallel.expert_parallel import apply_expert_parallel, create_topology

    results: dict[Any, Any] = {}
    part = slice(rank * IMAGES // world_size, (rank + 1) * IMAGES // world_size)
    for expert in [expert for ranks, expert in LAYOUTS if ranks == world_size]:
        topology = create_topology(Launch(rank, world_size, rank, "environment"), torch.device("cpu"), expert)
        for name in ROUTERS:
            config = make_config(name, expert)
            model = DiT(config)
            apply_expert_parallel(model, config, topology)
            result = run(fill(model), part, world_size)
            for parameter, gradient in result["gradients"].items():
                group = topology.expert_data_group if ".experts." in parameter else topology.world_group
                dist.all_reduce(gradient, group=group)
            results[expert, name] = result
    return results


@cache
def results_of(ranks: int) -> list[dict[Any, Any]]:
    return run_ranks(ranks, all_cases_on_ranks)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: object) -> None:
    # What is added to all keys changes no softmax, so this gradient is zero but for rounding.
    smallest = 1e-3 if str(what).endswith("k_norm.bias") else 1e-30
    scale = expected.abs().max().clamp_min(smallest)
    assert float((actual - expected).abs().max() / scale) <= tolerance, what


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "expert"), LAYOUTS)
@pytest.mark.parametrize("name", ROUTERS)
def test_a_model_on_ranks_predicts_learns_and_evaluates_as_on_one_device(name: str, ranks: int, expert: int) -> None:
    case = [result[expert, name] for result in results_of(ranks)]
    single = run(fill(DiT(make_config(name, 1))), slice(None), 1)
    # fp32, several layers deep; dense layers may round differently for another batch size.
    for key in ("prediction", "evaluated"):
        assert_close(torch.cat([result[key] for result in case]), single[key], 1e-5, key)
    assert torch.equal(sum(result["load"] for result in case), single["load"])
    for loss, value in single["losses"].items():
        mean = torch.stack([result["losses"][loss] for result in case]).mean()
        assert_close(mean, value, 1e-5, loss)
    for rank, result in enumerate(case):
        assert result["gradients"].keys() == single["gradients"].keys()
        for parameter, gradient in result["gradients"].items():
            expected = single["gradients"][parameter]
            if ".experts." in parameter:
                held = EXPERTS // expert
                expected = expected[rank % expert * held :][:held]
            assert_close(gradient, expected, 2e-4, parameter)


@pytest.mark.parametrize("name", ["token_choice", "prototype", "prototype_expert_choice"])
def test_the_losses_of_the_batch_are_not_those_of_its_parts(name: str) -> None:
    # Else the test above would pass for a loss that each rank works out of its own images.
    parts = [run(fill(DiT(make_config(name, 1))), slice(2 * r, 2 * r + 2), 1)["losses"] for r in range(4)]
    whole = run(fill(DiT(make_config(name, 1))), slice(None), 1)["losses"]
    for loss, value in whole.items():
        apart = torch.stack([losses[loss] for losses in parts]).mean()
        assert abs(float(apart / value) - 1) > 1e-2, loss
