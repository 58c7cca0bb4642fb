"""EC-DiT: every expert takes its best tokens of each image (DiffMoE Sec. 2.1, Alg. 1).

With a capacity predictor also the paper's dynamic intra-sample inference (its Table 8), where the number of tokens
that an expert takes of an image is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffmoe_dist.config import Config
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.pool_choice import PoolChoice, PoolChoiceSettings
from diffmoe_dist.model.routing import LocalPool


@dataclass
class Settings(PoolChoiceSettings):
    capacity_predictor: bool = False
    inference: Literal["static", "threshold", "count", "constant"] | None = None

    def has_predictor(self) -> bool:
        return self.capacity_predictor

    def resolve(self, config: Config) -> None:
        if self.inference is None:
            self.inference = "threshold" if self.capacity_predictor else "static"
        super().resolve(config)
        if self.inference != "static" and not self.capacity_predictor:
            raise UserError(
                f"moe.inference={self.inference} needs the capacity predictor; set moe.capacity_predictor=true"
            )

    def build_router(self, config: Config) -> PoolChoice:
        assert config.model.hidden_size is not None
        pool = LocalPool(config.tokens_per_sample)
        return PoolChoice(config.model.hidden_size, self, pool, layers=len(config.moe_blocks))
