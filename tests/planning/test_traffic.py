"""Bytes within and between nodes, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diffmoe_dist.planning.estimate import Plan
from diffmoe_dist.planning.step_time import transfer_seconds
from diffmoe_dist.planning.traffic import Transfer
from tests.planning.plans import H100, plan_of


def rows_of(plan: Plan) -> Transfer:
    return next(transfer for transfer in plan.transfers if transfer.name == "tokens to experts and back")


def test_intra_node_and_inter_node_bytes_follow_from_consecutive_ranks() -> None:
    one_node, two_nodes = (plan_of({"parallel": {"expert": 4}}, 4, gpus) for gpus in (4, 2))
    # A row in four stays on its rank. Of the other three ranks, one is on the same node of two.
    payload = rows_of(one_node).payload
    assert (rows_of(one_node).intra_node, rows_of(one_node).inter_node) == (payload * 3 / 4, 0)
    assert (rows_of(two_nodes).intra_node, rows_of(two_nodes).inter_node) == (payload / 4, payload / 2)
    # Groups of two consecutive ranks stay within nodes of two.
    assert rows_of(plan_of({"parallel": {"expert": 2}}, 4, 2)).inter_node == 0


def test_a_ring_crosses_nodes_once_each_and_expert_data_groups_at_every_edge() -> None:
    transfers = {t.name: t for t in plan_of({"parallel": {"expert": 2}}, 4, 2).transfers}
    dense, experts = transfers["gradients, dense"], transfers["gradients, experts"]
    # Reducing b bytes to 4 owners sends 3/4 b of each rank; 2 of the 4 edges of ring 0 1 2 3 leave a node.
    assert dense.sent == pytest.approx(0.75 * dense.payload)
    assert dense.inter_node == pytest.approx(dense.sent / 2)
    # The groups 0 2 and 1 3 have a rank on either node.
    assert (experts.sent, experts.intra_node) == (experts.payload / 2, 0)


def test_without_sharded_experts_no_row_travels() -> None:
    assert not any(transfer.kind == "all-to-all" for transfer in plan_of({"moe": {"pool": "rank"}}, 2).transfers)
    assert plan_of({}, 1).transfers == []


def test_reductions_in_the_order_of_the_ring_pass_around_it_twice_and_not_once_each() -> None:
    plan = plan_of({"train": {"global_batch_size": 64}, "moe": {"pool": "rank"}}, 64, 8)
    reduced, gathered = (
        next(t for t in plan.transfers if t.name == f"{name}, all") for name in ("gradients", "parameters")
    )
    assert (reduced.calls, gathered.calls, gathered.steps) == (64, 1, 63)
    assert reduced.calls * reduced.steps <= 3 * 64 + reduced.calls


@pytest.mark.parametrize(("experts", "busiest"), [(4, 2), (8, 1), (6, 8 / 6), (12, 16 / 12)])
def test_ranks_that_own_experts_get_the_scores_where_others_own_fewer_or_none(experts: int, busiest: float) -> None:
    settings = {"moe": {"num_experts": experts}, "parallel": {"score_exchange": "all_to_all"}}
    plan = plan_of(settings, 8)
    (scores,) = (transfer for transfer in plan.transfers if transfer.name == "scores and cutoffs")
    assert scores.busiest == pytest.approx(busiest)
    assert transfer_seconds(scores, H100) > transfer_seconds(replace(scores, busiest=busiest / 2), H100)
