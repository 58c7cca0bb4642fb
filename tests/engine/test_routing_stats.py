"""What is told of routers in the steps that are logged, by brute force; and what of it is charted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from diffmoe_dist.config import build_config
from diffmoe_dist.engine.charts import Charts
from diffmoe_dist.engine.routing_stats import observed, routing_metrics
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.pool_choice import PoolChoice

SIZES = {"depth": 4, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "input_size": 8, "in_channels": 1}


def config_of(**moe: Any) -> Any:
    return build_config({"model": {**SIZES, "num_classes": 10}, "moe": {"num_experts": 4, **moe}}, training=False)


def test_the_metrics_of_routers_are_those_counted_token_by_token() -> None:
    model = DiT(config_of(router="global_pool", inference="threshold")).train()
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    routings: list[Any] = []
    for layer in model.moe_layers:
        assert isinstance(layer.router, PoolChoice)
        layer.router.threshold.fill_(0.45)
        layer.router.gate_weight.data.normal_(std=0.5, generator=generator)
        for parameter in layer.router.capacity_predictor.parameters():  # type: ignore[union-attr]
            parameter.data.normal_(std=0.3, generator=generator)
        layer.router.register_forward_hook(lambda router, inputs, routing: routings.append(routing))
    noise_B = torch.tensor([0.0, 0.05, 0.45, 0.5, 1.0, 0.99])
    with observed(model, noise_B) as found:
        output = model(torch.randn(6, 1, 8, 8, generator=generator), noise_B, torch.arange(6))
    load_LN = torch.stack([stats.tokens_per_expert for stats in output.routing]).double()
    metrics = routing_metrics(found.sums(), load_LN)

    chosen_LNT = np.stack([routing.pool.chosen.numpy() for routing in routings])
    logits_LTN = np.stack([routing.predicted_TN.numpy() for routing in routings])
    above_LNT = (1 / (1 + np.exp(-logits_LTN)) > 0.45).transpose(0, 2, 1)
    share_LTN = np.stack([routing.scores_TN.detach().numpy() for routing in routings])
    loads_LN = above_LNT.sum(axis=2)
    assert metrics["gate_entropy"] == pytest.approx(-(share_LTN * np.log(share_LTN)).sum(2).mean() / math.log(4), 1e-5)
    assert metrics["predictor_capacity"] == pytest.approx(above_LNT.sum(axis=1).mean())
    agreed = (above_LNT & chosen_LNT).sum((1, 2)) / (above_LNT | chosen_LNT).sum((1, 2))
    assert metrics["predictor_agreement"] == pytest.approx(agreed.mean())
    assert metrics["predictor_load_max"] == pytest.approx((loads_LN / loads_LN.mean(1, keepdims=True)).max())
    assert metrics["dead_experts"] == (loads_LN == 0).sum()
    of_image_LB = chosen_LNT.sum(axis=1).reshape(len(chosen_LNT), 6, -1).mean(axis=2)
    for level, images in {0.1: [0, 1], 0.5: [2, 3], 0.9: [4, 5]}.items():
        assert metrics[f"capacity_at_noise_{level}"] == pytest.approx(of_image_LB[:, images].mean())
    assert metrics["capacity_at_noise_0.3"] is None, "no image of the batch has so much noise"
    assert found.sums()["routing_gates"].sum() == chosen_LNT.sum()
    assert all(not layer.router._forward_hooks or len(layer.router._forward_hooks) == 1 for layer in model.moe_layers)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("variant", ["token_choice", "expert_choice"])
def test_the_unconditional_expert_counts_in_the_capacity_at_each_level_of_noise(variant: str, top_k: int) -> None:
    model = DiT(config_of(router="prototype", variant=variant, top_k=top_k)).train()
    initialize(model, seed=0)
    noise_B = torch.tensor([0.0, 0.05, 0.9, 0.95])
    with observed(model, noise_B) as found:
        output = model(torch.randn(4, 1, 8, 8), noise_B, torch.tensor([1, 10, 10, 10]))  # 10: no condition
    metrics = routing_metrics(found.sums(), torch.stack([stats.tokens_per_expert for stats in output.routing]).double())
    assert metrics["capacity_at_noise_0.1"] == (top_k + 1) / 2
    assert metrics["capacity_at_noise_0.9"] == 1
    assert float(output.routing[0].capacity) == (top_k + 3) / 4


@pytest.mark.parametrize(
    ("moe", "constant"),
    [
        ({"router": "global_pool"}, {"capacity", "expert_load_max"}),
        ({"router": "global_pool", "capacity_schedule": [2, 4]}, {"expert_load_max"}),
        ({"router": "expert_choice"}, {"capacity", "expert_load_max", "dead_experts", "capacity_at_noise_0.5"}),
        ({"router": "expert_choice", "capacity_schedule": [2, 4]}, {"expert_load_max", "dead_experts"}),
        ({"router": "token_choice"}, {"capacity", "capacity_at_noise_0.5"}),
        ({"router": "prototype"}, {"capacity", "capacity_at_noise_0.5"}),
        ({"router": "prototype", "top_k": 2}, set()),
        ({"router": "prototype", "top_k": 2, "unconditional_expert": False}, {"capacity", "capacity_at_noise_0.5"}),
    ],
)
def test_what_a_router_keeps_constant_is_no_chart_and_losses_come_first(
    moe: dict[str, Any], constant: set[str]
) -> None:
    names = ["capacity", "expert_load_max", "dead_experts", "capacity_at_noise_0.5"]
    charts = Charts(config_of(**moe))
    line = {"step": 3, "images_seen": 96, "lr": 1e-4, "bad_samples": 0, **dict.fromkeys(names, 1.0), "loss": 0.5}
    charted = charts.of({**line, "loss_val": 0.4, "fid_1k": 9.0, "skipped_steps": 1})
    assert list(charted)[:2] == ["loss/loss", "loss/loss_val"]
    assert {"optim/lr", "score/fid_1k", "health/skipped_steps"} <= set(charted)
    assert {name for name in names if f"moe/{name}" not in charted} == constant
    assert "data/bad_samples" not in charted and "data/bad_samples" in charts.of({**line, "bad_samples": 2})
    assert charts.of({**line, "bad_samples": 0})["data/bad_samples"] == 0, "a chart that has begun goes on"
