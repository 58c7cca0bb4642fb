"""Means, paired differences and their intervals. Pairs are runs of one seed: the same data, noise, times and start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95

Values = Mapping[int, float]  # of a system, by seed


@dataclass(frozen=True)
class Estimate:
    """A mean with the half width of its interval, which one value alone has not."""

    mean: float
    half_width: float | None
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def t_quantile(degrees_of_freedom: int) -> float:
    """What a t-distributed number exceeds in absolute value with a chance of 5 %."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom))


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of independent values, its interval by Student's t."""
    n = len(values)
    if n < 2:
        return Estimate(fmean(values), None, n)
    return Estimate(fmean(values), t_quantile(n - 1) * stdev(values) / math.sqrt(n), n)


def paired_difference(first: Values, second: Values) -> Estimate | None:
    """first - second over the seeds that both have, by Student's t of the differences; None: they share none."""
    seeds = sorted(first.keys() & second.keys())
    return mean_of([first[seed] - second[seed] for seed in seeds]) if seeds else None


@dataclass(frozen=True)
class Spread:
    """What seeds do to a system beside what they do to all of them, estimated from all systems together."""

    deviation: float
    degrees_of_freedom: int

    def half_width(self, n: int) -> float:
        """Of the interval of a difference of two systems over n common seeds."""
        return t_quantile(self.degrees_of_freedom) * self.deviation * math.sqrt(2 / n)


def common_spread(systems: Sequence[Values]) -> Spread | None:
    """The residual deviation of value = system + seed, over the seeds that all systems have; None with fewer than two.

    It supposes that all systems scatter alike. Its many degrees of freedom make far narrower intervals than the two
    that three seeds of one pair leave.
    """
    seeds = sorted(set.intersection(*(set(values) for values in systems))) if systems else []
    if len(seeds) < 2 or len(systems) < 2:
        return None
    table = [[values[seed] for seed in seeds] for values in systems]
    of_system = [fmean(row) for row in table]
    of_seed = [fmean(column) for column in zip(*table, strict=True)]
    overall = fmean(of_system)
    squares = sum(
        (table[row][column] - of_system[row] - of_seed[column] + overall) ** 2
        for row in range(len(table))
        for column in range(len(seeds))
    )
    degrees_of_freedom = (len(table) - 1) * (len(seeds) - 1)
    return Spread(math.sqrt(squares / degrees_of_freedom), degrees_of_freedom)
