"""Pack a source of labelled images into WebDataset shards with an index. The same arguments give the same bytes."""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import webdataset

from diffmoe_dist.data.index import FORMAT, INDEX_NAME, OFFSETS_NAME, VERSION, Shard, file_sha256, sample_key
from diffmoe_dist.data.randomness import Stream, permutation
from diffmoe_dist.errors import UserError

_PARTIAL = ".partial"


class Source(Protocol):
    """Where samples come from. Making one lists its items, which is cheap; `read` opens one of them."""

    name: str  # also the first part of the shards' names
    fields: Sequence[str]  # file extensions without the dot, e.g. ("png", "cls")
    class_names: Sequence[str]
    image_size: int  # height and width in pixels
    channels: int

    def __len__(self) -> int: ...

    def read(self, item: int) -> Mapping[str, bytes]:
        """The payload of every field of an item. Must not depend on what was read before."""
        ...


@dataclass(frozen=True)
class PackedFolder:
    """What `pack` wrote."""

    num_samples: int
    num_shards: int
    num_bytes: int


def pack(
    source: Source,
    out: Path,
    *,
    samples_per_shard: int,
    seed: int,
    on_shard: Callable[[int], None] = lambda num_samples: None,
) -> PackedFolder:
    """Write `<source>-000000.tar` ..., `offsets.npy` and, last, `index.json` into the folder `out`.

    One seeded permutation of all samples comes before the cut into shards, so no shard is sorted by class.
    `on_shard` is called with the number of samples of each finished shard.
    Raises UserError for a folder that holds anything but the same pack, whole or begun.
    """
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard={samples_per_shard}: must be at least 1; 512 is usual for small images")
    order = permutation(len(source), seed, Stream.PACKING)
    starts = range(0, len(order), samples_per_shard)
    names = [f"{source.name}-{shard:06d}.tar" for shard in range(len(starts))]
    header = _header(source, seed, samples_per_shard)
    _claim_folder(out, names, header)

    shards, offsets = [], []
    for name, start in zip(names, starts, strict=True):
        items = order[start : start + samples_per_shard]
        entries = _write_shard(out / name, source, first_id=start, items=items)
        shards.append(Shard(name, len(items), (out / name).stat().st_size, file_sha256(out / name)))
        offsets.append(entries)
        on_shard(len(items))
    with _atomic_file(out / OFFSETS_NAME) as file:
        np.save(file, np.concatenate(offsets), allow_pickle=False)
    index = header | {
        "shards": [asdict(shard) for shard in shards],
        "offsets": {"file": OFFSETS_NAME, "sha256": file_sha256(out / OFFSETS_NAME)},
    }
    with _atomic_file(out / INDEX_NAME) as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())
    return PackedFolder(len(source), len(shards), sum(shard.num_bytes for shard in shards))


def _header(source: Source, seed: int, samples_per_shard: int) -> dict[str, Any]:
    """The part of `index.json` that is known before the first shard: what identifies a pack."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": source.name,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "num_samples": len(source),
        "num_classes": len(source.class_names),
        "class_names": list(source.class_names),
        "image_size": source.image_size,
        "channels": source.channels,
        "fields": list(source.fields),
    }


def _claim_folder(out: Path, shard_names: list[str], header: dict[str, Any]) -> None:
    """Make the folder, or take over one that holds this very pack, and mark it as unfinished."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = sorted(os.listdir(out))
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be used as a folder ({error.strerror}); name another one") from error
    ours = {*shard_names, INDEX_NAME, OFFSETS_NAME}
    strange = [name for name in found if name.removesuffix(_PARTIAL) not in ours]
    if strange:
        raise UserError(f"OUT={out}: the folder holds something else ({strange[0]}); name a new or empty folder")
    index = out / INDEX_NAME
    if index.exists():
        if not _same_pack(index, header):
            raise UserError(f"OUT={out}: packed before with other arguments; name a new or empty folder")
        index.unlink()  # written last, so a folder with an index is a finished one


def _same_pack(index: Path, header: dict[str, Any]) -> bool:
    try:
        meta = json.loads(index.read_bytes())
    except ValueError:
        return False
    return isinstance(meta, dict) and all(meta.get(name) == value for name, value in header.items())


def _write_shard(path: Path, source: Source, first_id: int, items: np.ndarray) -> np.ndarray:
    """Write one tar. Returns (samples, fields, 3) int64: payload offset in the tar, payload size, CRC-32."""
    entries = np.empty((len(items), len(source.fields), 3), dtype=np.int64)
    with _atomic_file(path) as file:
        # Nothing of the machine, the user or the day may enter the bytes.
        with webdataset.TarWriter(file, encoder=False, mtime=0, user="root", group="root", mode=0o644) as tar:
            for row, item in enumerate(items.tolist()):
                payloads = source.read(item)
                assert set(payloads) == set(source.fields), (source.name, sorted(payloads))
                tar.write({"__key__": sample_key(first_id + row), **payloads})
                entries[row, :, 2] = [zlib.crc32(payloads[field]) for field in source.fields]
    # The places are read back from the file, so they are what any reader of tars will find.
    with tarfile.open(path, "r:") as members:
        placed = {member.name: (member.offset_data, member.size) for member in members}
    for row in range(len(items)):
        names = [f"{sample_key(first_id + row)}.{field}" for field in source.fields]
        entries[row, :, :2] = [placed[name] for name in names]
    return entries


@contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is complete and on the disk."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
