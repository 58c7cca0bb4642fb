"""EC-DiT: every expert takes its best tokens of each image (DiffMoE Sec. 2.1, Alg. 1).

With a capacity predictor also the paper's dynamic intra-sample inference (its Table 8), where the number of tokens
that an expert takes of an image is predicted.
"""

from __future__ import annotations

from diffmoe_dist.config import Config
from diffmoe_dist.config.routers.expert_choice import Settings
from diffmoe_dist.model.pool_choice import PoolChoice
from diffmoe_dist.model.precision import MIXED
from diffmoe_dist.model.routing import LocalPool


def build_router(settings: Settings, config: Config) -> PoolChoice:
    pool = LocalPool(config.tokens_per_sample)
    mixed = config.precision == MIXED
    return PoolChoice(config.model.hidden_size, settings, pool, layers=len(config.moe_blocks), mixed=mixed)
