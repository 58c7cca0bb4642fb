"""ProMoE: experts with prototypes, and images without a condition apart (ProMoE Sec. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from diffmoe_dist.config.require import require
from diffmoe_dist.config.router import RouterSettings, expert_slots
from diffmoe_dist.errors import UserError


@dataclass(frozen=True)
class Settings(RouterSettings):
    variant: Literal["token_choice", "expert_choice"] = "token_choice"
    top_k: int = 1
    scores: Literal["identity", "sigmoid", "softmax"] = "identity"  # of the cosines; they choose, and they are the gate
    contrastive_loss_weight: float = 1.0
    contrastive_temperature: float = 0.07
    # A shared and a routed expert of half the width do the work of one dense layer.
    shared_experts: int = 1
    expert_mlp_ratio: float = 2.0

    keeps_fp32_tokens = True
    has_unconditional_expert = True

    def shares_batch(self) -> bool:
        return self.contrastive_loss_weight > 0

    def structure(self) -> dict[str, Any]:
        names = ("variant", "top_k", "scores")
        return {**super().structure(), **{name: getattr(self, name) for name in names}}

    def nominal_capacity(self) -> float:
        return float(self.top_k)

    def experts_per_token(self, pool_tokens: int) -> float:
        if self.variant == "token_choice":
            return float(self.top_k)
        return self.num_experts * expert_slots(pool_tokens, self.num_experts, self.top_k) / pool_tokens

    def batch_sum_bytes(self, hidden_size: int) -> int:
        if self.variant == "expert_choice":
            return 8  # how many images have a condition
        return 4 * self.num_experts * (hidden_size + 1)  # the sum and the number of each prototype's tokens

    def saved_bytes(self, hidden_size: int, element: int) -> int:
        return 4 * hidden_size + 4 * self.num_experts  # normalised tokens, and who takes them

    def check(self, tokens_per_sample: int) -> None:
        super().check(tokens_per_sample)
        require(self, "moe", "contrastive_loss_weight", lambda value: 0 <= value < math.inf, "0 or more, and finite")
        require(self, "moe", "contrastive_temperature", lambda value: 0 < value < math.inf, "above 0 and finite")
        self.check_top_k(self.top_k)
        if self.variant == "expert_choice" and expert_slots(tokens_per_sample, self.num_experts, self.top_k) < 1:
            raise UserError(
                f"moe.top_k={self.top_k} gives each of moe.num_experts={self.num_experts} experts no slot among the "
                f"{tokens_per_sample} tokens of an image; lower moe.num_experts"
            )
