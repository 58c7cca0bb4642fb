"""Dispatch and combine over ranks: tokens travel to the ranks that hold their experts, and the results back.

Shape legend: T local tokens, D width, A assignments of local tokens, R rows that arrive here, P ranks of the
expert-parallel group, E experts of each rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.model.moe import ExpertInput, weighted_sum
from diffmoe_dist.model.routing import Routing

Timed = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class DispatchPlan:
    """How many rows each rank sends and receives, and the order of the rows that arrive."""

    send: list[int]  # rows to each rank
    receive: list[int]  # rows from each rank
    expert_major: Tensor  # (R,) the arriving row at each place of the expert-by-expert order
    arrival_order: Tensor  # (R,) its inverse


def plan_dispatch(sent_PE: Tensor, received_PE: Tensor) -> DispatchPlan:
    """Compute the exchange from the counts alone.

    Args:
        sent_PE: int64, local tokens for each expert of each rank.
        received_PE: int64, tokens from each rank for each expert here.
    """
    send, receive = torch.stack([sent_PE.sum(dim=1), received_PE.sum(dim=1)]).tolist()  # the one wait for the device
    rows = sum(receive)
    # Rows arrive rank by rank and within a rank expert by expert; block (p, e) moves to the place of (e, p).
    sizes_EP = received_PE.T.flatten()
    arrival_starts_EP = (received_PE.flatten().cumsum(0) - received_PE.flatten()).view_as(received_PE).T.flatten()
    expert_starts_EP = sizes_EP.cumsum(0) - sizes_EP
    shift = torch.repeat_interleave(arrival_starts_EP - expert_starts_EP, sizes_EP, output_size=rows)
    expert_major = torch.arange(rows, device=shift.device) + shift
    arrival_order = torch.empty_like(expert_major)
    arrival_order[expert_major] = torch.arange(rows, device=shift.device)
    return DispatchPlan(send, receive, expert_major, arrival_order)


class AllToAllDispatcher:
    """Experts are sharded over a group: rows travel by an all-to-all with uneven splits, in expert-major order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.timed: Timed = nullcontext  # around each exchange of rows, also in backward

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[ExpertInput, DispatchPlan]:
        sent_PE = routing.stats.tokens_per_expert.view(self.ranks, -1)
        received_PE = self._received(sent_PE, routing)
        plan = plan_dispatch(sent_PE, received_PE)
        x_AD = x_TD.index_select(0, routing.token_index)
        arrived_RD = all_to_all_rows(x_AD, plan.send, plan.receive, self.group, self.timed)
        rows_RD = permute_rows(arrived_RD, plan.expert_major, plan.arrival_order)
        return ExpertInput(rows_RD, received_PE.sum(dim=0), self._rows_per_expert(routing)), plan

    def combine(self, y_RD: Tensor, x_TD: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        y_RD = permute_rows(y_RD, plan.arrival_order, plan.expert_major)
        y_AD = all_to_all_rows(y_RD, plan.receive, plan.send, self.group, self.timed)
        return weighted_sum(y_AD, routing, x_TD)

    def _rows_per_expert(self, routing: Routing) -> int | None:
        """The number of rows of every expert here, where the group consists of whole pools and so it is known."""
        pool = routing.pool
        if pool.slots_per_expert is None or self.ranks % pool.pool_ranks:
            return None
        return pool.slots_per_expert * (self.ranks // pool.pool_ranks)

    def _received(self, sent_PE: Tensor, routing: Routing) -> Tensor:
        """Tokens from each rank for each expert here, (P, E); exchanged only where the pool does not know them."""
        pool = routing.pool
        if pool.pool_ranks == self.ranks and pool.arrivals is not None:
            return pool.arrivals
        if pool.pool_ranks == 1 and pool.slots_per_expert is not None:
            return torch.full_like(sent_PE, pool.slots_per_expert)
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE.contiguous(), group=self.group)
        return received_PE


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, timed: Timed
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.timed = send, receive, group, timed
        arrived = x.new_empty(sum(receive), x.shape[1])
        with timed():
            dist.all_to_all_single(arrived, x.contiguous(), receive, send, group)
        return arrived

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        returned = grad.new_empty(sum(ctx.send), grad.shape[1])
        with ctx.timed():
            dist.all_to_all_single(returned, grad.contiguous(), ctx.send, ctx.receive, ctx.group)
        return returned, None, None, None, None


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def all_to_all_rows(
    x_AD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, timed: Timed = nullcontext
) -> Tensor:
    """Send the first `send[0]` rows to rank 0 and so on; returns the arriving rows, (sum(receive), D)."""
    return _AllToAllRows.apply(x_AD, send, receive, group, timed)


def permute_rows(x_RD: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order]; the gradient is a gather by the inverse, where plain indexing would scatter."""
    return _PermuteRows.apply(x_RD, order, inverse)
