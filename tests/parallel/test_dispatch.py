from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.parallel.dispatch import Exchange, all_to_all_rows, even_plan, permute_rows, plan_dispatch
from tests.distributed import RankError, run_ranks

# (tokens of each rank for each expert here, where each row of the expert-by-expert order has arrived)
ARRIVALS = {
    "two by two": ([[2, 1], [1, 3]], [0, 1, 3, 2, 4, 5, 6]),
    "an empty expert": ([[2, 0, 1], [1, 0, 2]], [0, 1, 3, 2, 4, 5]),
    "an empty rank": ([[1, 2], [0, 0], [2, 1]], [0, 3, 4, 1, 2, 5]),
    "one expert": ([[3], [2]], [0, 1, 2, 3, 4]),
    "one rank": ([[1, 2, 1]], [0, 1, 2, 3]),
    "interleaved": ([[1, 1, 1], [1, 1, 1], [1, 1, 1]], [0, 3, 6, 1, 4, 7, 2, 5, 8]),
    "nothing": ([[0, 0], [0, 0]], []),
}


@pytest.mark.parametrize("case", ARRIVALS)
def test_arriving_rows_are_put_expert_by_expert_and_within_an_expert_rank_by_rank(case: str) -> None:
    received, expected = ARRIVALS[case]

    plan = plan_dispatch(torch.zeros(len(received), len(received[0]), dtype=torch.int64), torch.tensor(received))

    assert plan.expert_major.tolist() == expected
    assert plan.receive == [sum(row) for row in received]


@pytest.mark.parametrize("case", ARRIVALS)
def test_a_counted_transpose_of_the_arrivals_gives_the_same_plan(case: str) -> None:
    received = torch.tensor(ARRIVALS[case][0])

    plan = plan_dispatch(
        torch.zeros_like(received), received.T.contiguous().T
    )  # as a pool hands it over: not contiguous

    assert plan.expert_major.tolist() == ARRIVALS[case][1]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_a_permutation_and_its_inverse_undoes_it(seed: int) -> None:
    received = torch.randint(4, (3, 5), generator=torch.Generator().manual_seed(seed))

    plan = plan_dispatch(received, received)

    rows = int(received.sum())
    assert sorted(plan.expert_major.tolist()) == list(range(rows))
    assert plan.expert_major[plan.arrival_order].tolist() == list(range(rows))
    # Label every arriving row by (expert, rank): the new order is by expert and then by rank.
    labels = [(e, p) for p in range(3) for e in range(5) for _ in range(int(received[p, e]))]
    assert [labels[place] for place in plan.expert_major.tolist()] == sorted(labels)


def test_a_rank_sends_each_rank_the_rows_of_that_ranks_experts() -> None:
    plan = plan_dispatch(torch.tensor([[1, 2], [0, 0], [4, 0]]), torch.tensor([[1, 1], [0, 5], [0, 0]]))

    assert plan.send == [3, 0, 4] and plan.receive == [2, 5, 0]


def test_where_every_rank_sends_every_expert_as_many_rows_the_plan_needs_no_order() -> None:
    counts = torch.full((3, 2), 4)
    plan, even = plan_dispatch(counts, counts), even_plan(ranks=3, experts=2, rows=4)
    x = torch.arange(24.0)[:, None]

    assert (even.send, even.receive) == (plan.send, plan.receive)
    assert torch.equal(even.to_experts(x), plan.to_experts(x))
    assert torch.equal(even.to_ranks(even.to_experts(x)), x) and torch.equal(plan.to_ranks(plan.to_experts(x)), x)


def test_permuted_rows_bring_their_gradient_back_to_their_place() -> None:
    x = torch.arange(8.0).view(4, 2).requires_grad_()
    order, inverse = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])

    y = permute_rows(x, order, inverse)
    y.backward(torch.tensor([[10.0, 11], [20, 21], [30, 31], [40, 41]]))

    assert y.tolist() == [[4, 5], [0, 1], [6, 7], [2, 3]]
    assert x.grad is not None and x.grad.tolist() == [[20, 21], [40, 41], [10, 11], [30, 31]]


SENT = [[1, 2], [3, 0]]  # rows from rank p to rank q; rank 1 sends itself none


def exchange_rows(rank: int, world_size: int) -> dict[str, Any]:
    send, receive = SENT[rank], [row[rank] for row in SENT]
    assert dist.group.WORLD is not None
    x = (100 * rank + torch.arange(3.0)[:, None] * torch.ones(1, 2)).requires_grad_()
    y = all_to_all_rows(x, send, receive, dist.group.WORLD)
    y.backward(y.detach() + 1000 * rank)

    empty = torch.zeros(0, 2, requires_grad=True)
    nothing = all_to_all_rows(empty, [0, 0], [0, 0], dist.group.WORLD)
    nothing.sum().backward()
    assert x.grad is not None
    return {"rows": y.detach()[:, 0].tolist(), "grad": x.grad[:, 0].tolist(), "empty": list(nothing.shape)}


def test_rows_travel_by_uneven_splits_and_their_gradients_travel_back() -> None:
    first, second = run_ranks(2, exchange_rows)

    assert first["rows"] == [0, 100, 101, 102] and second["rows"] == [1, 2]
    # Each row was given itself + 1000 * (the rank that it went to) as gradient.
    assert first["grad"] == [0, 1001, 1002] and second["grad"] == [100, 101, 102]
    assert first["empty"] == second["empty"] == [0, 2]


class LoggedExchange(Exchange):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.log: list[str] = []

    def begin(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        self.log.append("begin")
        return super().begin(x, send, receive)

    def wait(self) -> Tensor:
        self.log.append("wait")
        return super().wait()


def compute_beside_an_exchange(rank: int, world_size: int) -> dict[str, Any]:
    assert dist.group.WORLD is not None
    exchange = LoggedExchange([1, 2], [1, 1] if rank == 0 else [2, 2], dist.group.WORLD)
    x = (100 * rank + torch.arange(3.0)[:, None] * torch.ones(1, 2)).requires_grad_()
    arriving = exchange.start(x)
    beside = x * 2
    exchange.log.append("beside")
    assert beside.grad_fn is not None
    beside.grad_fn.register_hook(lambda *gradients: exchange.log.append("beside"))
    y = exchange.finish(arriving)
    (y.square().sum() + beside.sum()).backward()
    assert x.grad is not None
    return {"log": exchange.log, "rows": y.detach()[:, 0].tolist(), "grad": x.grad[:, 0].tolist()}


def test_what_stands_beside_an_exchange_is_computed_while_rows_travel_and_while_their_gradients_do() -> None:
    first, second = run_ranks(2, compute_beside_an_exchange)

    for result in (first, second):
        assert result["log"] == ["begin", "beside", "wait", "begin", "beside", "wait"]
    assert first["rows"] == [0, 100] and second["rows"] == [1, 2, 101, 102]
    assert first["grad"] == [2, 4, 6] and second["grad"] == [202, 204, 206]


def fail_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def hang(rank: int, world_size: int) -> None:
    time.sleep(1000)


def test_the_helper_reports_the_traceback_of_the_rank_that_raised_first() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:\nTraceback.*fail_on_rank_one.*ValueError: the reason"):
        run_ranks(2, fail_on_rank_one)


def test_the_helper_ends_a_hang_at_the_time_limit() -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] were still running after 3 s and were killed"):
        run_ranks(2, hang, time_limit=3)
