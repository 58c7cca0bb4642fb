"""The same run with less memory: smaller micro-batches where no pool depends on them, then recomputation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Literal

from diffmoe_dist.config import Config, pool_samples
from diffmoe_dist.config.checks import name_ranks
from diffmoe_dist.errors import UserError
from diffmoe_dist.planning.memory import USABLE_MEMORY, peak_bytes, persistent_bytes
from diffmoe_dist.planning.workload import workload

RECOMPUTE: tuple[Literal["none", "mlp", "block"], ...] = ("none", "mlp", "block")


def less_and_less_memory(config: Config, ranks: int, given: Collection[str] = ()) -> Iterator[Config]:
    """Variants of the settings, from the given ones on.

    Args:
        given: names of settings to leave as they are, such as `train.recompute`.
    """
    micro_batches = [config.train.micro_batch_size]
    if "train.micro_batch_size" not in given and pool_samples(config, ranks) == 1:
        micro_batches = [size for size in range(micro_batches[0], 0, -1) if micro_batches[0] % size == 0]
    modes = RECOMPUTE[RECOMPUTE.index(config.train.recompute) :]
    for mode in modes[:1] if "train.recompute" in given else modes:
        for micro in micro_batches:
            yield replace(config, train=replace(config.train, recompute=mode, micro_batch_size=micro))


def fit_to_memory(config: Config, ranks: int, memory_bytes: int, given: Collection[str] = ()) -> Config:
    """The settings, or the first variant that a device of so much memory has room for by the plan.

    Args:
        given: as of `less_and_less_memory`.

    Raises:
        UserError: none fits, be the whole memory usable.
    """
    needed, tried = 0.0, config
    for tried in less_and_less_memory(config, ranks, given):
        needed = sum(persistent_bytes(tried, ranks).values())
        needed += sum(peak_bytes(tried, ranks, workload(tried, ranks)).values())
        if needed <= USABLE_MEMORY * memory_bytes:
            return tried
    if needed > memory_bytes:
        raise UserError(
            f"train.micro_batch_size={tried.train.micro_batch_size} on {name_ranks([ranks])} needs "
            f"{needed / 2**30:.1f} GiB of each by the plan, even with train.recompute={tried.train.recompute}, and a "
            f"device has {memory_bytes / 2**30:.1f}; start on more ranks"
        )
    return tried
