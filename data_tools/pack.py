"""Pack a source into WebDataset shards with an index. The same arguments give the same bytes, whoever does the work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.folder import PackedFolder, ShardFolder, ShardSlot
from data_tools.parallel import SERIAL, Workers
from data_tools.shards import BadItem, write_shard
from data_tools.source import IMAGE, BadItemError, Source
from data_tools.stored_images import ImageRules, common_side, store_image
from diffmoe_dist.data.class_names import WORDS_NAME
from diffmoe_dist.data.format import LABEL_FIELD, QUARANTINE_NAME
from diffmoe_dist.data.images import ImageError
from diffmoe_dist.data.index import text_sha256
from diffmoe_dist.data.randomness import Stream, permutation
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import write_atomically


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of a pack, beside the source."""

    samples_per_shard: int = 512
    seed: int = 0
    shuffled: bool = True  # else in the order of the source
    images: ImageRules = ImageRules()
    hold_out: int = 0  # items for a folder of their own
    is_held_out: bool = False  # whether this is that folder

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise UserError(
                f"--samples-per-shard={self.samples_per_shard}: must be at least 1; 512 is usual for small images"
            )
        if self.seed and not self.shuffled:
            raise UserError(f"--seed={self.seed}: --order=listed permutes nothing; leave one of them out")


@dataclass(frozen=True)
class ShardDone:
    """What a worker says of a shard; the record itself is on the disk."""

    num_items: int
    num_bad: int
    last_bad: BadItem | None


@dataclass(frozen=True)
class _ShardJob:
    slot: ShardSlot
    source: Source  # the items of this shard alone
    positions: np.ndarray  # of these items, ascending; their keys
    images: ImageRules


def pack(
    source: Source,
    out: Path,
    settings: PackSettings = PackSettings(),  # frozen
    *,
    max_bad: int = 100,
    workers: Workers = SERIAL,
    on_shard: Callable[[int], None] = lambda num_items: None,
) -> PackedFolder:
    """Write `<source>-000000.tar` ... and, last, the index into the folder `out`. Run again, it goes on where it was.

    One seeded permutation of all items comes before the cut into shards, so no shard is sorted by class. Position p
    of it has the key p, and lies in the shard p // samples_per_shard. A bad item leaves its position empty: so any
    worker can find out which items of a shard are good. `on_shard` is called with the number of items of each shard
    that is done.

    Raises UserError for a folder that holds anything but the same pack, whole or begun, and where more than `max_bad`
    items are bad.
    """
    check_settings(source, settings)
    folder = _claim(source, out, settings)
    _write_shards(folder, source, settings, max_bad, workers, on_shard)
    _write_words(source, out)
    return folder.finish({"class_names": list(source.class_names), "channels": source.channels})


def pack_and_hold_out(
    source: Source,
    out: Path,
    settings: PackSettings,
    *,
    max_bad: int = 100,
    workers: Workers = SERIAL,
    on_shard: Callable[[int], None] = lambda num_items: None,
) -> tuple[PackedFolder, PackedFolder]:
    """Pack `settings.hold_out` of the items into `held_out_folder(out)`, and the others into `out`.

    Classes and the size of images are said of both folders together, so that one model takes both. Raises UserError
    as `pack` does, and where none would be left.
    """
    check_settings(source, settings)
    parts = [(held_out_folder(out), replace(settings, is_held_out=True)), (out, settings)]
    folders = [_claim(source, path, of_part) for path, of_part in parts]
    num_bad = 0
    for folder, (_, of_part) in zip(folders, parts, strict=True):
        num_bad = _write_shards(folder, source, of_part, max_bad, workers, on_shard, num_bad)
    sizes, num_classes = set(), 0
    for record in (record for folder in folders for record in folder.records() if record.keys):
        sizes.add(record.image_size)
        num_classes = max(num_classes, record.num_classes)
    description = {
        "class_names": list(source.class_names) or [str(label) for label in range(num_classes)],
        "channels": source.channels,
        "image_size": next(iter(sizes)) if len(sizes) == 1 else None,
    }
    for path, _ in parts:
        _write_words(source, path)
    held_out, trained_on = (folder.finish(description) for folder in folders)
    return trained_on, held_out


def _write_words(source: Source, out: Path) -> None:
    """What the classes are called by people, where the source has names for them that are codes."""
    words = getattr(source, "class_words", {})
    lines = [f"{name} {words[name]}\n" for name in source.class_names if words.get(name)]
    if lines:
        write_atomically(out / WORDS_NAME, "".join(lines))


def held_out_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}-held-out")


def _claim(source: Source, out: Path, settings: PackSettings) -> ShardFolder:
    num_shards = -(-len(positions_of(source, settings)) // settings.samples_per_shard)
    names = [f"{source.name}-{shard:06d}.tar" for shard in range(num_shards)]
    folder = ShardFolder(out, names, _identity(source, settings))
    folder.claim()
    return folder


def _write_shards(
    folder: ShardFolder,
    source: Source,
    settings: PackSettings,
    max_bad: int,
    workers: Workers,
    on_shard: Callable[[int], None],
    num_bad: int = 0,
) -> int:
    """Adds the bad items to `num_bad`. Raises UserError where they are more than `max_bad`."""
    for done in workers.run(_pack_shard, _jobs(folder, source, settings)):
        num_bad += done.num_bad
        if num_bad > max_bad and done.last_bad is not None:
            folder.write_quarantine()
            raise UserError(
                f"--max-bad={max_bad}: {num_bad} bad items so far, as {done.last_bad.item} ({done.last_bad.reason}); "
                f"see {folder.out / QUARANTINE_NAME}, and repair them or allow more and run it again"
            )
        on_shard(done.num_items)
    return num_bad


def check_settings(source: Source, settings: PackSettings) -> None:
    """Raises UserError for a source without items, and for a crop of images that are stored as they are read."""
    if len(source) == 0:
        raise UserError(f"SOURCE={source.name}: holds no items; check the path and --source-format")
    if not 0 <= settings.hold_out < len(source):
        raise UserError(
            f"--hold-out={settings.hold_out}: must be from 0 to {len(source) - 1}, for {source.name} has {len(source)} "
            "items and one at least must be left"
        )
    if source.image_size is not None and settings.images != ImageRules():
        raise UserError(
            f"--crop={settings.images.crop}: {source.name} has images of {source.image_size} pixels that are stored as "
            "they are; leave out --crop, --size, --encoding and --upright"
        )


def item_order(source: Source, settings: PackSettings) -> np.ndarray:
    """(items,) int64: which item has which position."""
    if not settings.shuffled:
        return np.arange(len(source))
    return permutation(len(source), settings.seed, Stream.PACKING)


def positions_of(source: Source, settings: PackSettings) -> np.ndarray:
    """The positions that a folder holds, ascending. Held out are those whose keys have the smallest SHA-256 sums."""
    positions = np.arange(len(source))
    if not settings.hold_out:
        return positions
    sums = [hashlib.sha256(_key(position).encode()).digest() for position in range(len(source))]
    smallest = np.argsort(np.array(sums, dtype="S32"), kind="stable")[: settings.hold_out]
    return np.sort(smallest) if settings.is_held_out else np.delete(positions, smallest)


def _key(position: int) -> str:
    return f"{position:09d}"


def read_item(source: Source, item: int, rules: ImageRules) -> tuple[dict[str, bytes], tuple[int, int] | None]:
    """The fields of an item as they are stored, and the (width, height) of its image if it was looked at.

    Raises BadItemError or ImageError for an item that gives no sample.
    """
    payloads = dict(source.read(item))
    if IMAGE not in payloads:
        return payloads, None
    image = store_image(payloads.pop(IMAGE), source.channels, rules)
    return {image.field: image.payload, **payloads}, image.size


def _identity(source: Source, settings: PackSettings) -> dict[str, Any]:
    """What makes two packs the same, as it stands in the index."""
    said = asdict(settings)
    if not settings.hold_out:  # as it stood before there was one
        del said["hold_out"], said["is_held_out"]
    return {
        "command": "pack",
        "source": source.name,
        "num_items": len(source),
        "items_sha256": text_sha256(source.item_name(item) for item in range(len(source))),
        "class_names_sha256": text_sha256(iter(source.class_names)),
        **said,
    }


def _jobs(folder: ShardFolder, source: Source, settings: PackSettings) -> Iterator[_ShardJob]:
    order, positions = item_order(source, settings), positions_of(source, settings)
    for slot, start in zip(folder.slots, range(0, len(positions), settings.samples_per_shard), strict=True):
        of_shard = positions[start : start + settings.samples_per_shard]
        yield _ShardJob(slot, source.part(order[of_shard]), of_shard, settings.images)


def _pack_shard(job: _ShardJob) -> ShardDone:
    """Write a shard, unless an earlier run did and none of its bad items has been repaired since."""
    record = job.slot.finished()
    if record is None or any(_is_good(job, _place(job, bad)) for bad in record.bad):
        result = _ShardResult()
        record = write_shard(job.slot.begin(), _samples(job, result))
        record = replace(record, bad=result.bad, image_size=common_side(result.sizes), num_classes=result.num_classes)
        job.slot.save(record)
    return ShardDone(len(job.positions), len(record.bad), record.bad[-1] if record.bad else None)


def _place(job: _ShardJob, bad: BadItem) -> int:
    """The number of a bad item in its shard."""
    return int(np.searchsorted(job.positions, int(bad.key)))


def _is_good(job: _ShardJob, item: int) -> bool:
    try:
        read_item(job.source, item, job.images)
    except (BadItemError, ImageError):
        return False
    return True


class _ShardResult:
    """What comes up while a shard is written."""

    def __init__(self) -> None:
        self.bad: list[BadItem] = []
        self.sizes: set[tuple[int, int]] = set()
        self.num_classes = 0


def _samples(job: _ShardJob, result: _ShardResult) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    size = job.source.image_size
    for item, position in enumerate(job.positions.tolist()):
        key = _key(position)
        try:
            payloads, found = read_item(job.source, item, job.images)
        except (BadItemError, ImageError) as error:
            result.bad.append(BadItem(key, job.source.item_name(item), str(error)))
            continue
        if found is not None or size is not None:
            result.sizes.add(found or (size or 0, size or 0))
        if LABEL_FIELD in payloads and payloads[LABEL_FIELD].isdigit():
            result.num_classes = max(result.num_classes, int(payloads[LABEL_FIELD]) + 1)
        yield key, payloads
