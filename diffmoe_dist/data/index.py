"""The index beside a folder of WebDataset shards: checked when it is opened, then any sample is one read away."""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from diffmoe_dist.errors import UserError

FORMAT = "diffmoe-shards"
VERSION = 1
INDEX_NAME = "index.json"
OFFSETS_NAME = "offsets.npy"
_MAX_OPEN_SHARDS = 64  # a large set has more shards than a process may open files
_PACK = "python -m data_tools pack SOURCE OUT"
_T = TypeVar("_T")


class CorruptShardError(RuntimeError):
    """A sample on disk is not what was packed; the message names the shard and the key."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, its samples, its size in bytes, the SHA-256 of its content."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


def sample_key(sample_id: int) -> str:
    """The WebDataset key of a sample: its position in the packed order, nine digits."""
    return f"{sample_id:09d}"


class ShardIndex:
    """Random access to the samples of a packed folder. Made by `ShardIndex.open`; can be pickled and forked."""

    def __init__(self, folder: Path, raw: bytes, meta: dict[str, Any]) -> None:
        """Take over a parsed `index.json`. Raises KeyError, TypeError or ValueError for an entry that is wrong."""
        self.folder = folder
        self.fingerprint: str = hashlib.sha256(raw).hexdigest()
        self.num_samples = _count(meta, "num_samples")
        self.num_classes = _count(meta, "num_classes")
        self.class_names: list[str] = _entry(meta, "class_names", list)
        self.image_size = _count(meta, "image_size")  # height and width in pixels
        self.channels = _count(meta, "channels")
        self.fields = tuple(_entry({"field": field}, "field", str) for field in _entry(meta, "fields", list))
        self.shards = tuple(_shard(entry) for entry in _entry(meta, "shards", list))
        offsets = _entry(meta, "offsets", dict)
        self._offsets_path = folder / _plain_name(_entry(offsets, "file", str))
        self._offsets_sha256 = _entry(offsets, "sha256", str)
        self._ends = list(itertools.accumulate(shard.num_samples for shard in self.shards))
        self._offsets: np.ndarray | None = None
        self._open_shards: dict[int, io.FileIO] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ShardIndex:
        """Open and check a packed folder: the index, the offsets, every shard present in its full size.

        The content of the shards is checked sample by sample, as it is read.
        Raises UserError, naming `data.shards`, for whatever is wrong.
        """
        path = Path(folder)
        if not path.is_dir():
            _refuse(path, "no such folder", f"pack the data there: {_PACK}")
        raw = _load(path, INDEX_NAME, (path / INDEX_NAME).read_bytes)
        meta = _load(path, INDEX_NAME, lambda: json.loads(raw))
        known = isinstance(meta, dict) and meta.get("format") == FORMAT
        if not known or meta.get("version") != VERSION:
            found = f"{meta.get('format')} version {meta.get('version')}" if isinstance(meta, dict) else "no format"
            _refuse(path, f"{INDEX_NAME} says {found}, this program reads {FORMAT} version {VERSION}", "pack it again")
        index = _load(path, INDEX_NAME, lambda: cls(path, raw, meta))
        index._check_counts()
        index._check_offsets()
        index._check_shards()
        return index

    def read(self, sample_id: int) -> dict[str, bytes]:
        """The payload of every field of a sample.

        Raises IndexError for an id outside 0..num_samples-1, CorruptShardError where the bytes are not those packed.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        shard = bisect.bisect_right(self._ends, sample_id)
        entries = self._entries()[sample_id].tolist()
        try:
            descriptor = self._shard_file(shard).fileno()
            payloads = [os.pread(descriptor, size, offset) for offset, size, _ in entries]
        except OSError as error:
            raise self.corrupt(sample_id, f"cannot be read ({error})") from error
        for field, payload, (_, size, crc32) in zip(self.fields, payloads, entries, strict=True):
            if len(payload) != size:
                raise self.corrupt(sample_id, f"{field} is cut: {len(payload)} of {size} bytes")
            if zlib.crc32(payload) != crc32:
                raise self.corrupt(sample_id, f"{field} is damaged: its CRC-32 is not the one recorded")
        return dict(zip(self.fields, payloads, strict=True))

    def corrupt(self, sample_id: int, problem: str) -> CorruptShardError:
        """The error that says what is wrong with a sample, and where it lies."""
        shard = self.shards[bisect.bisect_right(self._ends, sample_id)]
        return CorruptShardError(f"{self.folder / shard.name}, key {sample_key(sample_id)}: {problem}")

    def close(self) -> None:
        """Close the shards that this process opened; reading opens them again."""
        while self._open_shards:
            self._open_shards.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the offsets and opens the shards itself.
        return {**self.__dict__, "_offsets": None, "_open_shards": {}}

    def _entries(self) -> np.ndarray:
        """(num_samples, num_fields, 3) int64: payload offset, payload size, CRC-32; mapped, not read."""
        if self._offsets is None:
            # The plain view spares every row the cost of making an np.memmap object.
            self._offsets = np.load(self._offsets_path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        return self._offsets

    def _shard_file(self, shard: int) -> io.FileIO:
        file = self._open_shards.pop(shard, None)
        if file is None:
            file = io.FileIO(self.folder / self.shards[shard].name)
            if len(self._open_shards) == _MAX_OPEN_SHARDS:
                self._open_shards.pop(next(iter(self._open_shards))).close()
        self._open_shards[shard] = file  # the last one used goes to the end
        return file

    def _check_counts(self) -> None:
        total = self._ends[-1] if self._ends else 0
        if total != self.num_samples or total == 0:
            problem = f"{INDEX_NAME} says {self.num_samples} samples but its shards hold {total}"
            _refuse(self.folder, problem, "restore or pack it again")
        if len(self.class_names) != self.num_classes:
            problem = f"{INDEX_NAME} says {self.num_classes} classes but names {len(self.class_names)}"
            _refuse(self.folder, problem, "restore or pack it again")

    def _check_offsets(self) -> None:
        name = self._offsets_path.name
        found = _load(self.folder, name, lambda: file_sha256(self._offsets_path))
        if found != self._offsets_sha256:
            problem = f"{name} has SHA-256 {found[:12]}..., {INDEX_NAME} records {self._offsets_sha256[:12]}..."
            _refuse(self.folder, problem, "restore both or pack again")
        entries = _load(self.folder, name, self._entries)
        shape = (self.num_samples, len(self.fields), 3)
        if entries.shape != shape or entries.dtype != np.int64:
            problem = f"{name} holds {entries.dtype} {entries.shape}, {INDEX_NAME} needs int64 {shape}"
            _refuse(self.folder, problem, "restore both or pack again")

    def _check_shards(self) -> None:
        for shard in self.shards:
            size = _load(self.folder, shard.name, (self.folder / shard.name).stat).st_size
            if size != shard.num_bytes:
                problem = f"{shard.name} has {size} bytes, {INDEX_NAME} records {shard.num_bytes}"
                _refuse(self.folder, problem, "restore the shard or pack again")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse(folder: Path, problem: str, remedy: str) -> NoReturn:
    raise UserError(f"data.shards={folder}: {problem}; {remedy}")


def _load(folder: Path, name: str, action: Callable[[], _T]) -> _T:
    """Do one step of opening a file of the folder, and refuse the folder where it fails."""
    try:
        return action()
    except FileNotFoundError:
        _refuse(folder, f"{name} is missing", f"restore it or finish packing: {_PACK}")
    except OSError as error:
        _refuse(folder, f"{name} cannot be read ({error.strerror})", "check the disk and the permissions")
    except KeyError as error:
        _refuse(folder, f"{name} has no entry {error}", "restore or pack it again")
    except (TypeError, ValueError) as error:
        _refuse(folder, f"{name} is damaged ({error})", "restore or pack it again")


def _entry(meta: dict[str, Any], name: str, kind: type[_T]) -> _T:
    value = meta[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, not {kind.__name__}")
    return value


def _count(meta: dict[str, Any], name: str) -> int:
    value = _entry(meta, name, int)
    if value < 1:
        raise ValueError(f"{name} is {value}, not a positive number")
    return value


def _shard(entry: dict[str, Any]) -> Shard:
    name = _plain_name(_entry(entry, "name", str))
    num_samples, num_bytes = _count(entry, "num_samples"), _count(entry, "num_bytes")
    return Shard(name, num_samples, num_bytes, _entry(entry, "sha256", str))


def _plain_name(name: str) -> str:
    if not name or name != Path(name).name:
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    return name
