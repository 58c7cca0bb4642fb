"""Averages of the weights of any length, after the run: by the averages that its checkpoints hold.

EDM2 (arXiv 2312.02696, section 3 and appendix C): an average is a weighting of the steps, and the weighting that is
asked for is fitted by those that are stored, in the sense of least squares. The weightings here are those of single
steps, of which the paper's power functions are the limit for long runs; and the coefficients have the sum 1, which the
paper's come close to where the fit is good: else the weights would shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffmoe_dist.config import Config, load_config
from diffmoe_dist.config.checks import LONGEST_AVERAGE
from diffmoe_dist.engine.checkpoint import read_checkpoint_model
from diffmoe_dist.engine.ema import exponent_of, stored_average
from diffmoe_dist.engine.progress import complete_checkpoints, read_progress
from diffmoe_dist.engine.sharded_state import MASTER
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.freezing import frozen_parameters

WORST_FIT = 0.1  # relative distance of the weightings, beyond which the result is another average than was asked for
_STEPS_AT_ONCE = 2**14
_SMALLEST = 1e-10  # singular value, relative: smaller ones are rounding, and would need large coefficients


@dataclass(frozen=True)
class Weighting:
    """How much of the weights after each update is in an average by a power function."""

    updates: int
    length: float


@dataclass(frozen=True)
class Fit:
    """What a reconstructed average is made of."""

    sources: dict[tuple[str, float], float]  # (checkpoint, length of a stored average) to coefficient
    error: float  # relative distance of the weighting from the one asked for


def read_average(checkpoint: Path, length: float) -> tuple[DiT, Config, Fit]:
    """The model of the average of this length at a checkpoint, by the averages in it and in those before it.

    Raises:
        UserError: its run has no `ema.lengths`, or the checkpoints kept cannot make this average.
    """
    if not 0 < length <= LONGEST_AVERAGE:
        raise UserError(f"--ema-length {length:g}: choose a number above 0, at most {LONGEST_AVERAGE}")
    stored = _stored(checkpoint)
    wanted = Weighting(read_progress(checkpoint).updates, length)
    numbers, error = fit(list(stored.values()), wanted)
    if error > WORST_FIT:
        raise UserError(
            f"--ema-length {length:g}: the {len(stored)} averages in the checkpoints of {checkpoint.parent} give one "
            f"that is {error:.0%} apart from it; keep more checkpoints (checkpoint.keep_every), or choose a length "
            "between those of ema.lengths"
        )
    used = {source: number for source, number in zip(stored, numbers, strict=True) if number}
    model, config = read_checkpoint_model(checkpoint, "cpu", MASTER)  # whose thresholds are those of training
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.named_parameters()}
    for (path, of_length), number in used.items():
        kind = stored_average(load_config(path / "config.yaml", stored=True).ema, length=of_length)
        for name, value in read_checkpoint_model(path, "cpu", kind)[0].named_parameters():
            sums[name] += number * value.double()
    frozen = frozen_parameters(config)  # of which the weights are every average, to the bit
    for name, parameter in model.named_parameters():
        if name not in frozen:
            parameter.copy_(sums[name])
    return model, config, Fit({(path.name, of): number for (path, of), number in used.items()}, error)


def _stored(checkpoint: Path) -> dict[tuple[Path, float], Weighting]:
    """The averages by power functions in a checkpoint and those before it, the newest first."""
    found: dict[tuple[Path, float], Weighting] = {}
    for path in reversed(complete_checkpoints(checkpoint.parent) or [checkpoint]):
        if path.name > checkpoint.name:
            continue
        updates = read_progress(path).updates
        for length in load_config(path / "config.yaml", stored=True).ema.lengths if updates else ():
            weighting = Weighting(updates, length)
            if weighting not in found.values():  # steps whose updates were left out change no average
                found[path, length] = weighting
    if not found:
        raise UserError(
            f"--ema-length: {checkpoint} has no averages by power functions to make one of; a run with "
            "ema.lengths=[0.05,0.1] keeps some"
        )
    return found


def fit(stored: Sequence[Weighting], wanted: Weighting) -> tuple[list[float], float]:
    """The coefficients, of sum 1, by which stored averages come closest to the wanted one, and how far apart it is."""
    same = [weighting == wanted or weighting.updates == wanted.updates == 1 for weighting in stored]
    if any(same):  # averages of one update are all that update
        return [float(place == same.index(True)) for place in range(len(stored))], 0.0
    products = _products([*stored, wanted])
    others = np.eye(len(products))[1:] - np.eye(len(products))[0]  # as differences from the first: so the sum stays 1
    apart = others @ products @ others.T
    scale = np.sqrt(np.diag(apart))
    apart /= scale[:, None] * scale
    among, with_wanted = apart[:-1, :-1], apart[:-1, -1]
    solved = np.linalg.lstsq(among, with_wanted, rcond=_SMALLEST)[0]
    square = (1 - 2 * solved @ with_wanted + solved @ among @ solved) * scale[-1] ** 2 / products[-1, -1]
    coefficients = (solved * scale[-1] / scale[:-1]).tolist()
    return [1 - sum(coefficients), *coefficients], float(np.sqrt(max(square, 0.0)))


def _products(weightings: Sequence[Weighting]) -> np.ndarray:
    """Their inner products, (n, n) fp64."""
    last = max(weighting.updates for weighting in weightings)
    products = np.zeros((len(weightings), len(weightings)))
    for first in range(1, last + 1, _STEPS_AT_ONCE):
        updates = np.arange(first, min(first + _STEPS_AT_ONCE, last + 1), dtype=np.float64)
        rows = np.stack([of_updates(weighting, updates) for weighting in weightings])
        products += rows @ rows.T
    return products


def of_updates(weighting: Weighting, updates: np.ndarray) -> np.ndarray:
    """(k / n)^p - ((k - 1) / n)^p for each update k, n being the last one: what is in the average of the weights."""
    power = exponent_of(weighting.length) + 1
    with np.errstate(divide="ignore"):  # the logarithm of 0, of the first update
        part = (updates / weighting.updates) ** power * -np.expm1(power * np.log1p(-1 / updates))
    return np.where(updates <= weighting.updates, part, 0.0)
