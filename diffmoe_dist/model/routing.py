"""The routing of tokens to experts: what every router returns, and the pools that experts choose tokens from.

A router returns one value, a `Routing`. Dispatchers and experts know nothing else of the router. Where experts choose
tokens, a token pool finds the best ones: `LocalPool` on a single device, `parallel.pool.DistributedPool` over several
ranks. Both choose exactly the same tokens from the same scores.

The routers are in `routers/`, one file each.

Shape legend: T local tokens (row-major over images), D width, N experts, A assignments of a token to an expert,
G pools side by side on this device (1, or one per image), P tokens of one pool, E columns (experts) at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
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

    token_index: Tensor  # (A,) row of the flattened local tokens (T, D); ascending within an expert
    expert_index: Tensor  # (A,) global expert id, non-decreasing
    gate: Tensor  # (A,) fp32 combine weight, carries gradient
    losses: dict[str, Tensor]  # named, unweighted fp32 scalars
    stats: RoutingStats
    pool: Selection  # which tokens the pool chose; tells dispatchers the row counts that are known in advance


@dataclass(frozen=True)
class Selection:
    """The tokens that the experts of a pool chose, seen from one device."""

    chosen: Tensor  # (N, T) bool, for the local tokens
    pool_ranks: int  # ranks whose tokens competed in one pool
    slots_per_expert: int | None  # tokens of these ranks that each expert takes; None: it differs between experts
    arrivals: Tensor | None = None  # (pool_ranks, N / pool_ranks) tokens from each rank for each expert sharded to this
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
        """For each expert, the `slots` tokens of the pool with the highest scores. Ties: the lower global token id.

        Args:
            scores_TN: fp32, without NaN.
            slots: the tokens that each expert takes, one number or (G, N).
            second_TN: other fp32 scores, whose slots-th largest over the pool becomes `kth_largest` (the mean over the
                pools, where there are several). Only where `slots` is one number.
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
        chosen = topk_mask(scores_GNP, cutoff, ties)
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
    token_index, expert_index = assignments(selection)
    return Routing(
        token_index=token_index,
        expert_index=expert_index,
        gate=scores_TN.flatten().gather(0, token_index * scores_TN.shape[1] + expert_index),
        losses=losses,
        stats=RoutingStats(
            tokens_per_expert=selection.chosen.sum(dim=1),
            capacity=selection.chosen.sum() / len(scores_TN),
            proposed_threshold=proposed_threshold,
        ),
        pool=selection,
    )


def assignments(selection: Selection) -> tuple[Tensor, Tensor]:
    """Token and expert of each assignment, (A,) and (A,) int64, ordered by expert and then by token."""
    chosen_NT = selection.chosen
    if selection.pool_ranks == 1 and selection.slots_per_expert is not None:
        return _assignments_of_known_size(chosen_NT, selection.slots_per_expert)
    expert_index, token_index = chosen_NT.nonzero(as_tuple=True)
    return token_index, expert_index


def _assignments_of_known_size(chosen_NT: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """`nonzero` of a known result size: on an accelerator the host need not wait for the count."""
    experts, tokens = chosen_NT.shape
    device = chosen_NT.device
    place = torch.where(chosen_NT, chosen_NT.cumsum(dim=1) - 1, slots)  # unchosen tokens go to a spare column
    token_index = torch.zeros(experts, slots + 1, dtype=torch.int64, device=device)
    token_index.scatter_(1, place, torch.arange(tokens, device=device).expand(experts, tokens))
    expert_index = torch.arange(experts, device=device)[:, None].expand(experts, slots)
    return token_index[:, :slots].reshape(-1), expert_index.reshape(-1)
