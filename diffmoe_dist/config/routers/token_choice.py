"""TC-DiT: every token takes its best experts (DiffMoE eq. 1-3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffmoe_dist.config.require import require
from diffmoe_dist.config.router import RouterSettings


@dataclass(frozen=True)
class Settings(RouterSettings):
    top_k: int = 1  # experts a token chooses
    balance_loss_weight: float = 0.0

    def shares_batch(self) -> bool:
        return self.balance_loss_weight > 0

    def nominal_capacity(self) -> float:
        return float(self.top_k)

    def capacity_is_constant(self) -> bool:
        return True

    def batch_sum_bytes(self, hidden_size: int) -> int:
        return 8 * self.num_experts  # how often each was picked

    def check(self, tokens_per_sample: int) -> None:
        super().check(tokens_per_sample)
        require(self, "moe", "balance_loss_weight", lambda value: 0 <= value < math.inf, "0 or more, and finite")
        self.check_top_k(self.top_k)
