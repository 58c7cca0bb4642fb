"""Randomness as a function: the numbers of a sample depend on seed, epoch and sample alone."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from diffmoe_dist.errors import UserError

SEED_LIMIT = 2**63


class Stream(IntEnum):
    """What the numbers are for; two streams never share a number. The values are part of every run: do not renumber."""

    ORDER = 0
    TRAINING = 1
    PACKING = 2
    SAMPLING = 3
    REPLACEMENT = 4
    STREAMED_SHARDS = 5
    STEP_TIME = 6


def philox(seed: int, stream: Stream, epoch: int, index: int) -> np.random.Philox:
    """The counter-based bit generator of one (seed, stream, epoch, index).

    The lowest counter word counts the blocks that were taken (four 64-bit numbers each) and the other three name the
    generator, so two of them never overlap, however many numbers are taken from either.
    Raises UserError for a seed outside 0..2**63-1.
    """
    if not 0 <= seed < SEED_LIMIT:
        raise UserError(f"seed={seed}: out of range; use an integer from 0 to 2**63-1")
    key = np.array([seed, 0], dtype=np.uint64)
    counter = np.array([0, stream, epoch, index], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def sample_generator(seed: int, stream: Stream, epoch: int, sample_id: int) -> np.random.Generator:
    """The generator of one sample in one epoch: independent of rank, worker, micro-batch and resume."""
    return np.random.Generator(philox(seed, stream, epoch, sample_id))


def permutation(length: int, seed: int, stream: Stream, epoch: int = 0, index: int = 0) -> np.ndarray:
    """A random permutation of 0..length-1, int64, the same under every version of numpy.

    numpy promises the raw output of a bit generator for ever, but not what `Generator.permutation` makes of it;
    a stable argsort of raw 64-bit numbers depends on the promise alone (ties, one in 2**64, keep their order).
    """
    raw = philox(seed, stream, epoch, index).random_raw(length)
    return np.argsort(raw, kind="stable")
