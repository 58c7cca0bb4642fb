"""Experts that choose their tokens from a pool: what EC-DiT (a pool for each image) and DiffMoE (one pool) share.

Shape legend: T local tokens, D width, N experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_dist.config import Config, RouterSettings, expert_slots, require
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.routing import Router, Routing, Selection, TokenPool, route
from diffmoe_dist.model.routing_losses import capacity_loss

_PREDICTOR_DEFAULTS = {"capacity_loss_weight": 1.0, "threshold_decay": 0.95}


@dataclass
class PoolChoiceSettings(RouterSettings):
    capacity: float = 1.0  # expert slots per token, C in the papers
    capacity_schedule: tuple[int, int] | None = None  # steps: C = N until the first, linearly down until the second
    inference: str | None = None
    constant_threshold: float | None = None  # with inference=constant: gamma of DiffMoE eq. 16
    capacity_loss_weight: float | None = None
    threshold_decay: float | None = None

    def has_predictor(self) -> bool:
        raise NotImplementedError

    def nominal_capacity(self) -> float:
        return self.capacity

    def visits(self, pool_tokens: int) -> float:
        assert self.num_experts is not None
        return self.num_experts * expert_slots(pool_tokens, self.num_experts, self.capacity) / pool_tokens

    def score_kinds(self) -> int:
        return 2 if self.has_predictor() else 1

    def saved_bytes(self, hidden_size: int, element: int) -> int:
        assert self.num_experts is not None
        return hidden_size * element + 4 * hidden_size + 8 * self.num_experts if self.has_predictor() else 0

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "capacity_predictor": self.has_predictor()}

    def resolve(self, config: Config) -> None:
        super().resolve(config)
        self._resolve_predictor()
        for name in ("capacity_loss_weight", "constant_threshold"):
            require(self, "moe", name, lambda value: value >= 0, "0 or more")
        require(self, "moe", "threshold_decay", lambda value: 0 <= value < 1, "in [0, 1)")
        require(self, "moe", "capacity", lambda value: value > 0, "above 0")
        assert self.num_experts is not None
        if self.capacity > self.num_experts:
            raise UserError(
                f"moe.capacity={self.capacity} is more than moe.num_experts={self.num_experts}: "
                "a token cannot visit an expert twice; lower it"
            )
        schedule = self.capacity_schedule
        if schedule is not None and not 0 <= schedule[0] <= schedule[1]:
            raise UserError(f"moe.capacity_schedule={list(schedule)} must be two steps, the later one second")

    def _resolve_predictor(self) -> None:
        for name, default in _PREDICTOR_DEFAULTS.items():
            if not self.has_predictor() and getattr(self, name) is not None:
                raise UserError(
                    f"moe.{name}={getattr(self, name)} has no effect without a capacity predictor; remove it"
                )
            if self.has_predictor() and getattr(self, name) is None:
                setattr(self, name, default)
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
        assert self.num_experts is not None
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
        if step < begin:
            return float(self.num_experts or 0)
        left = max(end - step, 0) / max(end - begin, 1)
        return self.capacity + left * ((self.num_experts or 0) - self.capacity)


class PoolChoice(Router):
    """Every expert takes the int(T / N * C) tokens of a pool that score highest (DiffMoE Alg. 1 and 3).

    The gate is the softmax over the experts. A capacity predictor, where there is one, learns which tokens each expert
    takes; at inference it decides how many each gets:

    - `threshold`: a token goes to the experts whose predicted score exceeds the expert's threshold (eq. 14 as
      printed). No token depends on its batch mates.
    - `count`: as many tokens of the pool as exceed the threshold, but those with the highest gate (Alg. 4, the
      published code). A token depends on its batch mates.
    - `constant`: as `count`, with one constant in the place of all thresholds (eq. 16).
    - `static`: int(T / N * C) tokens of the pool, as in training.

    Scores are computed in fp32 whatever the precision of the model.
    """

    threshold: Tensor
    threshold_updates: Tensor

    def __init__(self, hidden_size: int, settings: PoolChoiceSettings, pool: TokenPool, layers: int) -> None:
        super().__init__()
        assert settings.num_experts is not None and settings.inference is not None
        self.settings = settings
        self.num_experts = settings.num_experts
        self.inference = settings.inference
        self.pool = pool
        self.layers = layers  # that the capacity loss is the mean over
        self.training_capacity = settings.capacity_at(0)
        self.gate_weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))
        self.capacity_predictor: nn.Sequential | None = None
        if settings.has_predictor():
            self.capacity_predictor = nn.Sequential(
                nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, self.num_experts)
            )
            self.register_buffer("threshold", torch.zeros(self.num_experts))
            self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))

    def start_step(self, step: int) -> None:
        self.training_capacity = self.settings.capacity_at(step)

    def end_schedule(self) -> None:
        self.training_capacity = self.settings.capacity

    def forward(self, x_TD: Tensor, null_T: Tensor) -> Routing:
        # Alg. 3: the affinity of eq. 5 with a softmax over the experts.
        scores_TN = F.linear(x_TD.float(), self.gate_weight.float()).softmax(dim=-1)
        if self.capacity_predictor is None:
            return route(scores_TN, self._select_slots(scores_TN.detach()), losses={})
        # eq. 10-11: the predictor learns from tokens, not the tokens from it.
        logits_TN = self._predict(x_TD.detach(), self.capacity_predictor)
        predicted_TN = logits_TN.detach().sigmoid()
        if not self.training:
            return route(scores_TN, self._select(scores_TN.detach(), predicted_TN), losses={})
        selection = self._select_slots(scores_TN.detach(), predicted_TN.nan_to_num(nan=0.0))
        # eq. 12: the mean over the layers; the model adds its layers' losses up.
        losses = {"capacity": capacity_loss(logits_TN, selection.chosen.T) / self.layers}
        return route(scores_TN, selection, losses, proposed_threshold=selection.kth_largest)  # eq. 17

    @torch.no_grad()
    def update_threshold(self, proposal: Tensor) -> None:
        """Take one step of the bias-corrected moving average of eq. 17; once per optimizer step, by the engine.

        Args:
            proposal: (N,) fp32, the same on every rank.
        """
        assert self.threshold.dtype == torch.float32, "thresholds stay in fp32"
        assert self.settings.threshold_decay is not None
        self.threshold_updates += 1
        # Written on the corrected average itself: the first proposal counts fully, later ones tend to 1 - decay.
        decay = self.settings.threshold_decay
        weight = (1 - decay) / (1 - decay ** self.threshold_updates.double())
        self.threshold.lerp_(proposal, weight.to(self.threshold.dtype))

    def _predict(self, x_TD: Tensor, predictor: nn.Sequential) -> Tensor:
        """(T, N) fp32 logits. The last layer is computed in fp32: at bf16's resolution scores would tie in crowds."""
        last = predictor[-1]
        assert isinstance(last, nn.Linear)
        return F.linear(predictor[:-1](x_TD).float(), last.weight.float(), last.bias.float())

    def _select_slots(self, scores_TN: Tensor, second_TN: Tensor | None = None) -> Selection:
        capacity = self.training_capacity if self.training else self.settings.capacity
        slots = expert_slots(self.pool.num_tokens(len(scores_TN)), self.num_experts, capacity)
        return self.pool.select(sortable(scores_TN), slots, second_TN)

    def _select(self, scores_TN: Tensor, predicted_TN: Tensor) -> Selection:
        if self.inference == "static":
            return self._select_slots(scores_TN)
        constant = self.settings.constant_threshold
        above_TN = predicted_TN > (self.threshold if constant is None else constant)  # eq. 14, eq. 16
        if self.inference == "threshold":
            return Selection(chosen=above_TN.T, pool_ranks=1, slots_per_expert=None)
        return self.pool.select(sortable(scores_TN), self.pool.count(above_TN))  # Alg. 4


def sortable(scores_TN: Tensor) -> Tensor:
    """NaN sent to the end of the order, where it has no place of its own.

    So the choice stays well defined on every rank, and the NaN still reaches the loss through the gate.
    """
    return scores_TN.nan_to_num(nan=-torch.inf)
