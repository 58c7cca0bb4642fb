"""Mixture-of-experts layers for tests: built from a router's settings alone, and called with conditional images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffmoe_dist.config.pool_choice import PoolChoiceSettings
from diffmoe_dist.model.pool_choice import PoolChoice
from diffmoe_dist.model.routing import LocalPool


def pool_choice(width: int, settings: PoolChoiceSettings, tokens_per_sample: int, layers: int = 1) -> PoolChoice:
    pool = LocalPool(tokens_per_sample if settings.pool_kind() == "sample" else None)
    return PoolChoice(width, settings, pool, layers)


def conditional(module: Any, x: Tensor) -> Any:
    """A layer or a router on images or tokens none of which has the null label."""
    return module(x, torch.zeros(len(x), dtype=torch.bool))
