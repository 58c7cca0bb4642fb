"""The order of samples: a pure function of (numbers of samples, weights, seed, position), computed window by window.

Training follows one endless stream of positions: position p is epoch p // n, place p % n. An epoch's tail is carried
over into the next batch, never dropped, so "images seen" is the whole state of the data. Several data sets share the
positions by their weights, and each follows a stream of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from diffmoe_dist.data.randomness import Stream, permutation
from diffmoe_dist.errors import UserError

BLOCK_SAMPLES = 64  # contiguous in the shards, hence read from one place of the disk
WINDOW_BLOCKS = 32
WINDOW_SAMPLES = BLOCK_SAMPLES * WINDOW_BLOCKS
_CACHED_EPOCHS = 2  # a batch may straddle two
_MAX_WINDOWS = 2**40  # of an epoch: the room that each data set of a mixture has for its permutations


class EpochOrder:
    """The order of one epoch: `order[place]` is a sample id, and every sample has exactly one place.

    Blocks of 64 contiguous samples are permuted, then the samples are shuffled inside windows of 32 permuted blocks.
    Holds the permutation of the blocks, n/64 numbers, and the window read last. `dataset` numbers the data sets of a
    mixture, which are ordered independently.
    """

    def __init__(self, num_samples: int, seed: int, epoch: int, dataset: int = 0) -> None:
        assert num_samples > 0 and epoch >= 0, (num_samples, epoch)
        self.num_samples, self.seed, self.epoch = num_samples, seed, epoch
        self._first_index = dataset * _MAX_WINDOWS
        num_blocks = -(-num_samples // BLOCK_SAMPLES)
        self._blocks = permutation(num_blocks, seed, Stream.ORDER, epoch, self._first_index).astype(np.int32)
        # The last block may be short and may land anywhere: the windows after it begin that much earlier.
        self._missing = num_blocks * BLOCK_SAMPLES - num_samples
        short_window = int(np.flatnonzero(self._blocks == num_blocks - 1)[0]) // WINDOW_BLOCKS
        self._short_window_end = (short_window + 1) * WINDOW_SAMPLES - self._missing
        self._window_start, self._window = 0, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, place: int) -> int:
        offset = place - self._window_start
        if not 0 <= offset < len(self._window):
            self._compute_window(place)
            offset = place - self._window_start
        return int(self._window[offset])

    def _compute_window(self, place: int) -> None:
        if not 0 <= place < self.num_samples:
            raise IndexError(f"place {place} outside an epoch of {self.num_samples} samples")
        missing = 0 if place < self._short_window_end else self._missing
        window = (place + missing) // WINDOW_SAMPLES
        blocks = self._blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
        samples = (blocks[:, None].astype(np.int64) * BLOCK_SAMPLES + np.arange(BLOCK_SAMPLES)).reshape(-1)
        samples = samples[samples < self.num_samples]
        index = self._first_index + 1 + window  # the first one is the blocks'
        shuffle = permutation(len(samples), self.seed, Stream.ORDER, self.epoch, index)
        self._window_start, self._window = window * WINDOW_SAMPLES - missing, samples[shuffle]


class StreamOrder:
    """The endless stream: `order[position]` is (epoch, sample id)."""

    def __init__(self, num_samples: int, seed: int, dataset: int = 0) -> None:
        self.num_samples, self.seed, self.dataset = num_samples, seed, dataset
        self._epochs: dict[int, EpochOrder] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.num_samples)
        order = self._epochs.get(epoch)
        if order is None:
            order = EpochOrder(self.num_samples, self.seed, epoch, self.dataset)
            if len(self._epochs) == _CACHED_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = order
        return epoch, order[place]


class MixtureOrder:
    """The endless stream of several data sets: `order[position]` is (data set, epoch and sample id in that data set).

    A data set has its share of any run of positions to within a sample for each data set before it, and goes through
    its own samples epoch by epoch, so each comes once before any comes twice.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(sizes) == len(weights) and min(weights) > 0, (sizes, weights)
        exact = [Fraction(str(weight)) for weight in weights]  # the decimal that was written, not its binary neighbour
        # Of the positions that the data sets before it leave, the share that each one takes; the last one takes all.
        self._shares = [weight / sum(exact[dataset:]) for dataset, weight in enumerate(exact)]
        self._orders = [StreamOrder(size, seed, dataset) for dataset, size in enumerate(sizes)]

    def __getitem__(self, position: int) -> tuple[int, int, int]:
        for dataset, share in enumerate(self._shares):
            # floor(p * share) of the positions before p are this one's, and p is where that number grows.
            place = position * share.numerator // share.denominator
            if (position + 1) * share.numerator // share.denominator > place:
                return dataset, *self._orders[dataset][place]
            position -= place
        raise AssertionError("the last share is 1")


@dataclass(frozen=True)
class BatchSplit:
    """How the data-parallel ranks split a global batch: in each micro-step, every rank takes one micro-batch.

    Raises UserError where the micro-batches of all ranks do not divide the global batch.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, self
        micro_step = self.micro_batch_size * self.world_size
        if micro_step < 1 or self.global_batch_size < 1 or self.global_batch_size % micro_step:
            raise UserError(
                f"train.global_batch_size={self.global_batch_size}: not a positive multiple of train.micro_batch_size="
                f"{self.micro_batch_size} times {self.world_size} data-parallel ranks; "
                f"use a multiple of {max(micro_step, 1)}"
            )

    def positions(self, images_seen: int) -> list[range]:
        """The stream positions that this rank takes in the optimizer step after `images_seen`: a range a micro-step.

        With M = micro_batch_size * world_size, micro-step a covers [images_seen + a*M, images_seen + (a+1)*M) on all
        ranks together, and rank r takes the r-th run of micro_batch_size positions inside it.
        """
        assert images_seen >= 0, images_seen
        first = images_seen + self.rank * self.micro_batch_size
        starts = range(first, first + self.global_batch_size, self.micro_batch_size * self.world_size)
        return [range(start, start + self.micro_batch_size) for start in starts]
