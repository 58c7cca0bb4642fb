"""Where a rank's slice of a parameter stands in the whole; nothing here knows a process group."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CUT = re.compile(
    r"blocks\.\d+\.(attn\.(qkv\.|proj\.weight)|cross_attn\.(q\.|kv\.|proj\.weight)"
    r"|mlp\.(shared\.)?(fc1\.|fc2\.weight|gate_proj\.|up_proj\.|down_proj\.))"
)


def is_cut(name: str) -> bool:
    """Whether tensor parallelism leaves a rank only a slice of the parameter of this name."""
    return _CUT.match(name) is not None


@dataclass(frozen=True)
class Columns:
    """Some neighbouring columns of a matrix."""

    first: int
    count: int
    of: int  # columns of the whole matrix

    def rectangles(self, start: int, length: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Elements `start` to `start + length` of these columns, flattened, as at most three rectangles in order.

        Yields:
            (row, column) in the whole matrix, and (height, width).
        """
        end = start + length
        while start < end:
            row, column = divmod(start, self.count)
            rows = (end - start) // self.count if column == 0 else 0
            width = self.count if rows else min(self.count - column, end - start)
            yield (row, self.first + column), (max(rows, 1), width)
            start += max(rows, 1) * width


@dataclass(frozen=True)
class Slice:
    """One of `ranks` equal slices of a parameter along dimension 0 or 1, of each of its `parts`, equal too."""

    dim: int
    rank: int
    ranks: int
    parts: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """The slice of a whole parameter."""
        parts = whole.chunk(self.parts, self.dim)
        return torch.cat([part.chunk(self.ranks, self.dim)[self.rank] for part in parts], self.dim)

    def intervals(self, shape: torch.Size) -> list[tuple[int, int, int]]:
        """Of a slice along dimension 0, of that shape: (place in it, place in the whole, elements), all flattened."""
        assert self.dim == 0
        size = math.prod(shape) // self.parts
        return [(part * size, (part * self.ranks + self.rank) * size, size) for part in range(self.parts)]

    def columns(self, shape: torch.Size) -> Columns:
        """Of a slice of a matrix along dimension 1, of that shape."""
        assert self.dim == 1 and self.parts == 1
        return Columns(self.rank * shape[1], shape[1], self.ranks * shape[1])
