"""DiffMoE: every expert takes its best tokens from one pool over the whole batch (DiffMoE Alg. 3)."""

from __future__ import annotations

from diffmoe_dist.config import Config
from diffmoe_dist.config.routers.global_pool import Settings
from diffmoe_dist.model.pool_choice import PoolChoice
from diffmoe_dist.model.precision import MIXED
from diffmoe_dist.model.routing import LocalPool


def build_router(settings: Settings, config: Config) -> PoolChoice:
    pool = LocalPool(config.tokens_per_sample if settings.pool == "sample" else None)
    mixed = config.precision == MIXED
    return PoolChoice(config.model.hidden_size, settings, pool, layers=len(config.moe_blocks), mixed=mixed)
