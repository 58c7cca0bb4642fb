"""A folder of shards in the making: claimed, resumed shard by shard, closed with an index that is written last."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.shards import BadItem, ShardRecord, is_whole, load_record, save_record, sort_fields
from diffmoe_dist.data.format import (
    ABSENT,
    FORMAT,
    INDEX_NAME,
    KEYS_NAME,
    OFFSETS_NAME,
    QUARANTINE_NAME,
    VERSION,
    FolderMeta,
    parse_meta,
)
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import PARTIAL, atomic_file, file_sha256, lock_file, write_atomically, write_json

PROGRESS_NAME = ".progress"  # a folder: the records of finished shards, until the index is there
INDEX_FILES = (INDEX_NAME, OFFSETS_NAME, KEYS_NAME, QUARANTINE_NAME)
_IDENTITY_NAME = "pack.json"
_LOCK_NAME = "lock"
_OPTION_OF = {"image_size": "size", "shuffled": "order"}  # other entries have the names of their options
_OPTIONS = (
    "samples_per_shard", "seed", "order", "crop", "size", "encoding", "upright", "hold_out", "parametrisation",
    "max_length", "batch_size", "device",
)  # fmt: skip
_DETAIL = re.compile(r"'[^']*'|\d+")  # where reasons of one kind differ


def lock_progress(folder: Path, named: str) -> int | None:
    """Take the folder's work for this process, until `release_progress` or its end; None where there are no locks.

    Raises UserError, which names the other, where another process does this work now.
    """
    path = folder / PROGRESS_NAME / _LOCK_NAME
    try:
        lock = lock_file(path)
    except BlockingIOError:
        other = path.read_text(errors="replace").strip() or "another process"
        raise UserError(f"{named}: {other} writes it now; wait for its end, or name another folder") from None
    if lock is not None:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def release_progress(lock: int | None) -> None:
    """Give the lock back that `lock_progress` took."""
    if lock is not None:
        os.close(lock)


@dataclass(frozen=True)
class PackedFolder:
    """What was written."""

    num_samples: int
    num_shards: int
    num_bytes: int
    bad_reasons: Counter[str]  # how many items were bad; reasons of one kind count as the first of them
    num_cut: int  # captions that were cut, without those of shards that a finished run had written

    @property
    def num_bad(self) -> int:
        return self.bad_reasons.total()


@dataclass(frozen=True)
class ShardSlot:
    """The place of one shard. Small: it travels to the process that writes the shard."""

    out: Path
    name: str

    @property
    def path(self) -> Path:
        return self.out / self.name

    @property
    def _record_path(self) -> Path:
        return self.out / PROGRESS_NAME / f"{self.name}.json"

    def load(self) -> ShardRecord | None:
        """The record of a shard that is written; None where there is none that can be read."""
        try:
            return load_record(self._record_path)
        except (AttributeError, FileNotFoundError, KeyError, RecursionError, TypeError, ValueError):
            return None

    def finished(self) -> ShardRecord | None:
        """The record, if an earlier run finished the shard and its file is still whole."""
        record = self.load()
        return record if record is not None and is_whole(self.path, record.shard) else None

    def begin(self) -> Path:
        """Where to write the shard. From here on, and until the folder is finished, it is no data set."""
        (self.out / INDEX_NAME).unlink(missing_ok=True)
        self._record_path.unlink(missing_ok=True)
        return self.path

    def save(self, record: ShardRecord) -> None:
        """Keep the record of the shard, which is now written."""
        save_record(self._record_path, record)


@dataclass(frozen=True)
class ShardFolder:
    """Where shards are written.

    `identity` is what makes a folder this one: the command, the source, the settings that decide the bytes. It becomes
    the entry `packing` of the index. A folder begun with another identity is refused.
    """

    out: Path
    shard_names: Sequence[str]
    identity: Mapping[str, Any]
    other_files: Collection[str] = ()  # that the command writes beside the shards

    @property
    def slots(self) -> list[ShardSlot]:
        return [ShardSlot(self.out, name) for name in self.shard_names]

    def claim(self) -> None:
        """Make the folder, or take over one that holds this very work, finished or begun.

        Raises UserError for a folder that holds anything else.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            found = sorted(os.listdir(self.out))
        except OSError as error:
            raise UserError(
                f"OUT={self.out}: cannot be used as a folder ({error.strerror}); name another one"
            ) from error
        ours = {*self.shard_names, *self.other_files, *INDEX_FILES, PROGRESS_NAME}
        begun = PROGRESS_NAME in found or INDEX_NAME in found
        strange = [name for name in found if not begun or name.removesuffix(PARTIAL) not in ours]
        if strange:
            raise UserError(
                f"OUT={self.out}: the folder holds something else ({strange[0]}); name a new or empty folder"
            )
        if found and not self._is_same():
            raise UserError(
                f"OUT={self.out}: packed before with other arguments or by an older version{self._difference()}; "
                "name a new or empty folder"
            )
        self._progress.mkdir(exist_ok=True)
        weakref.finalize(self, release_progress, lock_progress(self.out, f"OUT={self.out}"))
        for name in found:
            if name.endswith(PARTIAL):  # left by a command that was killed
                (self.out / name).unlink(missing_ok=True)
        write_atomically(self._progress / _IDENTITY_NAME, json.dumps(self.identity))
        if INDEX_NAME in found:
            self._records_from_index()

    def finish(self, description: Mapping[str, Any]) -> PackedFolder:
        """Write the files of the index, `index.json` last. `description` has its entries that the shards do not tell.

        Raises UserError where the shards hold no sample.
        """
        packed = write_index(self.out, self.records, {"packing": self.identity, **description})
        shutil.rmtree(self._progress)
        return packed

    def write_quarantine(self) -> None:
        """List the bad items of the shards that are written so far."""
        write_quarantine(self.out, self.records())

    @property
    def _progress(self) -> Path:
        return self.out / PROGRESS_NAME

    def records(self) -> Iterator[ShardRecord]:
        """Of the shards that are written so far, in order."""
        return (record for slot in self.slots if (record := slot.load()) is not None)

    def _difference(self) -> str:
        """What is other in the pack that is there, where that can be read."""
        begun, index = self._progress / _IDENTITY_NAME, self.out / INDEX_NAME
        try:
            found = json.loads(begun.read_bytes()) if begun.exists() else json.loads(index.read_bytes())["packing"]
            there, here = _by_option(found), _by_option(self.identity)
        except (AttributeError, FileNotFoundError, KeyError, TypeError, ValueError):
            return ""
        other = [name for name in {**here, **there} if there.get(name) != here.get(name)]
        options = [
            f"--{name.replace('_', '-')} {_told(there.get(name))}, now {_told(here.get(name))}"
            for name in _OPTIONS
            if name in other
        ]
        others = [f"{name} {there[name]}, now {here[name]}" for name in other if name in there.keys() & here.keys()]
        told = options or others[:1]
        return f" ({'; '.join(told)})" if told else ""

    def _is_same(self) -> bool:
        begun, index = self._progress / _IDENTITY_NAME, self.out / INDEX_NAME
        try:
            if begun.exists():
                return bool(json.loads(begun.read_bytes()) == self.identity)
            if not index.exists():
                return {*os.listdir(self._progress)} <= {_LOCK_NAME}  # stopped between making the folder and naming it
            meta = json.loads(index.read_bytes())
            return isinstance(meta, dict) and meta.get("version") == VERSION and meta.get("packing") == self.identity
        except ValueError:
            return False

    def _records_from_index(self) -> None:
        """The other way round: what a finished folder's index says of its shards, where it can be trusted."""
        try:
            meta = parse_meta(json.loads((self.out / INDEX_NAME).read_bytes()))
            files = [meta.offsets, meta.keys, *([meta.quarantine] if meta.quarantine else [])]
            if any(file_sha256(self.out / file.name) != file.sha256 for file in files):
                return
        except (AttributeError, FileNotFoundError, KeyError, RecursionError, TypeError, ValueError):
            return
        for slot, record in zip(self.slots, _split(self.out, meta), strict=True):
            slot.save(record)


def _by_option(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an identity, those of `images` among them, under the names of their options."""
    entries = {**identity, **identity.get("images", {})}
    entries.pop("images", None)
    if "shuffled" in entries:
        entries["shuffled"] = "shuffled" if entries["shuffled"] else "listed"
    return {_OPTION_OF.get(name, name): value for name, value in entries.items()}


def _told(value: Any) -> str:
    """The value of an option, as it is given."""
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return str(value)


def write_index(
    out: Path, records: Callable[[], Iterator[ShardRecord]], description: Mapping[str, Any]
) -> PackedFolder:
    """Write offsets.npy, keys.npy, quarantine.jsonl and, last, index.json for shards that are there.

    `records()` gives them in order; it is called several times, so that they need not be in memory together.
    Raises UserError where the shards hold no sample.
    """
    summary = _Summary()
    for record in records():
        summary.add(record)
    write_quarantine(out, records())
    if summary.num_samples == 0:
        raise UserError(f"OUT={out}: no sample is left, all {summary.num_bad} items are bad; see {QUARANTINE_NAME}")
    _write_rows(out, records, summary)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": summary.num_samples,
        **summary.description(description),
        "fields": list(summary.sorted_fields()),
        "shards": [asdict(shard) for shard in summary.shards],
        "offsets": _file_entry(out / OFFSETS_NAME),
        "keys": _file_entry(out / KEYS_NAME),
        "quarantine": _file_entry(out / QUARANTINE_NAME) if summary.num_bad else None,
    }
    write_json(out / INDEX_NAME, index)
    num_bytes = sum(shard.num_bytes for shard in summary.shards)
    return PackedFolder(summary.num_samples, len(summary.shards), num_bytes, summary.bad_reasons, summary.num_cut)


def write_quarantine(out: Path, records: Iterator[ShardRecord]) -> None:
    """List the bad items of these shards, a JSON object a line; without any, there is no such file."""
    path = out / QUARANTINE_NAME
    with atomic_file(path) as file:
        for record in records:
            for item in record.bad:
                file.write((json.dumps({"shard": record.shard.name, **asdict(item)}) + "\n").encode())
    if path.stat().st_size == 0:
        path.unlink()


def _write_rows(out: Path, records: Callable[[], Iterator[ShardRecord]], summary: _Summary) -> None:
    """offsets.npy and keys.npy, a shard at a time."""
    fields = summary.sorted_fields()
    with atomic_file(out / OFFSETS_NAME) as file:
        shape: tuple[int, ...] = (summary.num_samples, len(fields), 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
        for record in records():
            file.write(_columns(record, fields).tobytes())
    with atomic_file(out / KEYS_NAME) as file:
        kind, shape = f"|S{summary.longest_key}", (summary.num_samples,)
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        for record in records():
            file.write(np.array([_encode_key(key) for key in record.keys], dtype=kind).tobytes())


def _encode_key(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")  # the name of a foreign tar's member need not be text


def _file_entry(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": file_sha256(path)}


@dataclass
class _Summary:
    """What the records say together."""

    num_samples: int = 0
    num_cut: int = 0
    num_classes: int = 0
    longest_key: int = 1
    fields: set[str] = field(default_factory=set)
    shards: list[Any] = field(default_factory=list)
    image_sizes: set[int | None] = field(default_factory=set)
    bad_reasons: Counter[str] = field(default_factory=Counter)
    first_reasons: dict[str, str] = field(default_factory=dict)  # by kind

    @property
    def num_bad(self) -> int:
        return self.bad_reasons.total()

    def add(self, record: ShardRecord) -> None:
        self.shards.append(record.shard)
        for item in record.bad:
            self.bad_reasons[self.first_reasons.setdefault(_DETAIL.sub("", item.reason), item.reason)] += 1
        self.num_cut += record.num_cut
        if not record.keys:
            return
        self.num_samples += len(record.keys)
        self.num_classes = max(self.num_classes, record.num_classes)
        self.longest_key = max(self.longest_key, *(len(_encode_key(key)) for key in record.keys))
        self.fields.update(record.fields)
        self.image_sizes.add(record.image_size)

    def sorted_fields(self) -> tuple[str, ...]:
        return sort_fields(self.fields)

    def description(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The entries between the counts and the files; those that the command does not give come from the records."""
        classes = list(given.get("class_names", ())) or [str(label) for label in range(self.num_classes)]
        found = {
            "num_classes": len(classes),
            "class_names": classes,
            "image_size": next(iter(self.image_sizes)) if len(self.image_sizes) == 1 else None,
            "channels": None,
            "base": None,
            "latents": None,
            "text": None,
        }
        return {**found, **given, "num_classes": len(classes), "class_names": classes}


def _columns(record: ShardRecord, fields: Sequence[str]) -> np.ndarray:
    """(samples, fields, 3) int64 with the columns of the whole folder."""
    columns = np.tile(np.array([ABSENT, ABSENT, 0], dtype="<i8"), (len(record.keys), len(fields), 1))
    if record.keys and record.fields:  # samples without any field are possible in a side folder
        columns[:, [fields.index(name) for name in record.fields]] = record.entries
    return columns


def _split(out: Path, meta: FolderMeta) -> Iterator[ShardRecord]:
    """The records that a finished folder was made of."""
    offsets = np.load(out / meta.offsets.name, mmap_mode="r", allow_pickle=False)
    keys = np.load(out / meta.keys.name, mmap_mode="r", allow_pickle=False)
    bad: dict[str, list[BadItem]] = {}
    lines = (out / meta.quarantine.name).read_text().splitlines() if meta.quarantine else []
    for line in map(json.loads, lines):
        bad.setdefault(line.pop("shard"), []).append(BadItem(**line))
    start = 0
    for shard in meta.shards:
        rows = slice(start, start + shard.num_samples)
        start += shard.num_samples
        yield ShardRecord(
            shard=shard,
            fields=meta.fields,
            keys=[bytes(key).decode("utf-8", "surrogateescape") for key in keys[rows]],
            entries=offsets[rows].tolist(),
            bad=bad.get(shard.name, []),
            image_size=meta.image_size,
            num_classes=meta.num_classes,
        )
