from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from diffmoe_dist.data.order import (
    BLOCK_SAMPLES,
    WINDOW_BLOCKS,
    WINDOW_SAMPLES,
    BatchSplit,
    EpochOrder,
    MixtureOrder,
    StreamOrder,
)
from diffmoe_dist.data.randomness import Stream, sample_generator
from diffmoe_dist.errors import UserError

GOLDEN = [614, 1009, 954, 1150, 948, 1481, 1762, 852]
GOLDEN_OF_THREE_WINDOWS = [4352, 1380, 3832, 1856, 4687, 3223]
GOLDEN_UNIFORMS = [0.21185954403345741, 0.21554582036140135, 0.7558994834676926]


def _order(num_samples: int, seed: int = 0, epoch: int = 0) -> list[int]:
    order = EpochOrder(num_samples, seed, epoch)
    return [order[place] for place in range(num_samples)]


@pytest.mark.parametrize("num_samples", [1, 2, 63, 64, 65, 1797, 2048, 2049, 5000])
@pytest.mark.parametrize("epoch", range(4))
def test_an_epoch_visits_every_sample_exactly_once(num_samples: int, epoch: int) -> None:
    assert sorted(_order(num_samples, epoch=epoch)) == list(range(num_samples))


@pytest.mark.parametrize("num_samples", [65, 4999, 5000])
def test_places_may_be_read_in_any_order(num_samples: int) -> None:
    expected = _order(num_samples, epoch=1)
    order = EpochOrder(num_samples, 0, 1)
    for place in np.random.default_rng(0).permutation(num_samples)[:300].tolist():
        assert order[place] == expected[place]


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [_order(1797, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_and_the_uniforms_are_the_same_for_ever() -> None:
    assert _order(1797)[:8] == GOLDEN
    order = EpochOrder(5000, 7, 3)
    assert [order[place] for place in (0, 2047, 2048, 4095, 4096, 4999)] == GOLDEN_OF_THREE_WINDOWS
    assert sample_generator(0, Stream.TRAINING, 0, 0).random(3).tolist() == GOLDEN_UNIFORMS


def test_a_window_reads_from_few_places_on_disk() -> None:
    order = _order(300 * BLOCK_SAMPLES)
    for start in range(0, len(order), WINDOW_SAMPLES):
        blocks = {sample // BLOCK_SAMPLES for sample in order[start : start + WINDOW_SAMPLES]}
        assert len(blocks) <= WINDOW_BLOCKS


def test_an_order_of_ten_million_samples_is_cheap_in_memory() -> None:
    tracemalloc.start()
    order = EpochOrder(10_000_000, 0, 0)
    assert 0 <= order[9_999_999] < 10_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000  # bytes


@pytest.mark.parametrize("place", [-1, 100])
def test_a_place_outside_the_epoch_is_an_index_error(place: int) -> None:
    with pytest.raises(IndexError):
        EpochOrder(100, 0, 0)[place]


def test_the_stream_carries_an_epochs_tail_into_the_next_one() -> None:
    stream = StreamOrder(5, seed=3)
    found = [stream[position] for position in range(15)]
    assert found == [(epoch, sample) for epoch in range(3) for sample in _order(5, 3, epoch)]
    assert stream[2] == found[2]  # also after its epoch has left the cache


def test_a_mixture_deals_out_positions_by_weight() -> None:
    # Shares of what is left: 1/2, then 1/2, then all. Position 0 goes to 2, 1 to 0, 2 to 1, 3 to 0, and again.
    order = MixtureOrder([3, 4, 5], [2, 1, 1], seed=0)
    assert [order[position][0] for position in range(8)] == [2, 0, 1, 0] * 2
    uneven = MixtureOrder([10, 10, 10], [0.1, 0.2, 0.7], seed=0)
    for end in (10, 100, 1000):
        found = [uneven[position][0] for position in range(end)]
        assert [found.count(dataset) for dataset in range(3)] == [end // 10, end // 5, end * 7 // 10]
    assert uneven[10**15][0] in range(3)


def test_each_data_set_of_a_mixture_follows_a_stream_of_its_own() -> None:
    order = MixtureOrder([100, 100], [3, 1], seed=4)
    found = [order[position] for position in range(800)]
    first, second = ([name[1:] for name in found if name[0] == dataset] for dataset in range(2))
    assert first == [StreamOrder(100, 4)[place] for place in range(600)]
    assert sorted(second[:100]) == [(0, sample) for sample in range(100)] and second[:100] != first[:100]


def test_a_rank_takes_its_run_of_every_micro_step() -> None:
    # 8 images a step in micro-steps of 2 ranks x 2: [100..103], [104..107]; rank 1 has the second half of each.
    assert BatchSplit(8, 2, 0, 2).positions(100) == [range(100, 102), range(104, 106)]
    assert BatchSplit(8, 2, 1, 2).positions(100) == [range(102, 104), range(106, 108)]
    assert BatchSplit(8, 2, 3, 4).positions(0) == [range(6, 8)]
    assert BatchSplit(3, 1, 0, 1).positions(7) == [range(7, 8), range(8, 9), range(9, 10)]


@pytest.mark.parametrize(("global_batch_size", "micro_batch_size"), [(6, 2), (2, 2), (0, 2), (8, 0)])
def test_a_global_batch_that_does_not_divide_is_refused(global_batch_size: int, micro_batch_size: int) -> None:
    with pytest.raises(UserError, match="train.global_batch_size="):
        BatchSplit(global_batch_size, micro_batch_size, 0, 2)


def test_every_sample_epoch_stream_and_seed_has_its_own_numbers() -> None:
    names = [(0, Stream.TRAINING, 0, 0), (1, Stream.TRAINING, 0, 0), (0, Stream.PACKING, 0, 0)]
    names += [(0, Stream.TRAINING, 1, 0), (0, Stream.TRAINING, 0, 1), (2**63 - 1, Stream.TRAINING, 0, 0)]
    drawn = np.concatenate([sample_generator(*name).random(100) for name in names])
    assert len(np.unique(drawn)) == len(drawn)
    np.testing.assert_array_equal(sample_generator(*names[1]).random(100), drawn[100:200])


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=f"seed={seed}"):
        sample_generator(seed, Stream.TRAINING, 0, 0)
