"""ProMoE: experts with prototypes, and images without a condition apart (ProMoE Sec. 4).

Conditional routing sends the tokens of images with the null label to the unconditional expert (step 1); the others go
to the experts whose prototypes they resemble (step 2). `variant` says who chooses: each token its experts, or each
expert its int(S / N * K) tokens of each image (the published expert-choice variant, which no paper describes).

Shape legend: T local tokens (S of each of G images), D width, N experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_dist.config import Config, expert_slots
from diffmoe_dist.config.routers.prototype import Settings
from diffmoe_dist.model.routers.token_choice import best_experts
from diffmoe_dist.model.routing import LocalPool, Router, Routing, Selection, route
from diffmoe_dist.model.routing_losses import balance_loss, contrastive_loss


def build_router(settings: Settings, config: Config) -> PrototypeRouter:
    return PrototypeRouter(config.model.hidden_size, settings, config.tokens_per_sample)


class PrototypeRouter(Router):
    """Scores and the contrastive loss are computed in fp32."""

    def __init__(self, hidden_size: int, settings: Settings, tokens_per_sample: int) -> None:
        super().__init__()
        self.settings = settings
        self.num_experts = settings.num_experts
        self.tokens_per_sample = tokens_per_sample
        self.pool = LocalPool(tokens_per_sample)
        self.prototypes = nn.Parameter(torch.empty(self.num_experts, hidden_size))

    def initial_weights(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """N(0, 0.02), as published."""
        return torch.randn(shape, generator=generator) * 0.02

    def forward(self, x_TD: Tensor, null_T: Tensor) -> Routing:
        if not self.settings.unconditional_expert:
            null_T = torch.zeros_like(null_T)  # routed as all others
        # eq. 4, with alpha = 1
        x_TD = x_TD.float()
        cosine_TN = F.normalize(x_TD, dim=1) @ F.normalize(self.prototypes.float(), dim=1).T
        scores_TN = self._activate(cosine_TN)
        selection = self._select(scores_TN.detach(), null_T)
        losses = {}
        if self.training and self.settings.variant == "token_choice":
            losses = self._losses_of_batch(x_TD, scores_TN, selection.chosen, null_T)
        elif self.training:
            losses = {"contrastive": self._loss_of_images(x_TD, selection.chosen.float(), null_T)}
        routing = route(scores_TN, selection, losses)
        capacity = routing.stats.capacity + null_T.float().mean()  # the unconditional expert's work counts as well
        return replace(routing, stats=replace(routing.stats, capacity=capacity))

    def _activate(self, cosine_TN: Tensor) -> Tensor:
        if self.settings.scores == "softmax":
            if self.settings.variant == "token_choice":
                return cosine_TN.softmax(dim=1)
            # Experts that choose compare the tokens of an image.
            return cosine_TN.view(-1, self.tokens_per_sample, self.num_experts).softmax(dim=1).view_as(cosine_TN)
        return cosine_TN.sigmoid() if self.settings.scores == "sigmoid" else cosine_TN

    def _select(self, scores_TN: Tensor, null_T: Tensor) -> Selection:
        if self.settings.variant == "token_choice":
            chosen_NT = self._choose(scores_TN, self.settings.top_k, null_T)
            return Selection(chosen=chosen_NT, pool_ranks=1, slots_per_expert=None)
        slots = expert_slots(self.tokens_per_sample, self.num_experts, self.settings.top_k)
        null_G = null_T.view(-1, self.tokens_per_sample)[:, 0]
        slots_GN = torch.where(null_G, 0, slots)[:, None].expand(-1, self.num_experts)
        return self.pool.select(scores_TN, slots_GN)

    def _choose(self, scores_TN: Tensor, top_k: int, null_T: Tensor) -> Tensor:
        """(N, T) bool, the best experts of each token that is routed."""
        chosen_TN = torch.zeros_like(scores_TN, dtype=torch.bool).scatter_(1, best_experts(scores_TN, top_k), True)
        return (chosen_TN & ~null_T[:, None]).T

    def _losses_of_batch(self, x_TD: Tensor, scores_TN: Tensor, chosen_NT: Tensor, null_T: Tensor) -> dict[str, Tensor]:
        """Of the batch as a whole, where tokens choose: eq. 6, and the load balance of the tokens that are routed."""
        first = self.settings.contrastive_tokens == "first"
        drawn_NT = self._choose(scores_TN.detach(), 1, null_T) if first else chosen_NT
        ones_T1 = torch.ones_like(x_TD[:, :1])
        sums = drawn_NT.float() @ torch.cat([x_TD, ones_T1], dim=1)  # (N, D + 1): sums, then counts
        if self.settings.balance_loss_weight is None:
            sums = self.batch.sum(sums)
            balance = {}
        else:
            softmax_TN = scores_TN if self.settings.scores == "softmax" else scores_TN.softmax(dim=1)
            routed_T = (~null_T).float()
            # Not every rank has as many tokens that are routed, so their number is summed beside their scores.
            columns = [routed_T @ softmax_TN, chosen_NT.sum(dim=1), routed_T.sum().expand(self.num_experts)]
            sums = self.batch.sum(torch.cat([sums, torch.stack(columns, dim=1)], dim=1))
            sums, (scores_N, picks_N, tokens_N) = sums[:, :-3], sums[:, -3:].unbind(dim=1)
            fraction_N = picks_N / picks_N.sum().clamp_min(1)  # no image may have a condition
            balance = {"balance": balance_loss(scores_N / tokens_N.clamp_min(1), fraction_N)}
        temperature = self.settings.contrastive_temperature
        loss = contrastive_loss(self.prototypes.float(), sums[:, :-1], sums[:, -1], temperature)
        return {"contrastive": loss, **balance}

    def _loss_of_images(self, x_TD: Tensor, chosen_NT: Tensor, null_T: Tensor) -> Tensor:
        """eq. 6, as published of each image where experts choose."""
        temperature = self.settings.contrastive_temperature
        images = len(null_T) // self.tokens_per_sample
        chosen_GNS = chosen_NT.view(self.num_experts, images, -1).transpose(0, 1)
        sums_GND = chosen_GNS @ x_TD.view(images, self.tokens_per_sample, -1)
        losses_G = contrastive_loss(self.prototypes.float(), sums_GND, chosen_GNS.sum(dim=2), temperature)
        # Images without a condition have no tokens here and the loss 0; the mean is over the others, of all ranks.
        conditional = self.batch.sum((~null_T).sum()) / self.tokens_per_sample
        return losses_G.sum() * self.batch.ranks / conditional.clamp_min(1)
