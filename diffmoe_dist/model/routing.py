"""Who computes what: a router decides which experts see which tokens.

A router returns one value, a `Routing`; dispatchers and experts know nothing else of it. Choosing the best tokens of
a pool is the business of a token pool: `LocalPool` is the one of a single device, and `parallel.pool` has the one
that spans ranks; both choose exactly the same tokens from the same scores.

Shape legend: T local tokens (row-major over images), D width, N experts, A assignments of a token to an expert,
G pools side by side on this device (1, or one per image), P tokens of one pool, E columns (experts) at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_dist.config import MoEConfig, expert_slots
from diffmoe_dist.model.routing_losses import balance_loss, capacity_loss


@dataclass(frozen=True)
class RoutingStats:
    """What a forward pass has to report; detached from the graph."""

    tokens_per_expert: Tensor  # (N,) int64, assignments of this device's tokens
    capacity: Tensor  # () fp32, assignments per local token: C of DiffMoE eq. 8-9
    proposed_threshold: Tensor | None = None  # (N,) fp32, this batch's capacity thresholds


@dataclass(frozen=True)
class Routing:
    """The whole decision of a router about this device's tokens."""

    token_index: Tensor  # (A,) row of the flattened local tokens (T, D); ascending within an expert
    expert_index: Tensor  # (A,) global expert id, non-decreasing
    gate: Tensor  # (A,) fp32 combine weight, carries gradient
    losses: dict[str, Tensor]  # named, unweighted fp32 scalars
    stats: RoutingStats
    pool: Selection  # how many tokens of the pool reach each expert, as far as that is known


@dataclass(frozen=True)
class Selection:
    """The tokens that a pool chose, seen from one device."""

    chosen: Tensor  # (N, T) bool, for the local tokens
    pool_ranks: int  # ranks whose tokens competed in one pool
    slots_per_expert: int | None  # tokens of these ranks that reach every expert; None: it varies
    arrivals: Tensor | None = None  # (pool_ranks, N / pool_ranks) how many each rank sends to my share of experts
    kth_largest: Tensor | None = None  # (N,) the slots-th largest of the second scores, see TokenPool.select


class TokenPool(Protocol):
    """The tokens that compete for the slots of an expert."""

    def num_tokens(self, local_tokens: int) -> int:
        """Tokens in one pool, given this device's token count."""
        ...

    def count(self, flags_TN: Tensor) -> Tensor:
        """How many tokens of each pool are flagged, (G, N) int64."""
        ...

    def select(self, scores_TN: Tensor, slots: int | Tensor, second_TN: Tensor | None = None) -> Selection:
        """For each expert, the `slots` tokens of the pool with the highest fp32 scores.

        Equal scores go to the lower global token id, so the choice is a function of the pool alone. `slots` is one
        number for all experts or (G, N). With `second_TN` and one number, also report the slots-th largest
        of each column of these other scores over the pool (mean over the pools, where there are several).
        """
        ...


class LocalPool:
    """One pool over all tokens of this device, or one pool per image."""

    def __init__(self, tokens_per_pool: int | None = None) -> None:
        self.tokens_per_pool = tokens_per_pool  # None: every token at hand

    def num_tokens(self, local_tokens: int) -> int:
        return self.tokens_per_pool or local_tokens

    def count(self, flags_TN: Tensor) -> Tensor:
        return self._split(flags_TN).sum(dim=2)

    def select(self, scores_TN: Tensor, slots: int | Tensor, second_TN: Tensor | None = None) -> Selection:
        scores_GNP = self._split(scores_TN)
        cutoff, ties = cutoffs(scores_GNP, slots)
        chosen = keep(scores_GNP, cutoff, ties)
        kth = None
        if second_TN is not None:
            assert isinstance(slots, int)
            kth = kth_largest(self._split(second_TN), slots).mean(dim=0)
        pools = len(scores_GNP)
        return Selection(
            chosen=chosen.transpose(0, 1).reshape(scores_TN.shape[1], -1),
            pool_ranks=1,
            slots_per_expert=pools * slots if isinstance(slots, int) else None,
            kth_largest=kth,
        )

    def _split(self, values_TN: Tensor) -> Tensor:
        """(T, N) to (G, N, P), contiguous in P."""
        tokens, experts = values_TN.shape
        return values_TN.view(-1, self.num_tokens(tokens), experts).transpose(1, 2).contiguous()


def cutoffs(scores: Tensor, slots: int | Tensor) -> tuple[Tensor, Tensor]:
    """The score of the last slot, and how many tokens with just that score still have one.

    Args:
        scores: (..., P) fp32.
        slots: one number, or one per row, between 0 and P.

    Returns:
        (...) fp32 and (...) int64. A row without slots has cutoff +inf and no ties.
    """
    if isinstance(slots, int) and slots > 0:
        cutoff = kth_largest(scores, slots)
        left = slots - (scores > cutoff[..., None]).sum(dim=-1)
        return cutoff, left
    slots = torch.as_tensor(slots, device=scores.device).expand(scores.shape[:-1])
    ranked = scores.sort(dim=-1, descending=True).values
    last = ranked.gather(-1, (slots - 1).clamp_min(0)[..., None])[..., 0]
    cutoff = torch.where(slots > 0, last, torch.inf)
    return cutoff, slots - (scores > cutoff[..., None]).sum(dim=-1)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """(..., P) to (...), the k-th largest of each row."""
    return values.topk(k, dim=-1, sorted=False).values.amin(dim=-1)


def keep(scores: Tensor, cutoff: Tensor, ties: Tensor) -> Tensor:
    """(..., P) bool: everything above the cutoff, and the first `ties` places that equal it."""
    equal = scores == cutoff[..., None]
    return (scores > cutoff[..., None]) | (equal & (equal.cumsum(dim=-1) <= ties[..., None]))


class Router(nn.Module):
    """Decides about tokens (T, D). `pool` may be replaced by one that spans ranks, and the router never notices."""

    pool: TokenPool

    def forward(self, x_TD: Tensor) -> Routing:
        raise NotImplementedError

    def initial_gate(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The gate's weights at the start: N(0, 0.006)."""
        return torch.randn(shape, generator=generator) * 0.006

    def update_threshold(self, proposal: Tensor) -> None:
        """Take in the proposed thresholds of an optimizer step; for routers that propose some."""
        raise NotImplementedError


def build_router(hidden_size: int, config: MoEConfig, tokens_per_sample: int) -> Router:
    """The router that the configuration names."""
    if config.router == "token_choice":
        return TokenChoiceRouter(hidden_size, config)
    if config.router == "expert_choice":
        return ExpertChoiceRouter(hidden_size, config, tokens_per_sample)
    assert config.router == "global_pool", config.router
    return GlobalPoolRouter(hidden_size, config, tokens_per_sample)


class TokenChoiceRouter(Router):
    """TC-DiT: every token takes its best experts (DiffMoE eq. 1-3, Alg. 2); the gate is the raw softmax value."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        assert config.num_experts is not None and config.top_k is not None
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.gate_weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))
        self.pool = LocalPool()  # who shares the balance loss; nobody competes

    def initial_gate(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Uniform within 1 / sqrt(D), as the published baseline."""
        return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])

    def forward(self, x_TD: Tensor) -> Routing:
        scores_TN = F.linear(x_TD.float(), self.gate_weight.float()).softmax(dim=-1)
        # Sorting is stable: equal scores go to the lower expert, also where topk would leave it open.
        best_TK = scores_TN.detach().sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        chosen_TN = torch.zeros_like(scores_TN, dtype=torch.bool).scatter_(1, best_TK, True)
        by_expert = best_TK.flatten().argsort(stable=True)
        token_index, expert_index = by_expert // self.top_k, best_TK.flatten()[by_expert]
        losses = {}
        if self.training:
            picks_N = self.pool.count(chosen_TN).sum(dim=0)
            losses["balance"] = balance_loss(scores_TN, picks_N)
        return Routing(
            token_index=token_index,
            expert_index=expert_index,
            gate=scores_TN.flatten().gather(0, token_index * self.num_experts + expert_index),
            losses=losses,
            stats=RoutingStats(chosen_TN.sum(dim=0), chosen_TN.sum() / len(x_TD)),
            pool=Selection(chosen=chosen_TN.T, pool_ranks=1, slots_per_expert=None),
        )


class ExpertChoiceRouter(Router):
    """EC-DiT: every expert takes its int(S / N * C) best tokens of each image (DiffMoE Sec. 2.1, Alg. 1)."""

    def __init__(self, hidden_size: int, config: MoEConfig, tokens_per_sample: int) -> None:
        super().__init__()
        assert config.num_experts is not None and config.capacity is not None
        self.num_experts = config.num_experts
        self.slots = expert_slots(tokens_per_sample, config.num_experts, config.capacity)
        self.gate_weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))
        self.pool = LocalPool(tokens_per_sample)

    def forward(self, x_TD: Tensor) -> Routing:
        scores_TN = F.linear(x_TD.float(), self.gate_weight.float()).softmax(dim=-1)
        selection = self.pool.select(scores_TN.detach().nan_to_num(nan=-1.0), self.slots)
        token_index, expert_index = assignments(selection)
        return Routing(
            token_index=token_index,
            expert_index=expert_index,
            gate=scores_TN.flatten().gather(0, token_index * self.num_experts + expert_index),
            losses={},
            stats=RoutingStats(selection.chosen.sum(dim=1), selection.chosen.sum() / len(x_TD)),
            pool=selection,
        )


class GlobalPoolRouter(Router):
    """DiffMoE: every expert takes its best tokens from one pool over the whole batch (Alg. 3).

    A capacity predictor learns which tokens each expert takes; at inference it decides how many each gets:

    - `threshold`: a token goes to the experts whose predicted score exceeds the expert's threshold (eq. 14 as
      printed). No token depends on its batch mates.
    - `count`: as many tokens of the pool as exceed the threshold, but those with the highest gate (Alg. 4, the
      published code). A token depends on its batch mates.
    - `static`: int(T / N * C) tokens of the pool, as in training.

    Scores are computed in fp32 whatever the precision of the model.
    """

    threshold: Tensor
    threshold_updates: Tensor

    def __init__(self, hidden_size: int, config: MoEConfig, tokens_per_sample: int) -> None:
        super().__init__()
        assert config.num_experts is not None and config.capacity is not None
        assert config.inference is not None and config.threshold_decay is not None
        self.num_experts = config.num_experts
        self.capacity = config.capacity
        self.inference = config.inference
        self.threshold_decay = config.threshold_decay
        self.gate_weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))
        self.capacity_predictor = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, self.num_experts)
        )
        self.register_buffer("threshold", torch.zeros(self.num_experts))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))
        self.pool = LocalPool(tokens_per_sample if config.pool == "sample" else None)

    def forward(self, x_TD: Tensor) -> Routing:
        # Alg. 3: the affinity of eq. 5 with a softmax over the experts.
        scores_TN = F.linear(x_TD.float(), self.gate_weight.float()).softmax(dim=-1)
        # eq. 10-11: the predictor learns from tokens, not the tokens from it.
        predicted_TN = self._predict(x_TD.detach())
        selection = self._select(scores_TN.detach(), predicted_TN.detach())
        token_index, expert_index = assignments(selection)
        losses, proposal = {}, None
        if self.training:
            losses["capacity"] = capacity_loss(predicted_TN, selection.chosen.T)
            assert selection.kth_largest is not None
            proposal = selection.kth_largest  # eq. 17
        return Routing(
            token_index=token_index,
            expert_index=expert_index,
            gate=scores_TN.flatten().gather(0, token_index * self.num_experts + expert_index),
            losses=losses,
            stats=RoutingStats(
                tokens_per_expert=selection.chosen.sum(dim=1),
                capacity=selection.chosen.sum() / len(x_TD),
                proposed_threshold=proposal,
            ),
            pool=selection,
        )

    @torch.no_grad()
    def update_threshold(self, proposal: Tensor) -> None:
        """Take one step of the bias-corrected moving average of eq. 17; once per optimizer step, by the engine.

        Args:
            proposal: (N,) fp32, the same on every rank.
        """
        assert self.threshold.dtype == torch.float32, "thresholds stay in fp32"
        self.threshold_updates += 1
        # Written on the corrected average itself: the first proposal counts fully, later ones tend to 1 - decay.
        weight = (1 - self.threshold_decay) / (1 - self.threshold_decay ** self.threshold_updates.double())
        self.threshold.lerp_(proposal, weight.to(self.threshold.dtype))

    def _predict(self, x_TD: Tensor) -> Tensor:
        """(T, N) fp32 logits. The last layer is computed in fp32: at bf16's resolution scores would tie in crowds."""
        last = self.capacity_predictor[-1]
        assert isinstance(last, nn.Linear)
        return F.linear(self.capacity_predictor[:-1](x_TD).float(), last.weight.float(), last.bias.float())

    def _select(self, scores_TN: Tensor, predicted_TN: Tensor) -> Selection:
        slots = expert_slots(self.pool.num_tokens(len(scores_TN)), self.num_experts, self.capacity)
        # A NaN has no place in any order; sent to the end of it, the choice stays well defined on every rank, and the
        # NaN still reaches the loss through the gate.
        scores_TN = scores_TN.nan_to_num(nan=-1.0)
        if self.training:
            return self.pool.select(scores_TN, slots, second_TN=predicted_TN.sigmoid().nan_to_num(nan=0.0))
        if self.inference == "static":
            return self.pool.select(scores_TN, slots)
        above_TN = predicted_TN.sigmoid() > self.threshold  # eq. 14
        if self.inference == "count":
            return self.pool.select(scores_TN, self.pool.count(above_TN))
        return Selection(chosen=above_TN.T, pool_ranks=1, slots_per_expert=None)


def assignments(selection: Selection) -> tuple[Tensor, Tensor]:
    """The (token, expert) pairs of a selection, (A,) and (A,), by expert and then by token."""
    chosen_NT = selection.chosen
    if selection.pool_ranks == 1 and selection.slots_per_expert is not None:
        return _assignments_of_known_size(chosen_NT, selection.slots_per_expert)
    expert_index, token_index = chosen_NT.nonzero(as_tuple=True)
    return token_index, expert_index


def _assignments_of_known_size(chosen_NT: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """`nonzero` with a known result size, which spares an accelerator the wait for the host."""
    experts, tokens = chosen_NT.shape
    device = chosen_NT.device
    place = torch.where(chosen_NT, chosen_NT.cumsum(dim=1) - 1, slots)  # unchosen tokens go to a spare column
    token_index = torch.zeros(experts, slots + 1, dtype=torch.int64, device=device)
    token_index.scatter_(1, place, torch.arange(tokens, device=device).expand(experts, tokens))
    expert_index = torch.arange(experts, device=device)[:, None].expand(experts, slots)
    return token_index[:, :slots].reshape(-1), expert_index.reshape(-1)
