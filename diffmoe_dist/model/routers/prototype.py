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
from diffmoe_dist.model.routing_losses import contrastive_loss


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
        # eq. 4, with alpha = 1
        x_TD = x_TD.float()
        cosine_TN = F.normalize(x_TD, dim=1) @ F.normalize(self.prototypes.float(), dim=1).T
        scores_TN = self._activate(cosine_TN)
        selection = self._select(scores_TN.detach(), null_T)
        losses = {}
        if self.training:
            losses["contrastive"] = self._contrastive_loss(x_TD, selection.chosen.float(), null_T)
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
            best_TK = best_experts(scores_TN, self.settings.top_k)
            chosen_TN = torch.zeros_like(scores_TN, dtype=torch.bool).scatter_(1, best_TK, True)
            chosen_TN &= ~null_T[:, None]
            return Selection(chosen=chosen_TN.T, pool_ranks=1, slots_per_expert=None)
        slots = expert_slots(self.tokens_per_sample, self.num_experts, self.settings.top_k)
        null_G = null_T.view(-1, self.tokens_per_sample)[:, 0]
        slots_GN = torch.where(null_G, 0, slots)[:, None].expand(-1, self.num_experts)
        return self.pool.select(scores_TN, slots_GN)

    def _contrastive_loss(self, x_TD: Tensor, chosen_NT: Tensor, null_T: Tensor) -> Tensor:
        """eq. 6: of the batch as a whole where tokens choose, as published of each image where experts do."""
        temperature = self.settings.contrastive_temperature
        if self.settings.variant == "token_choice":
            ones_T1 = torch.ones_like(x_TD[:, :1])
            sums = self.batch.sum(chosen_NT @ torch.cat([x_TD, ones_T1], dim=1))  # (N, D + 1): sums, then counts
            return contrastive_loss(self.prototypes.float(), sums[:, :-1], sums[:, -1], temperature)
        images = len(null_T) // self.tokens_per_sample
        chosen_GNS = chosen_NT.view(self.num_experts, images, -1).transpose(0, 1)
        sums_GND = chosen_GNS @ x_TD.view(images, self.tokens_per_sample, -1)
        losses_G = contrastive_loss(self.prototypes.float(), sums_GND, chosen_GNS.sum(dim=2), temperature)
        # Images without a condition have no tokens here and the loss 0; the mean is over the others, of all ranks.
        conditional = self.batch.sum((~null_T).sum()) / self.tokens_per_sample
        return losses_G.sum() * self.batch.ranks / conditional.clamp_min(1)
