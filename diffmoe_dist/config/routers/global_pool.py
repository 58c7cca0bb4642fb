"""DiffMoE: every expert takes its best tokens from one pool over the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffmoe_dist.config.pool_choice import PREDICTOR_DEFAULTS, PoolChoiceSettings


@dataclass(frozen=True)
class Settings(PoolChoiceSettings):
    pool: Literal["global", "expert_parallel", "rank", "sample"] = "global"  # who competes for an expert's slots
    inference: Literal["threshold", "count", "static", "constant"] = "threshold"

    @classmethod
    def derived(cls, given: Any) -> dict[str, Any]:
        unset = {name: value for name, value in PREDICTOR_DEFAULTS.items() if given.moe[name] is None}
        return {**super().derived(given), **unset}

    def has_predictor(self) -> bool:
        return True

    def pool_kind(self) -> str:
        return self.pool
