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
    # With top_k above 1, the tokens whose mean a prototype is drawn to: all that chose its expert, or those that rank
    # it first.
    contrastive_tokens: Literal["chosen", "first"] = "chosen"
    balance_loss_weight: float | None = None  # of token choice: as moe.router=token_choice has it, of routed tokens
    unconditional_expert: bool = True  # takes the tokens of images without a condition, in the place of routed experts
    # A shared and a routed expert of half the width do the work of one dense layer.
    shared_experts: int = 1
    expert_mlp_ratio: float = 2.0

    keeps_fp32_tokens = True

    def shares_batch(self) -> bool:
        return self.contrastive_loss_weight > 0 or (self.balance_loss_weight or 0) > 0

    def structure(self) -> dict[str, Any]:
        names = ("variant", "top_k", "scores", "unconditional_expert")
        return {**super().structure(), **{name: getattr(self, name) for name in names}}

    def nominal_capacity(self) -> float:
        return float(self.top_k)

    def experts_per_token(self, pool_tokens: int) -> float:
        if self.variant == "token_choice":
            return float(self.top_k)
        return self.num_experts * expert_slots(pool_tokens, self.num_experts, self.top_k) / pool_tokens

    def capacity_is_constant(self) -> bool:
        return not self.unconditional_expert or self.top_k == 1  # a token of the unconditional expert has that alone

    def load_is_constant(self) -> bool:
        return self.variant == "expert_choice"

    def batch_sum_bytes(self, hidden_size: int) -> int:
        if self.variant == "expert_choice":
            return 8  # how many images have a condition
        balance = 0 if self.balance_loss_weight is None else 3  # scores, picks, and tokens that are routed
        return 4 * self.num_experts * (hidden_size + 1 + balance)  # the sum and the number of each prototype's tokens

    def saved_bytes(self, hidden_size: int, element: int) -> int:
        softmax = 0 if self.balance_loss_weight is None else 4 * self.num_experts
        return 4 * hidden_size + 4 * self.num_experts + softmax  # normalised tokens, and who takes them

    def check(self, tokens_per_sample: int) -> None:
        super().check(tokens_per_sample)
        require(self, "moe", "contrastive_loss_weight", lambda value: 0 <= value < math.inf, "0 or more, and finite")
        require(self, "moe", "contrastive_temperature", lambda value: 0 < value < math.inf, "above 0 and finite")
        require(self, "moe", "balance_loss_weight", lambda value: 0 <= value < math.inf, "0 or more, and finite")
        self.check_top_k(self.top_k)
        self._check_effects()
        if self.variant == "expert_choice" and expert_slots(tokens_per_sample, self.num_experts, self.top_k) < 1:
            raise UserError(
                f"moe.top_k={self.top_k} gives each of moe.num_experts={self.num_experts} experts no slot among the "
                f"{tokens_per_sample} tokens of an image; lower moe.num_experts"
            )

    def _check_effects(self) -> None:
        """Refuse what only token choice with several experts a token has, and what a loss has that is turned off."""
        temperature = self.contrastive_temperature
        if self.contrastive_loss_weight == 0 and temperature != Settings.contrastive_temperature:
            raise UserError(
                f"moe.contrastive_temperature={temperature} has no effect with moe.contrastive_loss_weight=0; remove it"
            )
        if self.balance_loss_weight is not None and self.variant == "expert_choice":
            raise UserError(
                f"moe.balance_loss_weight={self.balance_loss_weight} has no effect with moe.variant=expert_choice, "
                "whose experts all take as many tokens; remove it"
            )
        if self.contrastive_tokens == "chosen":
            return
        for name, value in (("variant", "expert_choice"), ("top_k", 1), ("contrastive_loss_weight", 0)):
            if getattr(self, name) == value:
                raise UserError(
                    f"moe.contrastive_tokens={self.contrastive_tokens} has no effect with moe.{name}={value}; remove it"
                )
