"""DiffMoE: every expert takes its best tokens from one pool over the whole batch (DiffMoE Alg. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffmoe_dist.config import Config
from diffmoe_dist.model.pool_choice import PoolChoice, PoolChoiceSettings
from diffmoe_dist.model.routing import LocalPool


@dataclass
class Settings(PoolChoiceSettings):
    pool: Literal["global", "expert_parallel", "rank", "sample"] = "global"  # who competes for an expert's slots
    inference: Literal["threshold", "count", "static", "constant"] = "threshold"

    def has_predictor(self) -> bool:
        return True

    def pool_kind(self) -> str:
        return self.pool

    def build_router(self, config: Config) -> PoolChoice:
        assert config.model.hidden_size is not None
        pool = LocalPool(config.tokens_per_sample if self.pool == "sample" else None)
        return PoolChoice(config.model.hidden_size, self, pool, layers=len(config.moe_blocks))
