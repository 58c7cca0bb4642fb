"""Exact top-k over a token pool that is sharded over ranks.

The tokens of several ranks compete for the slots of each expert. Each expert's column of scores goes to one rank, its
owner. The owner finds the cutoff, and sends every rank the cutoff and how many of that rank's ties are in. So each rank
learns which of its own tokens are chosen, though no rank sees all scores of all experts. The choice is that of
`LocalPool` over the same tokens in rank-major order.

Shape legend: Q ranks of the pool, P ranks of an expert-parallel group, T local tokens, N experts, E experts whose
columns this rank owns, K kinds of scores (1, or 2 with the second scores).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.config.schema import ParallelConfig
from diffmoe_dist.model.routing import Selection, columns, cutoffs, kth_largest, topk_mask
from diffmoe_dist.parallel.topology import all_gather

_FP32_EXACT_INTEGERS = 2**24


class DistributedBatch:
    """The batch of a micro-step over all ranks of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)

    def sum(self, values: Tensor) -> Tensor:
        return _SumOverRanks.apply(values, self)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, batch: DistributedBatch) -> Tensor:
        ctx.ranks = batch.ranks
        total = values.clone()
        dist.all_reduce(total, group=batch.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank has the same loss of the same sum, so the same gradient: adding them up needs no exchange. The mean
        # of the ranks' losses, which the engine differentiates, divides by their number again.
        return grad * ctx.ranks, None


class DistributedPool:
    """One pool over the tokens of all ranks of a group; every rank has the same number of tokens.

    How scores travel has equal results: by an all-to-all each column goes to its owner alone, T * N floats a rank; an
    all-gather sends everything everywhere, Q times that, in one round instead of two. In two levels nobody exchanges
    messages with all Q ranks: a column goes to the rank of each expert-parallel group that holds the expert, and these
    gather it, so they also know how many tokens arrive.

    Args:
        parallel: the settings that decide how.
        levels: where the pool may span several expert-parallel groups, this rank's one, and the ranks, one in each
            group, that hold the same experts.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        parallel: ParallelConfig,
        levels: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
    ) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.how_scores_travel = parallel.how_scores_travel
        self.levels = levels

    def num_tokens(self, local_tokens: int) -> int:
        return self.ranks * local_tokens

    def count(self, flags_TN: Tensor) -> Tensor:
        counts = flags_TN.sum(dim=0, keepdim=True)  # (1, N): one pool
        dist.all_reduce(counts, group=self.group)
        return counts

    def select(
        self, scores_TN: Tensor, slots: int | Tensor, second_TN: Tensor | None = None, *, at_least_zero: bool = False
    ) -> Selection:
        scores_NKT = columns([scores_TN, second_TN], kind_dim=1)
        per_expert = slots if isinstance(slots, int) else slots[0]
        how = self.how_scores_travel(self.ranks * scores_NKT.numel() * scores_NKT.element_size(), self.ranks)
        exchange = {
            "all_to_all": self._select_all_to_all,
            "all_gather": self._select_all_gather,
            "two_level": self._select_two_level,
        }[how]
        reply_N3, arrivals_EP = exchange(scores_NKT, per_expert)
        cutoff_N, ties_N, kth_N = reply_N3.unbind(dim=1)
        return Selection(
            chosen=topk_mask(scores_NKT[:, 0], cutoff_N, ties_N.long()),
            pool_ranks=self.ranks,
            slots_per_expert=slots if isinstance(slots, int) else None,
            arrivals=None if arrivals_EP is None else arrivals_EP.T,
            kth_largest=None if second_TN is None else kth_N[None],
        )

    def _select_all_to_all(self, scores_NKT: Tensor, slots: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """The owners' replies to this rank, (N, 3), and the tokens from each rank for the experts it owns, (E, Q).

        The latter only where every rank owns as many, as it would hold.
        """
        experts, kinds, tokens = scores_NKT.shape
        owned = experts_per_rank(experts, self.ranks)
        owned_here = owned[self.rank]
        columns_QEKT = scores_NKT.new_empty(self.ranks, owned_here, kinds, tokens)
        size = kinds * tokens
        dist.all_to_all_single(
            columns_QEKT.view(-1),
            scores_NKT.view(-1),
            [owned_here * size] * self.ranks,
            [count * size for count in owned],
            self.group,
        )
        first = sum(owned[: self.rank])
        slots_here = slots if isinstance(slots, int) else slots[first : first + owned_here]
        replies_QE3, arrivals_EQ = reply(columns_QEKT, slots_here)
        reply_N3 = scores_NKT.new_empty(experts, 3)
        dist.all_to_all_single(
            reply_N3.view(-1),
            replies_QE3.view(-1),
            [count * 3 for count in owned],
            [owned_here * 3] * self.ranks,
            self.group,
        )
        return reply_N3, None if experts % self.ranks else arrivals_EQ

    def _select_all_gather(self, scores_NKT: Tensor, slots: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """The same; every rank computes the replies of all owners."""
        columns_QNKT = scores_NKT.new_empty(self.ranks, *scores_NKT.shape)
        all_gather(columns_QNKT.view(-1), scores_NKT.view(-1), self.group)
        replies_QN3, arrivals_NQ = reply(columns_QNKT, slots)
        each, rest = divmod(len(scores_NKT), self.ranks)
        arrivals_EQ = None if rest else arrivals_NQ[self.rank * each : (self.rank + 1) * each]
        return replies_QN3[self.rank], arrivals_EQ

    def _select_two_level(self, scores_NKT: Tensor, slots: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, with the tokens from each rank of the expert-parallel group, (E, P).

        Every holder of an expert computes the replies to all ranks; those to its own group travel.
        """
        assert self.levels is not None
        within, across = self.levels
        experts, kinds, tokens = scores_NKT.shape
        ranks, groups = dist.get_world_size(within), dist.get_world_size(across)
        held = experts // ranks
        first = dist.get_rank(within) * held
        columns_PEKT = scores_NKT.new_empty(ranks, held, kinds, tokens)
        dist.all_to_all_single(columns_PEKT.view(-1), scores_NKT.view(-1), group=within)
        columns_QEKT = scores_NKT.new_empty(groups * ranks, held, kinds, tokens)
        all_gather(columns_QEKT.view(-1), columns_PEKT.view(-1), across)
        replies_QE3, arrivals_EQ = reply(columns_QEKT, slots if isinstance(slots, int) else slots[first : first + held])
        mine = slice(dist.get_rank(across) * ranks, (dist.get_rank(across) + 1) * ranks)
        reply_N3 = scores_NKT.new_empty(experts, 3)
        dist.all_to_all_single(reply_N3.view(-1), replies_QE3[mine].reshape(-1), group=within)
        return reply_N3, arrivals_EQ[:, mine]


def experts_per_rank(experts: int, ranks: int) -> list[int]:
    """How many consecutive experts each rank owns: the same number, or one more for the first ranks."""
    return [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]


def reply(columns_QEKT: Tensor, slots: int | Tensor) -> tuple[Tensor, Tensor]:
    """What the owner of E experts sends to each rank.

    Args:
        columns_QEKT: the scores, and where K is 2 the second scores, of every rank's tokens for these experts.
        slots: the tokens that each expert takes, one number or (E,).

    Returns:
        (Q, E, 3) fp32: the cutoff, how many of that rank's tokens with just this score are chosen (ties go to lower
        ranks first), and the slots-th largest of the second scores, or 0. And (E, Q) int64: how many tokens of
        each rank are chosen.
    """
    ranks, experts, kinds, tokens = columns_QEKT.shape
    assert tokens < _FP32_EXACT_INTEGERS, "tie counts travel as fp32"
    if experts == 0:  # more ranks than experts: CUDA launches no top-k of no rows
        return columns_QEKT.new_empty(ranks, 0, 3), torch.empty(0, ranks, dtype=torch.int64, device=columns_QEKT.device)
    columns_EKQT = columns_QEKT.permute(1, 2, 0, 3).contiguous()
    scores_EQT = columns_EKQT[:, 0]
    cutoff, left = cutoffs(scores_EQT.flatten(1), slots)
    equal_EQ = (scores_EQT == cutoff[:, None, None]).sum(dim=2)
    before_EQ = equal_EQ.cumsum(dim=1) - equal_EQ
    ties_EQ = (left[:, None] - before_EQ).clamp_min(0).minimum(equal_EQ)
    arrivals_EQ = (scores_EQT > cutoff[:, None, None]).sum(dim=2) + ties_EQ
    kth = torch.zeros_like(cutoff)
    if kinds == 2:
        assert isinstance(slots, int)
        kth = kth_largest(columns_EKQT[:, 1].flatten(1), slots)
    replies = [cutoff[:, None].expand(experts, ranks), ties_EQ.to(cutoff.dtype), kth[:, None].expand(experts, ranks)]
    return torch.stack(replies, dim=-1).transpose(0, 1).contiguous(), arrivals_EQ
