"""Mixture-of-experts layers for tests: built from a router's settings alone, and called with conditional images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_dist.config.pool_choice import PoolChoiceSettings
from diffmoe_dist.model.moe import Experts, MoELayer
from diffmoe_dist.model.pool_choice import PoolChoice
from diffmoe_dist.model.routing import LocalPool


class PoolChoiceLayer(MoELayer):
    router: PoolChoice


def pool_choice(width: int, settings: PoolChoiceSettings, tokens_per_sample: int, layers: int = 1) -> PoolChoice:
    pool = LocalPool(tokens_per_sample if settings.pool_kind() == "sample" else None)
    return PoolChoice(width, settings, pool, layers)


def conditional(module: Any, x: Tensor) -> Any:
    """A layer or a router on images or tokens none of which has the null label."""
    return module(x, torch.zeros(len(x), dtype=torch.bool))


def gelu_expert(experts: Experts, expert: int, x: Tensor) -> Tensor:
    """(..., D) to (..., D): one of the experts, as two plain matrix products."""
    assert experts.b1 is not None and experts.b2 is not None
    hidden = F.gelu(x @ experts.w1[expert] + experts.b1[expert], approximate="tanh")
    return hidden @ experts.w2[expert] + experts.b2[expert]


def gradients(module: nn.Module) -> list[Tensor]:
    """A copy of every parameter's gradient, which each of them has."""
    found = [parameter.grad for parameter in module.parameters()]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]
