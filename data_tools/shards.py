"""One shard: written, or found whole from an earlier run, and the record of what it holds."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from diffmoe_dist.data.format import ABSENT, TAR_BLOCK, Shard
from diffmoe_dist.data.index import member_crc32
from diffmoe_dist.files import atomic_file, file_sha256, write_atomically

_TAR_RECORD = 20 * TAR_BLOCK  # a tar's length is a multiple of it
_MAX_NAME = 100  # bytes of a member's name in the plain header that every program reads


@dataclass(frozen=True)
class BadItem:
    """An item that was left out."""

    key: str
    item: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard adds to the index. Kept on the disk until the index is written."""

    shard: Shard
    fields: tuple[str, ...]
    keys: list[str]
    entries: list[list[list[int]]]  # (samples, fields, 3): offset, size, CRC-32
    bad: list[BadItem] = field(default_factory=list)
    image_size: int | None = None  # of all images, where they are squares of one size
    num_classes: int = 0  # the largest label plus 1
    num_cut: int = 0  # captions that were too long for the text encoder


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardRecord:
    """Write a tar of (key, fields) in the order given. The same samples give the same bytes.

    Nothing of the machine, the user or the day enters the file; it takes its name when it is complete and on the disk.
    """
    keys: list[str] = []
    rows: list[dict[str, list[int]]] = []
    with atomic_file(path) as file:
        tar = _TarFile(file)
        for key, payloads in samples:
            keys.append(key)
            rows.append({name: tar.add(f"{key}.{name}", payloads[name]) for name in sorted(payloads)})
        tar.close()
    fields = sort_fields({name for row in rows for name in row})
    entries = [[row.get(name, [ABSENT, ABSENT, 0]) for name in fields] for row in rows]
    return ShardRecord(Shard(path.name, len(keys), tar.num_bytes, tar.sha256()), fields, keys, entries)


def sort_fields(fields: Iterable[str]) -> tuple[str, ...]:
    """The columns of the index: `cls` last, so that the first one is an image where there is one."""
    return tuple(sorted(fields, key=lambda name: (name == "cls", name)))


class _TarFile:
    """Writes tar members and remembers where they lie."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.num_bytes = 0

    def add(self, name: str, payload: bytes) -> list[int]:
        """Write one member. Returns its payload's offset, its size, and the CRC-32 of header and payload."""
        assert len(name.encode()) <= _MAX_NAME, name
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode, info.uname, info.gname = len(payload), 0, 0o644, "root", "root"
        header = info.tobuf(tarfile.USTAR_FORMAT)
        offset = self.num_bytes + TAR_BLOCK
        self._write(header)
        self._write(payload)
        self._pad(TAR_BLOCK)
        return [offset, len(payload), member_crc32(header, payload)]

    def close(self) -> None:
        self._write(bytes(2 * TAR_BLOCK))  # the end of an archive
        self._pad(_TAR_RECORD)

    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _pad(self, multiple: int) -> None:
        self._write(bytes(-self.num_bytes % multiple))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)


def save_record(path: Path, record: ShardRecord) -> None:
    write_atomically(path, json.dumps(asdict(record)))


def load_record(path: Path) -> ShardRecord:
    """Raises KeyError, TypeError or ValueError for a file that `save_record` did not write."""
    saved: dict[str, Any] = json.loads(path.read_bytes())
    shard, bad = Shard(**saved.pop("shard")), [BadItem(**item) for item in saved.pop("bad")]
    return ShardRecord(shard=shard, bad=bad, fields=tuple(saved.pop("fields")), **saved)


def is_whole(path: Path, shard: Shard) -> bool:
    """Whether the file has the size and the content recorded."""
    try:
        return path.stat().st_size == shard.num_bytes and file_sha256(path) == shard.sha256
    except FileNotFoundError:
        return False
