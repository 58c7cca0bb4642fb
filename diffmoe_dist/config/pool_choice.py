"""Settings of routers whose experts choose their tokens: what EC-DiT and DiffMoE have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from diffmoe_dist.config.require import require
from diffmoe_dist.config.router import RouterSettings, expert_slots
from diffmoe_dist.errors import UserError

PREDICTOR_DEFAULTS = {"capacity_loss_weight": 1.0, "threshold_decay": 0.95}


@dataclass(frozen=True)
class PoolChoiceSettings(RouterSettings):
    capacity: float = 1.0  # expert slots per token, C in the papers
    capacity_schedule: tuple[int, int] | None = None  # steps: C = N until the first, linearly down until the second
    inference: str = MISSING
    constant_threshold: float | None = None  # with inference=constant: gamma of DiffMoE eq. 16
    capacity_loss_weight: float | None = None
    threshold_decay: float | None = None

    def has_predictor(self) -> bool:
        raise NotImplementedError

    def nominal_capacity(self) -> float:
        return self.capacity

    def experts_per_token(self, pool_tokens: int) -> float:
        return self.num_experts * expert_slots(pool_tokens, self.num_experts, self.capacity) / pool_tokens

    def capacity_is_constant(self) -> bool:
        return self.capacity_schedule is None

    def load_is_constant(self) -> bool:
        return True

    def score_kinds(self) -> int:
        return 2 if self.has_predictor() else 1

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "capacity_predictor": self.has_predictor()}

    def check(self, tokens_per_sample: int) -> None:
        super().check(tokens_per_sample)
        self._check_predictor()
        for name in ("capacity_loss_weight", "constant_threshold"):
            require(self, "moe", name, lambda value: 0 <= value < math.inf, "0 or more, and finite")
        require(self, "moe", "threshold_decay", lambda value: 0 <= value < 1, "in [0, 1)")
        require(self, "moe", "capacity", lambda value: value > 0, "above 0")
        if self.capacity > self.num_experts:
            raise UserError(
                f"moe.capacity={self.capacity} is more than moe.num_experts={self.num_experts}: "
                "a token cannot pass through an expert twice; lower it"
            )
        schedule = self.capacity_schedule
        if schedule is not None and not 0 <= schedule[0] <= schedule[1]:
            raise UserError(f"moe.capacity_schedule={list(schedule)} must be two steps, the later one second")

    def _check_predictor(self) -> None:
        for name in PREDICTOR_DEFAULTS:
            if not self.has_predictor() and getattr(self, name) is not None:
                raise UserError(
                    f"moe.{name}={getattr(self, name)} has no effect without a capacity predictor; remove it"
                )
        if self.inference == "constant":
            if self.constant_threshold is None:
                raise UserError(
                    "moe.constant_threshold is not set, but moe.inference=constant; give it a value, such as 0.4"
                )
        elif self.constant_threshold is not None:
            raise UserError(
                f"moe.constant_threshold={self.constant_threshold} has no effect with moe.inference={self.inference}; "
                "remove it or set moe.inference=constant"
            )

    def check_pool(self, pool_tokens: int) -> None:
        if expert_slots(pool_tokens, self.num_experts, self.capacity) < 1:
            raise UserError(
                f"moe.capacity={self.capacity} gives each of moe.num_experts={self.num_experts} experts no slot in a "
                f"pool of {pool_tokens} tokens (moe.pool={self.pool_kind()}); raise the capacity or the batch"
            )

    def capacity_at(self, step: int) -> float:
        """C in optimizer step `step`, counted from 0 (the published code's schedule)."""
        if self.capacity_schedule is None:
            return self.capacity
        begin, end = self.capacity_schedule
        if step <= begin:
            return float(self.num_experts)
        left = (end - step) / (end - begin) if step < end else 0.0
        return self.capacity + left * (self.num_experts - self.capacity)
