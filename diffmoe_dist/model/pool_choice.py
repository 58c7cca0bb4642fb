"""Experts that choose their tokens from a pool: what EC-DiT (a pool for each image) and DiffMoE (one pool) share.

Shape legend: T local tokens, D width, N experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from diffmoe_dist.config import expert_slots
from diffmoe_dist.config.pool_choice import PoolChoiceSettings
from diffmoe_dist.model.fp32_linear import fp32_linear
from diffmoe_dist.model.precision import mixed_precision
from diffmoe_dist.model.routing import Router, Routing, Selection, TokenPool, route
from diffmoe_dist.model.routing_losses import capacity_loss, with_gradients_now


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

    def __init__(
        self, hidden_size: int, settings: PoolChoiceSettings, pool: TokenPool, layers: int, mixed: bool = False
    ) -> None:
        super().__init__()
        self.settings = settings
        self.num_experts = settings.num_experts
        self.inference = settings.inference
        self.pool = pool
        self.layers = layers  # that the capacity loss is the mean over
        self.mixed = mixed  # whether the predictor's first layer is in mixed precision
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
        scores_TN = fp32_linear(x_TD, self.gate_weight).softmax(dim=-1)
        if self.capacity_predictor is None:
            return route(scores_TN, self._select_slots(scores_TN.detach()), losses={})
        # eq. 10-11: the predictor learns from tokens, not the tokens from it.
        logits_TN = self._predict(x_TD.detach(), self.capacity_predictor)
        if not self.training:
            return route(scores_TN, self._select(scores_TN.detach(), logits_TN.detach()), losses={})
        selection = self._select_slots(scores_TN.detach(), logits_TN.detach())
        loss, gradient_TN = capacity_loss(logits_TN, selection.chosen.T, self.layers)
        predictor = self.capacity_predictor.parameters()
        losses = {"capacity": with_gradients_now(loss, logits_TN, gradient_TN, predictor)}
        assert selection.kth_largest is not None
        threshold_GN = selection.kth_largest.sigmoid()  # which has the same order as the logits; eq. 17
        threshold = threshold_GN.mean(dim=0) if len(threshold_GN) > 1 else threshold_GN[0]
        routing = route(scores_TN, selection, losses, proposed_threshold=threshold)
        return replace(routing, predicted_TN=logits_TN.detach())

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
        with mixed_precision(x_TD.device, self.mixed):
            hidden_TD = predictor[0](x_TD)
        return fp32_linear(hidden_TD, last.weight, last.bias, activation="silu")

    def _select_slots(self, scores_TN: Tensor, second_TN: Tensor | None = None) -> Selection:
        capacity = self.training_capacity if self.training else self.settings.capacity
        slots = expert_slots(self.pool.num_tokens(len(scores_TN)), self.num_experts, capacity)
        return self.pool.select(scores_TN, slots, second_TN, at_least_zero=True)

    def _select(self, scores_TN: Tensor, logits_TN: Tensor) -> Selection:
        if self.inference == "static":
            return self._select_slots(scores_TN)
        constant = self.settings.constant_threshold
        above_TN = logits_TN.sigmoid() > (self.threshold if constant is None else constant)  # eq. 14, eq. 16
        if self.inference == "threshold":
            return Selection(chosen=above_TN.T, pool_ranks=1, slots_per_expert=None)
        return self.pool.select(scores_TN, self.pool.count(above_TN))  # Alg. 4
