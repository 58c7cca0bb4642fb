"""Averages of the weights over the steps: fp32, and cut over the ranks as ZeRO cuts the weights.

One is exponential, that of `ema.decay`; `ema.decays` are more of them, and `ema.lengths` are averages by a power
function (EDM2, arXiv 2312.02696, section 3), from which `post_hoc` makes those of other lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from diffmoe_dist.config import EMAConfig
from diffmoe_dist.config.checks import LONGEST_AVERAGE
from diffmoe_dist.engine.sharded_state import EMA, MASTER, ShardedState
from diffmoe_dist.errors import UserError
from diffmoe_dist.parallel.topology import all_gather


def averages(ema: EMAConfig) -> dict[str, Callable[[int], float]]:
    """By the kind of state that each average is, how much of the newest weights it takes after an update, from 1 on."""

    def exponential(decay: float) -> Callable[[int], float]:
        return lambda update: 1 - decay

    def power(exponent: float) -> Callable[[int], float]:
        return lambda update: 1 - (1 - 1 / update) ** (exponent + 1)

    kinds = {EMA: exponential(ema.decay)}
    kinds |= {_kind("decay", decay): exponential(decay) for decay in ema.decays if decay != ema.decay}
    return kinds | {_kind("length", length): power(exponent_of(length)) for length in ema.lengths}


def stored_average(ema: EMAConfig, decay: float | None = None, length: float | None = None) -> str:
    """The kind of state that is the average with this decay, or of this length; without either that of `ema.decay`.

    Raises:
        UserError: a run with these settings has no such average.
    """
    if decay is not None and decay not in (ema.decay, *ema.decays):
        kept = ", ".join(f"{other:g}" for other in dict.fromkeys((ema.decay, *ema.decays)))
        raise UserError(f"--ema-decay {decay:g}: this run has averages with decay {kept}; choose one")
    if length is not None and length not in ema.lengths:
        kept = ", ".join(f"{other:g}" for other in ema.lengths)
        has = f"has averages of length {kept}; choose one, or make" if kept else "has no ema.lengths; they make"
        raise UserError(
            f"--ema-length {length:g}: this run {has} another one by diffmoe_dist.convert --to safetensors --ema-length"
        )
    if length is not None:
        return _kind("length", length)
    return EMA if decay in (None, ema.decay) else _kind("decay", decay or 0.0)


def exponent_of(length: float) -> float:
    """The exponent of the power function whose standard deviation is this part of all steps (EDM2 eq. 123 to 126)."""
    assert 0 < length <= LONGEST_AVERAGE, length
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def _kind(what: str, value: float) -> str:
    return f"ema_{what}_{value!r}".replace(".", "_")  # a dot ends the kind in a fragment's name


class WeightAverages:
    """Average the fp32 weights after each optimizer step. Capacity thresholds are no weights and stay as they are."""

    def __init__(self, state: ShardedState, ema: EMAConfig) -> None:
        self.state = state
        self.averages = averages(ema)

    @torch.no_grad()
    def update(self, update: int) -> None:
        """After the update of this number, the first of the run being 1."""
        for kind, weight in self.averages.items():
            torch._foreach_lerp_(self.state.flat[kind], self.state.flat[MASTER], weight(update))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model compute with the average of `ema.decay`; then it has its own weights again. Collective."""
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
