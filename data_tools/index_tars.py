"""Give a folder of foreign WebDataset tars an index, without touching the tars."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_tools.folder import (
    PROGRESS_NAME,
    PackedFolder,
    ShardSlot,
    lock_progress,
    release_progress,
    write_index,
    write_quarantine,
)
from data_tools.parallel import SERIAL, Workers
from data_tools.shards import BadItem, ShardRecord, sort_fields
from data_tools.source import BadItemError
from data_tools.stored_images import ImageRules, common_side, store_image
from data_tools.tars import TarFile
from data_tools.webdataset_tars import TORN, Found, Group, check_payloads, groups_of, list_tars, used_fields
from diffmoe_dist.data.format import ABSENT, IMAGE_FIELDS, INDEX_NAME, LABEL_FIELD, TAR_BLOCK, Shard
from diffmoe_dist.data.images import ImageError
from diffmoe_dist.data.index import member_crc32
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256

_CHANNELS = 3


@dataclass(frozen=True)
class _Job:
    slot: ShardSlot
    required: tuple[str, ...]
    torn: frozenset[str]  # keys whose files do not lie side by side


def index_tars(
    folder: Path,
    *,
    max_bad: int = 100,
    workers: Workers = SERIAL,
    on_shard: Callable[[int], None] = lambda num_samples: None,
) -> PackedFolder:
    """Write offsets, keys, quarantine and index beside the tars of a folder; stopped, it goes on where it was.

    A sample is taken up if it has one image that decodes and the other fields of the first one. Labels must be numbers.
    Raises UserError for a folder that `pack` wrote, for a damaged tar, and where more than `max_bad` samples are bad.
    """
    if not folder.is_dir():
        raise UserError(f"FOLDER={folder}: not a folder; name the folder of the tars")
    tars = list_tars(folder)
    if (folder / INDEX_NAME).exists():
        raise UserError(f"FOLDER={folder}: has an index already; to make a new one, remove {INDEX_NAME} first")
    try:
        (folder / PROGRESS_NAME).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"FOLDER={folder}: the index cannot be written ({error.strerror}); link the tars in a folder of yours"
        ) from error
    lock = lock_progress(folder, f"FOLDER={folder}")
    slots = [ShardSlot(folder, path.name) for path in tars]
    found = Found()
    for path in tars:
        for _ in found.count(TarFile(path)):
            pass
    required = found.required_fields()
    num_bad = 0
    for num_samples, bad in workers.run(_index_tar, (_Job(slot, required, found.torn[slot.path]) for slot in slots)):
        num_bad += len(bad)
        if num_bad > max_bad:
            write_quarantine(folder, (record for slot in slots if (record := slot.load()) is not None))
            raise UserError(
                f"--max-bad={max_bad}: {num_bad} bad samples so far, as {bad[-1].item} ({bad[-1].reason}); allow more, "
                "or pack the good ones: python -m data_tools pack"
            )
        on_shard(num_samples)
    packed = write_index(
        folder,
        lambda: (record for slot in slots if (record := slot.load()) is not None),
        {"packing": None, "channels": _CHANNELS},
    )
    shutil.rmtree(folder / PROGRESS_NAME)
    release_progress(lock)
    return packed


def _index_tar(job: _Job) -> tuple[int, list[BadItem]]:
    record = job.slot.finished()
    if record is None:
        record = _scan(job.slot.path, job.required, job.torn)
        job.slot.save(record)
    return len(record.keys) + len(record.bad), record.bad


def _scan(path: Path, required: tuple[str, ...], torn: frozenset[str]) -> ShardRecord:
    tar = TarFile(path)
    keys, bad, sizes, num_classes = [], [], set(), 0
    rows: list[dict[str, list[int]]] = []
    for group in groups_of(tar):
        if group.key in torn:
            if group.has_image:
                bad.append(BadItem(group.key, f"{path.name}:{group.key}", TORN))
            continue
        try:
            row, label, size = _check_group(tar, group, required)
        except (BadItemError, ImageError) as error:
            bad.append(BadItem(group.key, f"{path.name}:{group.key}", str(error)))
            continue
        keys.append(group.key)
        rows.append(row)
        sizes.add(size)
        num_classes = max(num_classes, label + 1)
    fields = sort_fields({name for row in rows for name in row})
    entries = [[row.get(name, [ABSENT, ABSENT, 0]) for name in fields] for row in rows]
    shard = Shard(path.name, len(keys), path.stat().st_size, file_sha256(path))
    return ShardRecord(shard, fields, keys, entries, bad, common_side(sizes), num_classes)


def _check_group(
    tar: TarFile, group: Group, required: tuple[str, ...]
) -> tuple[dict[str, list[int]], int, tuple[int, int]]:
    """The index's entries of a sample, its label (-1: none) and the size of its image."""
    row, payloads = {}, {}
    for field, member in group.members.items():
        if field in used_fields(required):
            block = tar.read(member.offset - TAR_BLOCK, TAR_BLOCK + member.size)
            row[field] = [member.offset, member.size, member_crc32(block[:TAR_BLOCK], block[TAR_BLOCK:])]
            payloads[field] = block[TAR_BLOCK:]
    check_payloads(payloads, required)
    image = next(field for field in payloads if field in IMAGE_FIELDS)
    stored = store_image(payloads[image], _CHANNELS, ImageRules())
    return row, int(payloads.get(LABEL_FIELD, b"-1")), stored.size
