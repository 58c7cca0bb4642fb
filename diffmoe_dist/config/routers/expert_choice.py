"""EC-DiT: every expert takes its best tokens of each image, with a capacity predictor or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf

from diffmoe_dist.config.pool_choice import PREDICTOR_DEFAULTS, PoolChoiceSettings
from diffmoe_dist.errors import UserError


@dataclass(frozen=True)
class Settings(PoolChoiceSettings):
    capacity_predictor: bool = False
    inference: Literal["static", "threshold", "count", "constant"] = MISSING  # threshold with a predictor, else static

    @classmethod
    def derived(cls, given: Any) -> dict[str, Any]:
        derived, moe = super().derived(given), given.moe
        if OmegaConf.is_missing(moe, "inference"):
            derived["inference"] = "threshold" if moe.capacity_predictor else "static"
        if moe.capacity_predictor:
            derived |= {name: value for name, value in PREDICTOR_DEFAULTS.items() if moe[name] is None}
        return derived

    def has_predictor(self) -> bool:
        return self.capacity_predictor

    def check(self, tokens_per_sample: int) -> None:
        super().check(tokens_per_sample)
        if self.inference != "static" and not self.capacity_predictor:
            raise UserError(
                f"moe.inference={self.inference} needs the capacity predictor; set moe.capacity_predictor=true"
            )
