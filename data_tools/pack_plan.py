"""What a pack would be, from the listing and a few items: nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from data_tools.pack import PackSettings, check_settings, item_order, positions_of, read_item
from data_tools.source import BadItemError, Source
from diffmoe_dist.data.format import TAR_BLOCK
from diffmoe_dist.data.images import ImageError

_SAMPLED_ITEMS = 64


@dataclass(frozen=True)
class PackPlan:
    """The forecast for what is not held out; sizes and times are extrapolated from `sampled` items."""

    num_items: int
    num_shards: int
    num_classes: int
    smallest_class: tuple[str, int] | None  # name, items
    largest_class: tuple[str, int] | None
    sampled: int
    bad: list[tuple[str, str]]  # (item, reason) of the sampled ones
    bytes_per_sample: float  # in the tar
    seconds_per_item: float  # of one process

    @property
    def num_bad(self) -> int:
        return round(self.num_items * len(self.bad) / self.sampled)

    @property
    def num_bytes(self) -> float:
        return self.bytes_per_sample * self.num_items * (1 - len(self.bad) / self.sampled)

    def seconds(self, processes: int) -> float:
        return self.seconds_per_item * self.num_items / processes


def plan_pack(source: Source, settings: PackSettings) -> PackPlan:
    """Do for the first items of the order what packing does, short of writing."""
    check_settings(source, settings)
    positions = positions_of(source, settings)
    items = item_order(source, settings)[positions[:_SAMPLED_ITEMS]]
    part, bad, sizes = source.part(items), [], []
    begin = time.perf_counter()
    for item in range(len(items)):
        try:
            payloads, _ = read_item(part, item, settings.images)
        except (BadItemError, ImageError) as error:
            bad.append((part.item_name(item), str(error)))
            continue
        sizes.append(sum(TAR_BLOCK + -(-len(payload) // TAR_BLOCK) * TAR_BLOCK for payload in payloads.values()))
    seconds = time.perf_counter() - begin
    smallest, largest = _classes(source)
    return PackPlan(
        num_items=len(positions),
        num_shards=-(-len(positions) // settings.samples_per_shard),
        num_classes=len(source.class_names),
        smallest_class=smallest,
        largest_class=largest,
        sampled=len(items),
        bad=bad,
        bytes_per_sample=float(np.mean(sizes)) if sizes else 0.0,
        seconds_per_item=seconds / len(items),
    )


def _classes(source: Source) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    if source.labels is None or not source.class_names:
        return None, None
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.class_names))
    small, large = int(counts.argmin()), int(counts.argmax())
    return (source.class_names[small], int(counts[small])), (source.class_names[large], int(counts[large]))
