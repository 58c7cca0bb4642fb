"""The routing of tokens to experts: what every router returns, and the pools that experts choose tokens from.

A router returns one value, a `Routing`. Dispatchers and experts know nothing else of the router. Where experts choose
tokens, a token pool finds the best ones: `LocalPool` on a single device, `parallel.pool.DistributedPool` over several
ranks. Both choose exactly the same tokens from the same scores.

The routers are in `routers/`, one file each.

Shape legend: T local tokens (row-major over images), D width, N experts, A assignments of a token to an expert,
G pools side by side on this device (1, or one per image), P tokens of one pool, E columns (experts) at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RoutingStats:
    """Statistics of one layer in one forward pass, detached from the graph."""

    tokens_per_expert: Tensor  # (N,) int64, assignments of this device's tokens
    # () fp32, C of DiffMoE eq. 8-9: routed and unconditional experts per local token, the mean. Shared experts, which
    # every token has, are not counted.
    capacity: Tensor
    proposed_threshold: Tensor | None = None  # (N,) fp32, the capacity thresholds of this batch (DiffMoE eq. 17)


@dataclass(frozen=True)
class Routing:
    """The whole decision of a router about this device's tokens."""

    scores_TN: Tensor  # fp32, the gate of a token at each expert, carries gradient
    losses: dict[str, Tensor]  # named, unweighted fp32 scalars
    stats: RoutingStats
    pool: Selection  # which tokens the pool chose; tells dispatchers the row counts that are known in advance
    predicted_TN: Tensor | None = None  # fp32 logits of a capacity predictor, in training, detached

    def assignments(self, number: int | None = None) -> tuple[Tensor, Tensor]:
        """(A,) the token of each assignment, a row of (T, D), and (A,) its gate: ordered by expert, then by token.

        Args:
            number: A, where the host knows it. Else the host may have to wait for the device, which counts.
        """
        pool, experts = self.pool, self.scores_TN.shape[1]
        if pool.slots_here is not None and pool.token_index is not None:
            token_NK = pool.token_index.view(experts, -1)
            return pool.token_index, self.scores_TN.T.gather(1, token_NK).flatten()
        token_index, expert_index = pool.assignments(number)
        place_A = torch.add(expert_index, token_index, alpha=experts)
        return token_index, self.scores_TN.flatten().gather(0, place_A)

    @cached_property
    def token_index(self) -> Tensor:
        """(A,) as `assignments` gives it; ascending within an expert."""
        return self.pool.assignments()[0]

    @cached_property
    def expert_index(self) -> Tensor:
        """(A,) global expert id, non-decreasing."""
        return self.pool.assignments()[1]

    @cached_property
    def gate(self) -> Tensor:
        """(A,) fp32 combine weight, carries gradient."""
        return self.assignments()[1]


@dataclass(frozen=True)
class Selection:
    """The tokens that the experts of a pool chose, seen from one device."""

    chosen: Tensor  # (N, T) bool, for the local tokens
    pool_ranks: int  # ranks whose tokens competed in one pool
    slots_per_expert: int | None  # tokens of these ranks that each expert takes; None: it differs between experts
    # (P, N / P) tokens from each of P ranks, the pool's or a part of them, for each expert that this one has where the
    # experts are sharded over them.
    arrivals: Tensor | None = None
    kth_largest: Tensor | None = None  # (G, N) the slots-th largest of the second scores, see TokenPool.select
    # (A,) int64, token and expert of each assignment by expert and then by token, where nobody has to count them first.
    # Without `expert_index` it is the same number for each expert.
    token_index: Tensor | None = None
    expert_index: Tensor | None = None

    @property
    def slots_here(self) -> int | None:
        """The local tokens that each expert takes, where that is one number, which the host knows."""
        return self.slots_per_expert if self.pool_ranks == 1 else None

    def assignments(self, number: int | None = None) -> tuple[Tensor, Tensor]:
        """Token and expert of each assignment, see `Routing.assignments`."""
        if self.token_index is None:
            # Of a known size, the host need not wait for the count.
            pairs_A2 = self.chosen.nonzero() if number is None else self.chosen.nonzero_static(size=number)
            expert_index, token_index = pairs_A2.T.contiguous()
            return token_index, expert_index
        if self.expert_index is not None:
            return self.token_index, self.expert_index
        experts = torch.arange(len(self.chosen), device=self.chosen.device)
        return self.token_index, experts.repeat_interleave(len(self.token_index) // len(experts))


class TokenPool(Protocol):
    """The tokens that compete for the slots of an expert."""

    def num_tokens(self, local_tokens: int) -> int:
        """Tokens in one pool, given this device's token count."""
        ...

    def count(self, flags_TN: Tensor) -> Tensor:
        """How many tokens of each pool are flagged, (G, N) int64."""
        ...

    def select(
        self, scores_TN: Tensor, slots: int | Tensor, second_TN: Tensor | None = None, *, at_least_zero: bool = False
    ) -> Selection:
        """For each expert, the `slots` tokens of the pool with the highest scores. Ties: the lower global token id.

        Args:
            scores_TN: fp32. NaN counts as lower than any number: so the choice stays well defined on every rank, and
                the NaN still reaches the loss through the gate.
            slots: the tokens that each expert takes, one number or (G, N).
            second_TN: other fp32 scores, whose slots-th largest over each pool becomes `kth_largest`. Only where
                `slots` is one number.
            at_least_zero: no score is below 0, as after a softmax: there is a faster way for them.
        """
        ...


class LocalPool:
    """One pool over all tokens of this device, or one pool per image."""

    def __init__(self, tokens_per_pool: int | None = None) -> None:
        self.tokens_per_pool = tokens_per_pool  # None: every token at hand

    def num_tokens(self, local_tokens: int) -> int:
        return self.tokens_per_pool or local_tokens

    def count(self, flags_TN: Tensor) -> Tensor:
        return flags_TN.view(*self._split(len(flags_TN)), -1).sum(dim=1)

    def select(
        self, scores_TN: Tensor, slots: int | Tensor, second_TN: Tensor | None = None, *, at_least_zero: bool = False
    ) -> Selection:
        tokens, experts = scores_TN.shape
        kinds_KNGP = columns([scores_TN, second_TN]).view(-1, experts, *self._split(tokens))
        pools = kinds_KNGP.shape[2]
        if not isinstance(slots, int) or not at_least_zero:
            cutoff, ties = cutoffs(kinds_KNGP[0], slots if isinstance(slots, int) else slots.T)
            return Selection(
                chosen=topk_mask(kinds_KNGP[0], cutoff, ties).view(experts, tokens),
                pool_ranks=1,
                slots_per_expert=pools * slots if isinstance(slots, int) else None,
                kth_largest=None if second_TN is None else kth_largest(kinds_KNGP[1], int(slots)).T,
            )
        place_NGK = best_places(kinds_KNGP[0], slots)
        if pools > 1:
            place_NGK += torch.arange(0, tokens, tokens // pools, device=place_NGK.device)[:, None]
        token_NK = place_NGK.view(experts, -1)
        return Selection(
            chosen=torch.zeros(experts, tokens, dtype=torch.bool, device=token_NK.device).scatter_(1, token_NK, True),
            pool_ranks=1,
            slots_per_expert=pools * slots,
            kth_largest=None if second_TN is None else kth_largest(kinds_KNGP[1], slots).T,
            token_index=token_NK.flatten(),
        )

    def _split(self, tokens: int) -> tuple[int, int]:
        """G and P."""
        return tokens // self.num_tokens(tokens), self.num_tokens(tokens)


def columns(kinds_TN: Sequence[Tensor | None], kind_dim: int = 0) -> Tensor:
    """(K, N, T) or (N, K, T): the scores of each expert, with NaN, which has no place in an order, sent to its end."""
    stacked = torch.stack([scores_TN.T for scores_TN in kinds_TN if scores_TN is not None], dim=kind_dim)
    return stacked.nan_to_num_(nan=-torch.inf)


def best_places(scores: Tensor, slots: int) -> Tensor:
    """(..., P) to (..., slots): the places of the highest scores, ascending. Of equal scores the first ones.

    Args:
        scores: fp32, not below 0, or -inf.
    """
    # A key for each score, of which no two are equal: the bits of a float of this kind are in order as those of an
    # integer, and the place decides where they are the same.
    backwards = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    keys = torch.add(backwards, scores.view(torch.int32), alpha=1 << 32)
    return keys.topk(slots, dim=-1, sorted=False).indices.sort(dim=-1).values


def cutoffs(scores: Tensor, slots: int | Tensor) -> tuple[Tensor, Tensor]:
    """The lowest score in the top k of each row, and how many of the tokens with just that score are in it.

    Args:
        scores: (..., P) fp32.
        slots: k, one number or (...), between 0 and P.

    Returns:
        The cutoff, (...) fp32, and the number of ties, (...) int64. A row with k = 0 has cutoff +inf and no ties.
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
    if not values.shape[:-1].numel():  # an owner of no experts; topk on CUDA would start a kernel without blocks
        return values.new_empty(values.shape[:-1])
    return values.topk(k, dim=-1, sorted=False).values.amin(dim=-1)


def topk_mask(scores: Tensor, cutoff: Tensor, ties: Tensor) -> Tensor:
    """(..., P) bool: the scores above the cutoff, and the first `ties` of those that equal it.

    Args:
        scores: (..., P) fp32.
        cutoff: (...) fp32.
        ties: (...) int64.
    """
    equal = scores == cutoff[..., None]
    return (scores > cutoff[..., None]) | (equal & (equal.cumsum(dim=-1) <= ties[..., None]))


class Batch(Protocol):
    """The images of a micro-step on all ranks, for losses of the batch as a whole."""

    ranks: int

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over the ranks, of the same shape, with gradients.

        Every rank must compute the same loss from the sum. (The engine averages the losses over the ranks.)
        """
        ...


class LocalBatch:
    """The batch of a single device."""

    ranks = 1

    def sum(self, values: Tensor) -> Tensor:
        return values


class Router(nn.Module):
    """Routes tokens (T, D) to experts.

    `parallel.expert_parallel` replaces `pool` and `batch` by ones that span ranks; the router sees no difference.
    """

    pool: TokenPool  # of routers whose experts choose tokens

    def __init__(self) -> None:
        super().__init__()
        self.batch: Batch = LocalBatch()

    def forward(self, x_TD: Tensor, null_T: Tensor) -> Routing:
        """
        Args:
            x_TD: the tokens.
            null_T: bool, true for the tokens of unconditional images (null label or null caption).
        """
        raise NotImplementedError

    def initial_weights(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Initial values of a weight matrix that is the router's own: N(0, 0.006^2), as the published gates."""
        return torch.randn(shape, generator=generator) * 0.006

    def start_step(self, step: int) -> None:
        """For schedules: the engine calls this before optimizer step `step`, counted from 0."""

    def end_schedule(self) -> None:
        """Set what a schedule changes to its final value."""

    def update_threshold(self, proposal: Tensor) -> None:
        """Update the thresholds with the proposal of an optimizer step, (N,) fp32; for routers that propose some."""
        raise NotImplementedError


def route(
    scores_TN: Tensor, selection: Selection, losses: dict[str, Tensor], proposed_threshold: Tensor | None = None
) -> Routing:
    """The routing of a selection whose gates are the scores.

    Args:
        scores_TN: fp32, with gradient.
        proposed_threshold: (N,) fp32.
    """
    tokens, experts = scores_TN.shape
    if selection.slots_here is not None:  # not counted, but known
        counts = torch.full((experts,), selection.slots_here, device=scores_TN.device)
        capacity = torch.full((), experts * selection.slots_here / tokens, device=scores_TN.device)
    else:
        counts = selection.chosen.sum(dim=1)
        capacity = counts.sum() / tokens
    return Routing(scores_TN, losses, RoutingStats(counts, capacity, proposed_threshold), selection)
