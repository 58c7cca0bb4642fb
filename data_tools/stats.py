"""What is in a folder of shards: counts, classes, sizes, captions, and a grid of random samples."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.parallel import SERIAL, Workers
from diffmoe_dist.data.class_names import names_of_data
from diffmoe_dist.data.format import ABSENT, CAPTION_FIELD, LABEL_FIELD, LATENT_FIELD, LatentSpec
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


@dataclass(frozen=True)
class LatentMoments:
    """Sums over the latents of some samples, all views: each pixel a normal distribution, sampled without end."""

    count: int  # pixels of a channel
    total_C: np.ndarray  # fp64, of the means
    squares_C: np.ndarray  # fp64, of the second moments, mean ** 2 + variance

    def __add__(self, other: LatentMoments) -> LatentMoments:
        totals = self.total_C + other.total_C, self.squares_C + other.squares_C
        return LatentMoments(self.count + other.count, *totals)

    @property
    def mean(self) -> np.ndarray:  # (C,)
        return self.total_C / self.count

    @property
    def deviation(self) -> np.ndarray:  # (C,)
        return np.sqrt(np.maximum(self.squares_C / self.count - self.mean**2, 0))


@dataclass
class Stats:
    """Of all samples, except `pixels`, which are of at most 1000 random ones."""

    labels: Counter[int] = field(default_factory=Counter)
    bytes_of: dict[str, Range] = field(default_factory=dict)  # by field
    caption_words: Range = field(default_factory=Range)
    empty_captions: int = 0
    pixels: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height)
    latents: LatentMoments | None = None

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
    stats, moments = Stats(), {}
    for shard, of_shard, latents in workers.run(_count_shard, ((index, shard) for shard in range(len(index.shards)))):
        stats.merge(of_shard)
        moments[shard] = latents
        on_shard(index.shards[shard].num_samples)
    # Added up in the order of the shards, whoever was first: the same to the last bit.
    found = [of_shard for _, of_shard in sorted(moments.items()) if of_shard is not None]
    stats.latents = functools.reduce(LatentMoments.__add__, found) if found else None
    if index.channels is not None:
        for sample_id in random_samples(index, _MEASURED_IMAGES).tolist():
            stats.pixels[_image(index, sample_id).size] += 1
    return stats


def _count_shard(job: tuple[ShardIndex, int]) -> tuple[int, Stats, LatentMoments | None]:
    index, shard = job
    latents = None if index.latents is None else _latent_moments(index, shard)
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
    return shard, stats, latents


def _latent_moments(index: ShardIndex, shard: int) -> LatentMoments | None:
    from diffmoe_dist.data.latents import LatentReader, variance_of  # torch takes seconds to import

    reader, sums = LatentReader(index), []
    for sample_id in index.samples_of(shard):
        if any(name == LATENT_FIELD and size != ABSENT for name, _, size, _ in index.entries(sample_id)):
            moments_VCHW = reader.moments(sample_id).astype(np.float64)
            mean_VCHW = moments_VCHW[:, : reader.spec.channels]
            second_VCHW = mean_VCHW**2 + variance_of(moments_VCHW, reader.spec)
            per_channel = [array.swapaxes(0, 1).reshape(reader.spec.channels, -1) for array in (mean_VCHW, second_VCHW)]
            sums.append(LatentMoments(per_channel[0].shape[1], *(array.sum(axis=1) for array in per_channel)))
    return functools.reduce(LatentMoments.__add__, sums) if sums else None


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
    if index.latents is not None and stats.latents is not None:
        lines += _describe_latents(index.latents, stats.latents)
    return "\n".join(lines) + "\n"


def _describe_classes(index: ShardIndex, stats: Stats) -> list[str]:
    counts = [stats.labels[label] for label in range(index.num_classes)]
    shown = names_of_data(index.class_names, index.folder).shown
    low, high = int(np.argmin(counts)), int(np.argmax(counts))
    lines = [
        f"classes      {index.num_classes}, from {counts[low]} samples ({shown[low]}) to {counts[high]} ({shown[high]})"
    ]
    if index.num_classes <= 20:
        width = 40 / max(counts)
        names = zip(shown, counts, strict=True)
        lines += [f"  {name[:20]:20s} {number:8d} {'#' * round(number * width)}" for name, number in names]
    return lines


def _describe_latents(spec: LatentSpec, found: LatentMoments) -> list[str]:
    """Of each channel what is stored, beside the shift and the scale of the autoencoder, and what training is given."""
    shift_C, scale_C = np.array(spec.shift), np.array(spec.scale)
    columns = (
        found.mean, found.deviation, shift_C, 1 / scale_C,
        (found.mean - shift_C) * scale_C, found.deviation * scale_C,
    )  # fmt: skip
    names = ("mean", "deviation", "its shift", "1 / its scale", "scaled mean", "scaled deviation")
    lines = [
        f"latents      {spec.channels}x{spec.height}x{spec.width}, {spec.parametrisation}, {' and '.join(spec.views)}; "
        "beside the mean and deviation that the autoencoder's own scaling takes for its data's",
        f"  {'channel':7s}" + "".join(f"{name:>18s}" for name in names),
    ]
    for channel, row in enumerate(zip(*columns, strict=True)):
        lines.append(f"  {channel:<7d}" + "".join(f"{value:18.5g}" for value in row))
    return lines
