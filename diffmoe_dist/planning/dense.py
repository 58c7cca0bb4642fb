"""Dense models to compare a mixture of experts with: of as many activated parameters, or of as much arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from diffmoe_dist.config import Config
from diffmoe_dist.config.router import MoEConfig
from diffmoe_dist.model.accounting import Accounting, account

What = Literal["activated parameters", "arithmetic"]


@dataclass(frozen=True)
class DenseModel:
    """One with `moe.router: dense`, no other setting of `moe`, and these."""

    equal: What  # the nearest that there is
    settings: dict[str, float | int | None]
    parameters: int
    macs: float  # of linear layers and attention, a forward pass of one image


def equal_dense_models(config: Config, capacity: float) -> Iterator[DenseModel]:
    """By the hidden width of the MLPs, and by the width of the model; depth, heads and everything else stay.

    Args:
        config: of a mixture of experts.
        capacity: C, experts per token.
    """
    dense = replace(config, moe=MoEConfig())
    counts: dict[What, Callable[[Accounting], float]] = {
        "activated parameters": lambda counted: counted.activated(capacity),
        "arithmetic": lambda counted: all_macs(counted, capacity),
    }
    of_mixture = account(config)
    for what, count in counts.items():
        for candidate in (_by_ratio(dense, count, count(of_mixture)), _by_width(dense, count, count(of_mixture))):
            counted = account(candidate)
            settings: dict[str, float | int | None] = {"model.mlp_ratio": candidate.model.mlp_ratio}
            if candidate.model.hidden_size != dense.model.hidden_size:
                names = ("size", "depth", "hidden_size", "num_heads")
                settings = {f"model.{name}": getattr(candidate.model, name) for name in names}
            yield DenseModel(what, settings, counted.total, all_macs(counted, 0.0))


def all_macs(counted: Accounting, capacity: float) -> float:
    """Multiply-accumulates of a forward pass of one image, attention's products with them."""
    return sum(counted.macs(capacity).values()) + counted.attention_macs


def _by_ratio(dense: Config, count: Callable[[Accounting], float], wanted: float) -> Config:
    """What is counted grows by the same number with each hidden unit."""
    width = dense.model.hidden_size

    def of_hidden(hidden: int) -> Config:
        ratio = float(f"{(hidden + 0.5) / width:.4f}")  # rounded down to this many units
        return replace(dense, model=replace(dense.model, mlp_ratio=ratio))

    one, many = (count(account(of_hidden(hidden))) for hidden in (1, 1 + width))
    return of_hidden(max(1, 1 + round((wanted - one) / (many - one) * width)))


def _by_width(dense: Config, count: Callable[[Accounting], float], wanted: float) -> Config:
    """The nearest width that the heads and the position table divide."""
    unit = math.lcm(dense.model.num_heads, 4)

    def of_width(width: int) -> Config:
        head_dim = width // dense.model.num_heads
        return replace(dense, model=replace(dense.model, size=None, hidden_size=width, head_dim=head_dim))

    least, most = 1, 2
    while count(account(of_width(most * unit))) < wanted:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if count(account(of_width(middle * unit))) < wanted else (least, middle)
    return min((of_width(units * unit) for units in (least, most)), key=lambda of: abs(count(account(of)) - wanted))
