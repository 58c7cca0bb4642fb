"""The index beside a folder of WebDataset shards: checked when it is opened, then any sample is one read away.

What a process holds of it does not grow with the samples: the offsets and the keys stay on the disk, and a sample's row
is read with `pread`. (A mapping would do the same until the file is cut or the file server fails: a bus error ends the
process without a word.)
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import os
import struct
import tokenize
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from diffmoe_dist.data.format import (
    ABSENT,
    FORMAT,
    IMAGE_FIELDS,
    INDEX_NAME,
    PARAMETRISATIONS,
    TAR_BLOCK,
    VERSION,
    File,
    FolderMeta,
    parse_meta,
)
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256

_MAX_OPEN_FILES = 64  # a large set has more shards than a process may open files
_SHORT_NAME = 100  # bytes of a member's name at the start of its header
_COMMANDS = {"latents": "encode-latents BASE OUT --vae DIR", "text": "encode-text BASE OUT --encoder DIR"}  # by setting
_T = TypeVar("_T")


class CorruptShardError(RuntimeError):
    """A sample on disk is not what was packed; the message names the shard and the key."""


def member_crc32(header: bytes, payload: bytes) -> int:
    """The checksum of a tar member in `offsets.npy`: of its header block, which has the key, and its payload."""
    return zlib.crc32(payload, zlib.crc32(header))


class ShardIndex:
    """Random access to the samples of a folder of shards. Made by `ShardIndex.open`; can be pickled and forked."""

    def __init__(self, folder: Path, named: str, raw: bytes, meta: FolderMeta) -> None:
        self.folder, self.meta = folder, meta
        self.named = named  # as the user named the folder: `data.shards=FOLDER`
        self.fingerprint: str = hashlib.sha256(raw).hexdigest()
        self.num_samples, self.fields, self.shards = meta.num_samples, meta.fields, meta.shards
        self.num_classes, self.class_names = meta.num_classes, list(meta.class_names)
        self.image_size, self.channels = meta.image_size, meta.channels
        self.latents, self.text, self.base = meta.latents, meta.text, meta.base
        self.image_fields = tuple(field for field in meta.fields if field in IMAGE_FIELDS)  # a sample has one of them
        self._ends = list(itertools.accumulate(shard.num_samples for shard in self.shards))
        self._offsets = _Rows(folder / meta.offsets.name)
        self._keys = _Rows(folder / meta.keys.name)
        self._row = f"<{3 * len(self.fields)}q"
        self._open_shards: dict[int, io.FileIO] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], named: str | None = None) -> ShardIndex:
        """Open and check a folder of shards: the index, offsets and keys, every shard present in its full size.

        The content of the shards is checked sample by sample, as it is read.
        Raises UserError for whatever is wrong, which begins with `named`: how the user named the folder, as
        `--shards FOLDER`; None: `data.shards=FOLDER`.
        """
        path = Path(folder)
        named = f"data.shards={path}" if named is None else named
        if not path.is_dir():
            _refuse(named, "no such folder", f"make it: {_command(named)}")
        raw = _load(named, INDEX_NAME, lambda: _check_regular(path / INDEX_NAME).read_bytes())
        meta = _load(named, INDEX_NAME, lambda: json.loads(raw))
        known = isinstance(meta, dict) and meta.get("format") == FORMAT
        if not known or meta.get("version") != VERSION:
            found = f"{meta.get('format')} version {meta.get('version')}" if isinstance(meta, dict) else "no format"
            _refuse(named, f"{INDEX_NAME} says {found}, this program reads {FORMAT} version {VERSION}", "pack it again")
        index = _load(named, INDEX_NAME, lambda: cls(path, named, raw, parse_meta(meta)))
        index._check_counts()
        index._check_rows()
        index._check_shards()
        index._check_latents()
        return index

    def read(self, sample_id: int, fields: Collection[str] | None = None) -> dict[str, bytes]:
        """The payloads of a sample, by field; `fields` limits them. A field that the sample lacks is left out.

        Raises IndexError for an id outside 0..num_samples-1, CorruptShardError where the bytes are not those packed.
        """
        payloads = {}
        shard = self.shard_of(sample_id) if 0 <= sample_id < self.num_samples else 0
        for field, offset, size, crc32 in self.entries(sample_id):
            if size == ABSENT or (fields is not None and field not in fields):
                continue
            if size < 0 or not TAR_BLOCK <= offset <= self.shards[shard].num_bytes - size:
                raise self.corrupt(sample_id, f"{field} lies outside the shard: {size} bytes from {offset} on")
            try:
                descriptor = self._shard_file(shard).fileno()
                member = os.pread(descriptor, TAR_BLOCK + size, offset - TAR_BLOCK)
            except OSError as error:
                raise self.corrupt(sample_id, f"cannot be read ({error})") from error
            if len(member) != TAR_BLOCK + size:
                raise self.corrupt(sample_id, f"{field} is cut: {max(len(member) - TAR_BLOCK, 0)} of {size} bytes")
            payload = member[TAR_BLOCK:]
            if member_crc32(member[:TAR_BLOCK], payload) != crc32:
                raise self.corrupt(sample_id, f"{field} is damaged: its CRC-32 is not the one recorded")
            name = member[:_SHORT_NAME].rstrip(b"\0").lower()  # a longer one stands, cut, before the header
            if len(name) < _SHORT_NAME and field.isascii() and not name.endswith(f".{field}".encode()):
                raise self.corrupt(sample_id, f"{field} is {name.decode(errors='replace')} in the tar")
            payloads[field] = payload
        return payloads

    def entries(self, sample_id: int) -> list[tuple[str, int, int, int]]:
        """(field, payload offset in the shard, payload size, CRC-32 of the member); ABSENT for a lacking field."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        row = self._offsets.read(sample_id)
        if len(row) != struct.calcsize(self._row):
            raise CorruptShardError(f"{self._offsets.path}: cut while in use")
        numbers = iter(struct.unpack(self._row, row))
        return list(zip(self.fields, numbers, numbers, numbers, strict=True))

    def key(self, sample_id: int) -> str:
        """The WebDataset key of a sample: the name of its members up to the first dot."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        return self._keys.read(sample_id).rstrip(b"\0").decode("utf-8", "surrogateescape")

    def shard_of(self, sample_id: int) -> int:
        """The number of the shard that holds a sample."""
        return bisect.bisect_right(self._ends, sample_id)

    def samples_of(self, shard: int) -> range:
        """The sample ids that a shard holds."""
        return range(self._ends[shard] - self.shards[shard].num_samples, self._ends[shard])

    def corrupt(self, sample_id: int, problem: str) -> CorruptShardError:
        """The error that says what is wrong with a sample, and where it lies."""
        shard = self.shards[self.shard_of(sample_id)]
        return CorruptShardError(f"{self.folder / shard.name}, key {self.key(sample_id)}: {problem}")

    def check_base(self, base: ShardIndex) -> None:
        """Check that this side folder was computed from `base`: the same samples under the same keys in the same order.

        Raises UserError where it was not.
        """
        if self.base is None:
            _refuse(self.named, "not a side folder: its index names no base", "name a folder of latents or text")
        elif self.base.fingerprint != base.fingerprint:
            problem = f"computed from another data set ({self.base.fingerprint[:12]}...) than {base.folder}"
            _refuse(self.named, problem, "encode it again from this one")
        elif self.meta.keys.sha256 != base.meta.keys.sha256:
            _refuse(self.named, f"its keys are not those of {base.folder}", "encode it again")

    def close(self) -> None:
        """Close the files that this process opened; reading opens them again."""
        self._offsets.close()
        self._keys.close()
        while self._open_shards:
            self._open_shards.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_shards": {}}  # a worker process opens the shards itself

    def _shard_file(self, shard: int) -> io.FileIO:
        file = self._open_shards.pop(shard, None)
        if file is None:
            file = io.FileIO(self.folder / self.shards[shard].name)
            if len(self._open_shards) == _MAX_OPEN_FILES:
                self._open_shards.pop(next(iter(self._open_shards))).close()
        self._open_shards[shard] = file  # the last one used goes to the end
        return file

    def _check_counts(self) -> None:
        total = self._ends[-1] if self._ends else 0
        if total != self.num_samples or total == 0:
            problem = f"{INDEX_NAME} says {self.num_samples} samples but its shards hold {total}"
            _refuse(self.named, problem, "restore or pack it again")
        if len(self.class_names) != self.num_classes:
            problem = f"{INDEX_NAME} says {self.num_classes} classes but names {len(self.class_names)}"
            _refuse(self.named, problem, "restore or pack it again")

    def _check_rows(self) -> None:
        self._check_array(self._offsets, self.meta.offsets, (self.num_samples, len(self.fields), 3), "<i8")
        self._check_array(self._keys, self.meta.keys, (self.num_samples,), "|S")

    def _check_array(self, rows: _Rows, file: File, shape: tuple[int, ...], dtype: str) -> None:
        found = _load(self.named, file.name, lambda: file_sha256(_check_regular(self.folder / file.name)))
        if found != file.sha256:
            problem = f"{file.name} has SHA-256 {found[:12]}..., {INDEX_NAME} records {file.sha256[:12]}..."
            _refuse(self.named, problem, "restore both or pack again")
        array = _load(self.named, file.name, rows.find)
        if array.shape != shape or not array.dtype.str.startswith(dtype):
            problem = f"{file.name} holds {array.dtype} {array.shape}, {INDEX_NAME} needs {dtype} {shape}"
            _refuse(self.named, problem, "restore both or pack again")

    def _check_shards(self) -> None:
        for shard in self.shards:
            size = _load(self.named, shard.name, (self.folder / shard.name).stat).st_size
            if size != shard.num_bytes:
                problem = f"{shard.name} has {size} bytes, {INDEX_NAME} records {shard.num_bytes}"
                _refuse(self.named, problem, "restore the shard or pack again")

    def _check_latents(self) -> None:
        # Mean and standard deviation have the shape of mean and log variance: only the name tells them apart.
        if self.latents is not None and self.latents.parametrisation not in PARAMETRISATIONS:
            problem = f"latents are {self.latents.parametrisation}, this program reads {' and '.join(PARAMETRISATIONS)}"
            _refuse(self.named, problem, "encode them again: python -m data_tools encode-latents")


class _Rows:
    """The rows of an .npy file, one `pread` each. Can be pickled and forked; a copy opens the file itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = self._row_bytes = 0
        self._file: io.FileIO | None = None

    def find(self) -> np.ndarray:
        """Learn from the header where the rows lie. Returns the array, mapped, for a look at its shape and dtype."""
        try:
            array = np.lib.format.open_memmap(self.path, mode="r")
        except (ArithmeticError, MemoryError, RecursionError, SyntaxError, tokenize.TokenError) as error:
            raise ValueError(f"its header cannot be read: {type(error).__name__}") from error
        if array.flags.f_contiguous and array.ndim > 1 and not array.flags.c_contiguous:
            raise ValueError("its rows are not contiguous")
        self._start, self._row_bytes = array.offset, array.strides[0]
        return array

    def read(self, row: int) -> bytes:
        if self._file is None:
            self._file = io.FileIO(self.path)
        return os.pread(self._file.fileno(), self._row_bytes, self._start + row * self._row_bytes)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def text_sha256(parts: Iterator[str]) -> str:
    """One SHA-256 over many strings, each closed by a zero byte; two different lists never share it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _check_regular(path: Path) -> Path:
    """Raises ValueError for a pipe, which would be waited for, and for a device."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    return path


def _command(named: str) -> str:
    """The command that makes a folder named so: `data.latents=FOLDER` is one of latents."""
    setting = named.partition("=")[0].rpartition(".")[2]
    return f"python -m data_tools {_COMMANDS.get(setting, 'pack SOURCE OUT')}"


def _refuse(named: str, problem: str, remedy: str) -> NoReturn:
    raise UserError(f"{named}: {problem}; {remedy}")


def _load(named: str, name: str, action: Callable[[], _T]) -> _T:
    """Do one step of opening a file of the folder, and refuse the folder where it fails."""
    try:
        return action()
    except RecursionError:
        _refuse(named, f"{name} is damaged (nested too deeply)", "restore or pack it again")
    except FileNotFoundError:
        _refuse(named, f"{name} is missing", f"restore it or finish the folder: {_command(named)}")
    except OSError as error:
        _refuse(named, f"{name} cannot be read ({error.strerror})", "check the disk and the permissions")
    except KeyError as error:
        _refuse(named, f"{name} has no entry {error}", "restore or pack it again")
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        _refuse(named, f"{name} is damaged ({error})", "restore or pack it again")
