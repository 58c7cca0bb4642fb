"""What is in a folder of shards: counts, classes, sizes, captions, and a grid of random samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.parallel import SERIAL, Workers
from diffmoe_dist.data.format import ABSENT, CAPTION_FIELD, LABEL_FIELD
from diffmoe_dist.data.images import decode_image
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.labels import label_in_payload

_GRID_SIDE = 8  # samples
_MEASURED_IMAGES = 1000


@dataclass
class Range:
    """Smallest, mean and largest of what was added."""

    count: int = 0
    total: int = 0
    low: int | None = None
    high: int | None = None

    def add(self, value: int) -> None:
        self.merge(Range(1, value, value, value))

    def merge(self, other: Range) -> None:
        self.count, self.total = self.count + other.count, self.total + other.total
        self.low = min((value for value in (self.low, other.low) if value is not None), default=None)
        self.high = max((value for value in (self.high, other.high) if value is not None), default=None)

    def __str__(self) -> str:
        return f"{self.low} to {self.high}, mean {self.total / self.count:.1f}" if self.count else "none"


@dataclass
class Stats:
    """Of all samples, except `pixels`, which are of at most 1000 random ones."""

    labels: Counter[int] = field(default_factory=Counter)
    bytes_of: dict[str, Range] = field(default_factory=dict)  # by field
    caption_words: Range = field(default_factory=Range)
    empty_captions: int = 0
    pixels: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height)

    def merge(self, other: Stats) -> None:
        self.labels.update(other.labels)
        for name, sizes in other.bytes_of.items():
            self.bytes_of.setdefault(name, Range()).merge(sizes)
        self.caption_words.merge(other.caption_words)
        self.empty_captions += other.empty_captions


def count(
    index: ShardIndex, workers: Workers = SERIAL, on_shard: Callable[[int], None] = lambda num_samples: None
) -> Stats:
    """Read every label and caption, and the sizes of everything. Raises CorruptShardError for damage it meets."""
    stats = Stats()
    for num_samples, of_shard in workers.run(_count_shard, ((index, shard) for shard in range(len(index.shards)))):
        stats.merge(of_shard)
        on_shard(num_samples)
    if index.channels is not None:
        for sample_id in random_samples(index, _MEASURED_IMAGES).tolist():
            stats.pixels[_image(index, sample_id).size] += 1
    return stats


def _count_shard(job: tuple[ShardIndex, int]) -> tuple[int, Stats]:
    index, shard = job
    stats = Stats(bytes_of={name: Range() for name in index.fields})
    for sample_id in index.samples_of(shard):
        for name, _, size, _ in index.entries(sample_id):
            if size != ABSENT:
                stats.bytes_of[name].add(size)
        payloads = index.read(sample_id, (LABEL_FIELD, CAPTION_FIELD))
        if LABEL_FIELD in payloads:
            stats.labels[label_in_payload(payloads[LABEL_FIELD])] += 1
        if CAPTION_FIELD in payloads:
            words = len(payloads[CAPTION_FIELD].decode().split())
            stats.caption_words.add(words)
            stats.empty_captions += words == 0
    index.close()
    return len(index.samples_of(shard)), stats


def image_grid(index: ShardIndex, side: int) -> Image.Image:
    """A grid of random samples, each fitted into `side` x `side` pixels; the same ones every time."""
    grid = Image.new("RGB", (_GRID_SIDE * side, _GRID_SIDE * side), "white")
    for place, sample_id in enumerate(random_samples(index, _GRID_SIDE**2).tolist()):
        image = _image(index, sample_id).convert("RGB")
        scale = side / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        row, column = divmod(place, _GRID_SIDE)
        grid.paste(image, (column * side, row * side))
    return grid


def random_samples(index: ShardIndex, at_most: int) -> np.ndarray:
    """(<= at_most,) sample ids, each once."""
    return np.random.default_rng(0).choice(index.num_samples, min(at_most, index.num_samples), replace=False)


def _image(index: ShardIndex, sample_id: int) -> Image.Image:
    payloads = index.read(sample_id, index.image_fields)
    assert index.channels is not None
    return decode_image(next(iter(payloads.values())), index.channels)


def describe(index: ShardIndex, stats: Stats, folder: Path) -> str:
    """A page of text."""
    num_bytes = sum(shard.num_bytes for shard in index.shards)
    lines = [
        f"{folder}: {index.num_samples} samples in {len(index.shards)} shards, {num_bytes} bytes",
        f"fingerprint  {index.fingerprint}",
        *(f"{name:12s} {sizes.count} samples, bytes {sizes}" for name, sizes in stats.bytes_of.items()),
    ]
    if stats.pixels:
        common = ", ".join(f"{width}x{height} ({number})" for (width, height), number in stats.pixels.most_common(3))
        short = [min(size) for size in stats.pixels.elements()]
        lines.append(f"pixels       shorter side {min(short)} to {max(short)} in {len(short)} images, as {common}")
    if stats.labels:
        lines += _describe_classes(index, stats)
    if stats.caption_words.count:
        lines.append(f"captions     words {stats.caption_words}; {stats.empty_captions} empty")
    return "\n".join(lines) + "\n"


def _describe_classes(index: ShardIndex, stats: Stats) -> list[str]:
    counts = [stats.labels[label] for label in range(index.num_classes)]
    low, high = int(np.argmin(counts)), int(np.argmax(counts))
    lines = [
        f"classes      {index.num_classes}, from {counts[low]} samples ({index.class_names[low]}) "
        f"to {counts[high]} ({index.class_names[high]})"
    ]
    if index.num_classes <= 20:
        width = 40 / max(counts)
        names = zip(index.class_names, counts, strict=True)
        lines += [f"  {name[:20]:20s} {number:8d} {'#' * round(number * width)}" for name, number in names]
    return lines
