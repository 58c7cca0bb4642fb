"""Counts what a rank hands to torch.distributed: each collective's calls, bytes and seconds, whoever calls it.

It stands between torch's functions and the process groups, so DeepSpeed's collectives and functions that were imported
under another name are counted too.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

# The methods of a process group, by the name that the planner gives such a collective; older torch has other names.
_KINDS = {
    "allreduce": "all-reduce",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "all_to_all_single": "all-to-all",
    "alltoall_base": "all-to-all",
    "all_gather_single": "all-gather",
    "_allgather_base": "all-gather",
    "reduce_scatter_single": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
}
# Bytes that a rank sends for each byte of payload, in a group of n: direct all-to-all, rings, the mean over the roots.
SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
}


@dataclass
class Count:
    """Of one kind of collective in groups of one size."""

    calls: int = 0
    payload: int = 0  # bytes that the rank hands over; of an all-gather, what it has in the end
    seconds: float = 0.0  # in the call and in the wait for its end, also for ranks that come late

    def sent(self, kind: str, ranks: int) -> float:
        return SENT[kind](ranks) * self.payload


Counts = dict[tuple[str, int], Count]  # (kind, ranks of the group)


class _Work:
    """A collective going on; its wait is timed."""

    def __init__(self, work: Any, count: Count) -> None:
        self._work, self._count = work, count

    def wait(self, *arguments: Any) -> Any:
        begun = time.perf_counter()
        try:
            return self._work.wait(*arguments)
        finally:
            self._count.seconds += time.perf_counter() - begun

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def counted() -> Iterator[Counts]:
    """Collectives within, on groups of two ranks and more; those of single numbers, too."""
    counts: Counts = defaultdict(Count)
    methods = {name: _method(name, counts) for name in _KINDS if hasattr(dist.ProcessGroup, name)}
    with mock.patch.multiple(dist.ProcessGroup, **methods):
        yield counts


def _method(name: str, counts: Counts) -> Any:
    original, kind = getattr(dist.ProcessGroup, name), _KINDS[name]

    def call(group: Any, *arguments: Any, **named: Any) -> Any:
        if group.size() == 1:
            return original(group, *arguments, **named)
        count = counts[kind, group.size()]
        count.calls += 1
        count.payload += _payload(kind, arguments)
        begun = time.perf_counter()
        work = original(group, *arguments, **named)
        count.seconds += time.perf_counter() - begun
        return _Work(work, count)

    return call


def _payload(kind: str, arguments: tuple[Any, ...]) -> int:
    """Reductions and broadcasts are given a list of one tensor, the others the output and then the input."""
    first, second = arguments[0], arguments[1]
    tensor: Tensor = first[0] if isinstance(first, list) else first if kind == "all-gather" else second
    return tensor.numel() * tensor.element_size()
