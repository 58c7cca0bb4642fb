from __future__ import annotations

from functools import cache
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_dist.config.schema import ParallelConfig
from diffmoe_dist.model.routing import LocalPool
from diffmoe_dist.parallel.pool import DistributedPool, experts_per_rank, reply
from tests.distributed import run_ranks

TOKENS = 12  # of each rank
RANKS = 4
GROUPS = {"all": [[0, 1, 2, 3]], "neighbours": [[0, 1], [2, 3]], "strided": [[0, 2], [1, 3]]}
EXPERTS = [3, 4, 8]  # fewer than ranks, as many, more; 3 does not divide over 2 or 4
SCORES = ["different", "heavy ties", "all equal"]
SLOTS = ["one", "some", "all", "some alone", "per expert"]
EXCHANGES: list[Literal["all_to_all", "all_gather", "two_level"]] = ["all_to_all", "all_gather", "two_level"]
LEVELS = "neighbours", "strided"  # of the pool of all ranks
LAYOUTS = [
    (layout, exchange) for layout in GROUPS for exchange in EXCHANGES if exchange != "two_level" or layout == "all"
]


def test_the_owner_replies_with_cutoff_ties_and_the_kth_largest() -> None:
    first = torch.tensor([[0.5, 0.9, 0.5], [0.5, 0.1, 0.7]])  # rank by rank, one expert
    second = torch.tensor([[1.0, -4.0, 3.0], [2.0, 8.0, 0.0]])
    columns_QEKT = torch.stack([first, second], dim=1)[:, None]
    # 0.9 and 0.7 lead; then three tokens at 0.5, the first rank's two before the second rank's one; then 0.1.
    expected = {
        1: ([0.9, 0.9], [1, 0], 8.0, [1, 0]),
        2: ([0.7, 0.7], [0, 1], 3.0, [1, 1]),
        3: ([0.5, 0.5], [1, 0], 2.0, [2, 1]),
        4: ([0.5, 0.5], [2, 0], 1.0, [3, 1]),
        5: ([0.5, 0.5], [2, 1], 0.0, [3, 2]),
        6: ([0.1, 0.1], [0, 1], -4.0, [3, 3]),
    }
    for slots, (cutoff, ties, kth, arrivals) in expected.items():
        replies_QE3, arrivals_EQ = reply(columns_QEKT, slots)

        assert replies_QE3.shape == (2, 1, 3) and replies_QE3.dtype == torch.float32
        assert replies_QE3[:, 0, 0].tolist() == pytest.approx(cutoff)
        assert replies_QE3[:, 0, 1].tolist() == ties
        assert replies_QE3[:, 0, 2].tolist() == [kth, kth]
        assert arrivals_EQ.tolist() == [arrivals]


def test_the_owner_replies_for_each_expert_by_its_own_number_of_slots() -> None:
    column = torch.tensor([[2.0, 1.0], [2.0, 2.0]])
    columns_QEKT = column[:, None, None].expand(2, 4, 1, 2)

    replies_QE3, arrivals_EQ = reply(columns_QEKT, torch.tensor([0, 2, 3, 4]))

    assert replies_QE3[0].tolist() == [[torch.inf, 0, 0], [2, 1, 0], [2, 1, 0], [1, 1, 0]]
    assert replies_QE3[1].tolist() == [[torch.inf, 0, 0], [2, 1, 0], [2, 2, 0], [1, 0, 0]]
    assert arrivals_EQ.tolist() == [[0, 0], [1, 1], [1, 2], [2, 2]]


class Operations(TorchDispatchMode):
    """The names of the operations that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("slots", [3, torch.zeros(0, dtype=torch.int64)], ids=["one number", "per expert"])
def test_an_owner_of_no_expert_asks_for_no_topk_of_no_rows(slots: int | Tensor) -> None:
    with Operations() as computed:
        replies_QE3, arrivals_EQ = reply(torch.empty(4, 0, 1 + isinstance(slots, int), 6), slots)
    with Operations() as usual:
        reply(torch.rand(4, 1, 2, 6), 3)

    assert replies_QE3.shape == (4, 0, 3) and arrivals_EQ.shape == (0, 4) and arrivals_EQ.dtype == torch.int64
    assert not computed.names & {"topk", "sort", "amin"} and "topk" in usual.names


def test_few_scores_are_gathered_and_many_go_over_two_levels_of_many_ranks_unless_a_setting_says_how() -> None:
    few, many = 2**20, 2**20 + 1

    assert ParallelConfig(expert=8).how_scores_travel(few, 64) == "all_gather"
    for ranks, expert, how in (
        (64, 8, "two_level"),
        (56, 8, "all_to_all"),
        (64, 64, "all_to_all"),
        (64, 1, "all_to_all"),
    ):
        assert ParallelConfig(expert=expert).how_scores_travel(many, ranks) == how
    for how in EXCHANGES:
        assert ParallelConfig(score_exchange=how).how_scores_travel(few, 2) == how


@pytest.mark.parametrize(
    ("experts", "ranks", "owned"),
    [(8, 4, [2] * 4), (7, 3, [3, 2, 2]), (3, 4, [1, 1, 1, 0]), (1, 2, [1, 0]), (5, 1, [5])],
)
def test_every_rank_owns_the_same_number_of_experts_or_the_first_ranks_one_more(
    experts: int, ranks: int, owned: list[int]
) -> None:
    assert experts_per_rank(experts, ranks) == owned


def make_scores(kind: str, experts: int, ranks: int, seed: int) -> Tensor:
    """(ranks * TOKENS, experts), rank by rank."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(ranks * TOKENS, experts, generator=generator)
    if kind == "heavy ties":
        scores = (scores * 3).floor() / 4
    elif kind == "all equal":
        scores = torch.full_like(scores, 0.25)
    return scores


def make_slots(kind: str, experts: int, tokens: int) -> int | Tensor:
    if kind == "per expert":
        return torch.tensor([[0, tokens, 5, tokens - 1, 1, 7, 0, tokens // 2]])[:, :experts]
    return {"one": 1, "some": tokens // 3, "some alone": tokens // 3, "all": tokens}[kind]


def has_second(slots_kind: str) -> bool:
    """Whether the case asks for the k-th largest of second scores too."""
    return slots_kind in ("one", "some", "all")


def make_cases(exchange: str) -> list[tuple[str, str, int]]:
    held_by_two = [experts for experts in EXPERTS if exchange != "two_level" or experts % 2 == 0]
    return [(scores, slots, experts) for scores in SCORES for slots in SLOTS for experts in held_by_two]


def select_on_ranks(rank: int, world_size: int) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Every case in every group by both exchanges: this rank's selection. One number of slots: with second scores."""
    results: dict[tuple[Any, ...], dict[str, Any]] = {}
    groups = {layout: [dist.new_group(ranks) for ranks in members] for layout, members in GROUPS.items()}
    my_group = {layout: [rank in ranks for ranks in members].index(True) for layout, members in GROUPS.items()}
    within, across = (groups[layout][my_group[layout]] for layout in LEVELS)
    for layout, exchange in LAYOUTS:
        mine = my_group[layout]
        members = GROUPS[layout][mine]
        ranks, place = len(members), members.index(rank)
        local = slice(place * TOKENS, (place + 1) * TOKENS)
        parallel = ParallelConfig(score_exchange=exchange)
        pool = DistributedPool(groups[layout][mine], parallel, (within, across))
        for scores_kind, slots_kind, experts in make_cases(exchange):
            scores_TN = make_scores(scores_kind, experts, ranks, seed=1 + mine)[local]
            slots = make_slots(slots_kind, experts, ranks * TOKENS)
            second_TN = make_scores("heavy ties", experts, ranks, seed=7 + mine)[local]
            selection = pool.select(scores_TN, slots, second_TN if has_second(slots_kind) else None)
            results[layout, exchange, scores_kind, slots_kind, experts] = vars(selection)
            if slots_kind == "one":
                results[layout, exchange, scores_kind, experts] = {"count": pool.count(scores_TN > 0.4)}
        results[layout, exchange] = {"num_tokens": pool.num_tokens(TOKENS)}
    return results


@cache
def results_of_the_ranks() -> list[dict[tuple[Any, ...], dict[str, Any]]]:
    return run_ranks(RANKS, select_on_ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "exchange"), LAYOUTS)
def test_the_ranks_choose_together_exactly_what_one_pool_of_all_their_tokens_chooses(
    layout: str, exchange: str
) -> None:
    results = results_of_the_ranks()
    for mine, members in enumerate(GROUPS[layout]):
        ranks = len(members)
        for scores_kind, slots_kind, experts in make_cases(exchange):
            scores_TN = make_scores(scores_kind, experts, ranks, seed=1 + mine)
            second_TN = make_scores("heavy ties", experts, ranks, seed=7 + mine)
            slots = make_slots(slots_kind, experts, ranks * TOKENS)
            key = (layout, exchange, scores_kind, slots_kind, experts)
            selections = [results[rank][key] for rank in members]
            chosen_NP = torch.cat([selection["chosen"] for selection in selections], dim=1)
            second = second_TN if has_second(slots_kind) else None
            local = LocalPool().select(scores_TN, slots, second, at_least_zero=True)

            assert torch.equal(chosen_NP, local.chosen), key
            per_expert = [slots] * experts if isinstance(slots, int) else slots[0].tolist()
            assert chosen_NP.sum(dim=1).tolist() == per_expert, key
            for selection in selections:
                assert selection["pool_ranks"] == ranks
                assert selection["slots_per_expert"] == (slots if isinstance(slots, int) else None)
                if has_second(slots_kind):
                    brute = [sorted(column, reverse=True)[slots - 1] for column in second_TN.T.tolist()]
                    assert selection["kth_largest"].tolist() == [brute], key
                    assert local.kth_largest is not None
                    assert torch.equal(selection["kth_largest"], local.kth_largest), key
                else:
                    assert selection["kth_largest"] is None
            for rank in members:
                counted = results[rank][layout, exchange, scores_kind, experts]["count"]
                assert torch.equal(counted, LocalPool().count(scores_TN > 0.4)), key
        assert all(results[rank][layout, exchange]["num_tokens"] == ranks * TOKENS for rank in members)


@pytest.mark.parametrize(("layout", "exchange"), LAYOUTS)
def test_a_rank_knows_how_many_tokens_every_rank_sends_to_its_experts(layout: str, exchange: str) -> None:
    results = results_of_the_ranks()
    for members in GROUPS["neighbours" if exchange == "two_level" else layout]:
        ranks = len(members)
        for scores_kind, slots_kind, experts in make_cases(exchange):
            key = (layout, exchange, scores_kind, slots_kind, experts)
            sent_QN = torch.stack([results[rank][key]["chosen"].sum(dim=1) for rank in members])
            for place, rank in enumerate(members):
                arrivals = results[rank][key]["arrivals"]
                if experts % ranks:
                    assert arrivals is None, key  # such experts are never spread over these ranks
                else:
                    held = experts // ranks
                    assert torch.equal(arrivals, sent_QN[:, place * held : (place + 1) * held]), key


def test_the_cases_of_the_ranks_split_ties_and_leave_a_rank_without_any_token() -> None:
    results = results_of_the_ranks()
    key = ("all", "all_to_all", "all equal", "some", 4)

    sent = [results[rank][key]["chosen"].sum(dim=1).tolist() for rank in range(RANKS)]

    assert sent == [[12] * 4, [4] * 4, [0] * 4, [0] * 4]  # 16 slots of 48 equal tokens: the lower ranks first
