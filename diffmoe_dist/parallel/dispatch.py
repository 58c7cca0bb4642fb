"""Dispatch and combine over ranks: tokens travel to the ranks that hold their experts, and the results back.

Shape legend: T local tokens, D width, A assignments of local tokens, R rows that arrive here, P ranks of the
expert-parallel group, E experts of each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def to_experts(self, x_RD: Tensor) -> Tensor:
        """The arriving rows in the order of the experts."""
        return permute_rows(x_RD, self.expert_major, self.arrival_order)

    def to_ranks(self, y_RD: Tensor) -> Tensor:
        return permute_rows(y_RD, self.arrival_order, self.expert_major)


@dataclass(frozen=True)
class EvenPlan:
    """The same, where each rank sends each expert as many rows: the orders are transposes."""

    send: list[int]
    receive: list[int]
    blocks: tuple[int, int, int]  # ranks, experts here, rows of each rank for each of them

    def to_experts(self, x_RD: Tensor) -> Tensor:
        return x_RD.view(*self.blocks, x_RD.shape[1]).transpose(0, 1).reshape(x_RD.shape)

    def to_ranks(self, y_RD: Tensor) -> Tensor:
        ranks, experts, rows = self.blocks
        return y_RD.view(experts, ranks, rows, y_RD.shape[1]).transpose(0, 1).reshape(y_RD.shape)


def even_plan(ranks: int, experts: int, rows: int) -> EvenPlan:
    """Every one of `ranks` sends `rows` rows to each of the `experts` of every rank."""
    return EvenPlan([experts * rows] * ranks, [experts * rows] * ranks, (ranks, experts, rows))


def plan_dispatch(sent_PE: Tensor, received_PE: Tensor, counts: Sequence[int] | None = None) -> DispatchPlan:
    """Compute the exchange from the counts alone.

    Args:
        sent_PE: int64, local tokens for each expert of each rank.
        received_PE: int64, tokens from each rank for each expert here.
        counts: both of them one after the other, as the host has read them; None: read here.
    """
    if counts is None:
        counts = torch.cat([sent_PE.flatten(), received_PE.flatten()]).tolist()
    experts = sent_PE.shape[1]
    of_ranks = [sum(counts[first : first + experts]) for first in range(0, len(counts), experts)]
    send, receive = of_ranks[: len(sent_PE)], of_ranks[len(sent_PE) :]
    rows = sum(receive)
    # Rows arrive rank by rank and within a rank expert by expert; block (p, e) moves to the place of (e, p).
    sizes_EP = received_PE.T.flatten()
    arrival_starts_EP = (received_PE.flatten().cumsum(0) - received_PE.flatten()).view_as(received_PE).T.flatten()
    expert_starts_EP = sizes_EP.cumsum(0) - sizes_EP
    shift = torch.repeat_interleave(arrival_starts_EP - expert_starts_EP, sizes_EP, output_size=rows)
    place = torch.arange(rows, device=shift.device)
    expert_major = place + shift
    return DispatchPlan(send, receive, expert_major, torch.empty_like(expert_major).scatter_(0, expert_major, place))


@dataclass(frozen=True)
class Dispatch:
    """A layer's rows on their way to their experts."""

    tokens: int
    token_index: Tensor  # (A,)
    gate: Tensor  # (A,)
    plan: DispatchPlan | EvenPlan
    exchange: Exchange
    arriving_RD: Tensor  # to be read when the exchange has ended
    tokens_per_expert: Tensor  # (E,) int64, the rows of the experts here
    rows_per_expert: int | None
    counts: list[int]  # tokens_per_expert on the host


class AllToAllDispatcher:
    """Experts are sharded over a group: rows travel by an all-to-all with uneven splits, in expert-major order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        # Around what starts an exchange of rows and what waits for it, also in backward.
        self.timed: Timed = nullcontext

    def counts(self, routing: Routing, by_expert: bool) -> Tensor | None:
        """(2 N,) the local tokens for each expert, and the tokens from each rank for each expert here."""
        if routing.pool.slots_here is not None:
            return None
        sent_PE = routing.stats.tokens_per_expert.view(self.ranks, -1)
        return torch.stack([sent_PE, self._received(sent_PE, routing)]).flatten()

    def start(self, x_TD: Tensor, routing: Routing, counts: Tensor | None, on_host: Sequence[int] | None) -> Dispatch:
        experts = len(routing.stats.tokens_per_expert)
        plan: DispatchPlan | EvenPlan
        if counts is None or on_host is None:
            slots = routing.pool.slots_here
            assert slots is not None
            received_PE = routing.stats.tokens_per_expert.view(self.ranks, -1)  # as many as it sends
            plan = even_plan(self.ranks, experts // self.ranks, slots)
            on_host = [slots] * (2 * experts)
        else:
            sent_PE, received_PE = counts.view(2, self.ranks, -1)
            plan = plan_dispatch(sent_PE, received_PE, on_host)
        token_index, gate = routing.assignments(sum(on_host[:experts]))
        exchange = Exchange(plan.send, plan.receive, self.group, self.timed)
        here = len(received_PE[0])
        return Dispatch(
            tokens=len(x_TD),
            token_index=token_index,
            gate=gate,
            plan=plan,
            exchange=exchange,
            arriving_RD=exchange.start(x_TD.index_select(0, token_index)),
            tokens_per_expert=received_PE.sum(dim=0),
            rows_per_expert=self._rows_per_expert(routing),
            counts=[sum(on_host[experts + expert :: here]) for expert in range(here)],
        )

    def rows(self, dispatch: Dispatch) -> ExpertInput:
        arrived_RD = dispatch.exchange.finish(dispatch.arriving_RD)
        rows_RD = dispatch.plan.to_experts(arrived_RD)
        return ExpertInput(rows_RD, dispatch.tokens_per_expert, dispatch.rows_per_expert, dispatch.counts)

    def combine(self, y_RD: Tensor, dispatch: Dispatch, dtype: torch.dtype) -> Tensor:
        plan = dispatch.plan
        y_AD = all_to_all_rows(plan.to_ranks(y_RD), plan.receive, plan.send, self.group, self.timed)
        return weighted_sum(y_AD, dispatch.gate, dispatch.token_index, dispatch.tokens, dtype)

    def _rows_per_expert(self, routing: Routing) -> int | None:
        """The number of rows of every expert here, where the group consists of whole pools and so it is known."""
        pool = routing.pool
        if pool.slots_per_expert is None or self.ranks % pool.pool_ranks:
            return None
        return pool.slots_per_expert * (self.ranks // pool.pool_ranks)

    def _received(self, sent_PE: Tensor, routing: Routing) -> Tensor:
        """Tokens from each rank for each expert here, (P, E); exchanged only where the pool does not know them."""
        pool = routing.pool
        if pool.arrivals is not None and len(pool.arrivals) == self.ranks:
            return pool.arrivals
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE.contiguous(), group=self.group)
        return received_PE


class Exchange:
    """An all-to-all of rows that runs beside what is computed between `start` and `finish`, forward and backward.

    The first `send[0]` rows go to rank 0 and so on.
    """

    def __init__(
        self, send: list[int], receive: list[int], group: dist.ProcessGroup, timed: Timed = nullcontext
    ) -> None:
        self.send, self.receive, self.group, self.timed = send, receive, group, timed
        self.work: Any = None
        self.held: tuple[Tensor, ...] = ()  # what the collective reads and writes, until it has ended

    def start(self, x_AD: Tensor) -> Tensor:
        """(sum(receive), D), whose values are there after `finish`."""
        return _Start.apply(x_AD, self)

    def finish(self, arriving_RD: Tensor) -> Tensor:
        return _Finish.apply(arriving_RD, self)

    def begin(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        x = x.contiguous()
        arriving = x.new_empty(sum(receive), x.shape[1])
        with self.timed():
            self.work = dist.all_to_all_single(arriving, x, receive, send, self.group, async_op=True)
        self.held = x, arriving
        return arriving

    def wait(self) -> Tensor:
        with self.timed():
            if self.work is not None:
                self.work.wait()  # on CUDA the stream waits, not the host
        arrived = self.held[1]
        self.work, self.held = None, ()
        return arrived


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(x, exchange.send, exchange.receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.begin(grad, ctx.exchange.receive, ctx.exchange.send)
        return grad, None  # the node of `start` waits, and has the gradient; this value is not read


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
    exchange = Exchange(send, receive, group, timed)
    return exchange.finish(exchange.start(x_AD))


def permute_rows(x_RD: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order]; the gradient is a gather by the inverse, where plain indexing would scatter."""
    return _PermuteRows.apply(x_RD, order, inverse)
