"""What a model is conditioned on: class labels, or captions as a text encoder encodes them.

The unconditional images of classifier-free guidance have the null label (the number after the last class) or the null
caption (the empty one).

Shape legend: N images; of a text encoder L tokens after padding, E their width, P the width of its pooled vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextCondition:
    """Encoded captions, in the place of class labels."""

    tokens: Tensor  # (N, L, E)
    mask: Tensor  # (N, L) bool, false for padding; every caption has at least one token
    pooled: Tensor | None  # (N, P)
    null: Tensor  # (N,) bool, true for the null caption

    def __len__(self) -> int:
        return len(self.null)

    def map(self, function: Callable[[Tensor], Tensor]) -> TextCondition:
        pooled = None if self.pooled is None else function(self.pooled)
        return TextCondition(function(self.tokens), function(self.mask), pooled, function(self.null))

    def replaced(self, rows_N: Tensor, other: TextCondition) -> TextCondition:
        """These captions, with the one caption `other` in the rows where `rows_N`, (N,) bool, is true."""
        pooled = None
        if self.pooled is not None:
            assert other.pooled is not None
            pooled = torch.where(rows_N[:, None], other.pooled, self.pooled)
        return TextCondition(
            torch.where(rows_N[:, None, None], other.tokens, self.tokens),
            torch.where(rows_N[:, None], other.mask, self.mask),
            pooled,
            torch.where(rows_N, other.null, self.null),
        )


Condition = Tensor | TextCondition  # (N,) int64 class labels, or captions


def is_null(condition: Condition, null_label: int) -> Tensor:
    """(N,) bool: true for unconditional images."""
    return condition.null if isinstance(condition, TextCondition) else condition == null_label


def on_device(condition: Condition, device: torch.device) -> Condition:
    if isinstance(condition, TextCondition):
        return condition.map(lambda tensor: tensor.to(device))
    return condition.to(device)


def join(first: Condition, second: Condition) -> Condition:
    """The conditions of the first batch and then of the second, as one batch."""
    if not isinstance(first, TextCondition):
        assert not isinstance(second, TextCondition)
        return torch.cat([first, second])
    assert isinstance(second, TextCondition)
    pooled = None
    if first.pooled is not None and second.pooled is not None:
        pooled = torch.cat([first.pooled, second.pooled])
    tokens, mask, null = (
        torch.cat([getattr(first, name), getattr(second, name)]) for name in ("tokens", "mask", "null")
    )
    return TextCondition(tokens, mask, pooled, null)
