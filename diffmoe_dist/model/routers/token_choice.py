"""TC-DiT: every token takes its best experts (DiffMoE eq. 1-3, Alg. 2).

With balance_loss_weight 0 the baseline MoE, with 0.01 the load-balanced one.

Shape legend: T tokens, D width, N experts, K experts of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmoe_dist.config import Config
from diffmoe_dist.config.routers.token_choice import Settings
from diffmoe_dist.model.fp32_linear import fp32_linear
from diffmoe_dist.model.routing import Router, Routing, RoutingStats, Selection
from diffmoe_dist.model.routing_losses import balance_loss


def build_router(settings: Settings, config: Config) -> TokenChoice:
    return TokenChoice(config.model.hidden_size, settings)


class TokenChoice(Router):
    """The gate is the raw softmax value, not renormalised. Scores are computed in fp32."""

    def __init__(self, hidden_size: int, settings: Settings) -> None:
        super().__init__()
        self.num_experts = settings.num_experts
        self.top_k = settings.top_k
        self.gate_weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))

    def initial_weights(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Uniform within 1 / sqrt(D), as the published baseline."""
        return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])

    def forward(self, x_TD: Tensor, null_T: Tensor) -> Routing:
        scores_TN = fp32_linear(x_TD, self.gate_weight).softmax(dim=-1)
        best_TK = best_experts(scores_TN, self.top_k)
        chosen_TN = torch.zeros_like(scores_TN, dtype=torch.bool).scatter_(1, best_TK, True)
        # The number of assignments is known, so `nonzero`, and with it a wait for the device, is not needed.
        expert_index, by_expert = best_TK.flatten().sort(stable=True)
        counts_N = chosen_TN.sum(dim=0)
        losses = {}
        if self.training:
            picks_N = self.batch.sum(counts_N)
            losses["balance"] = balance_loss(scores_TN.mean(dim=0), picks_N.to(scores_TN.dtype) / picks_N.sum())
        selection = Selection(
            chosen=chosen_TN.T,
            pool_ranks=1,
            slots_per_expert=None,
            token_index=by_expert if self.top_k == 1 else by_expert // self.top_k,
            expert_index=expert_index,
        )
        capacity = torch.full((), float(self.top_k), device=x_TD.device)
        return Routing(scores_TN, losses, RoutingStats(counts_N, capacity), selection)


def best_experts(scores_TN: Tensor, top_k: int) -> Tensor:
    """(T, K) the experts with the highest scores, best first.

    Sorting is stable: equal scores go to the lower expert, also where topk would leave it open.
    """
    return scores_TN.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
