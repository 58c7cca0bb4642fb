"""The exponential moving average of the weights: fp32, and cut over the ranks as ZeRO cuts the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffmoe_dist.engine.sharded_state import EMA, MASTER, ShardedState
from diffmoe_dist.parallel.topology import all_gather


class WeightAverage:
    """Averages the fp32 weights after each optimizer step. Capacity thresholds are no weights and stay as they are."""

    def __init__(self, state: ShardedState, decay: float) -> None:
        self.state = state
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        averages, weights = self.state.flat[EMA], self.state.flat[MASTER]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model compute with the averaged weights; afterwards it has its own again, bit for bit. Collective."""
        zero = self.state.zero
        flats = zero.bit16_groups_flat  # the model's parameters are views of these
        groups = zero.real_dp_process_group
        own = [flat.clone() for flat in flats]
        for flat, average, group in zip(flats, self.state.flat[EMA], groups, strict=True):
            all_gather(flat, average.to(flat.dtype), group=group)
        try:
            yield
        finally:
            for flat, weights in zip(flats, own, strict=True):
                flat.copy_(weights)
