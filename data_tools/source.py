"""What every reader of a kind of data offers: list the items cheaply, open one item."""

from __future__ import annotations

import errno
import json
import os
import stat
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diffmoe_dist.errors import UserError
from diffmoe_dist.files import is_utf8

IMAGE = "image"  # the payload of an image file as it was found; packing checks it and names its format

_NO_FILE = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.ENAMETOOLONG: "no such file",
    errno.ELOOP: "a link to itself",
    errno.ENXIO: "not a regular file",  # a socket
    errno.ENODEV: "not a regular file",
}


class BadItemError(ValueError):
    """An item that gives no sample. The message is the reason, the same on every run."""


class Source(Protocol):
    """Items numbered from 0. Making a source lists them, which is cheap; `read` opens one."""

    name: str  # the format's; also the first part of the shards' names
    class_names: Sequence[str]  # empty where there are no labels, or where only the items tell them
    channels: int  # 1 for gray data, else 3

    @property
    def image_size(self) -> int | None:
        """Height and width of payloads that are stored as read; None: the images tell."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """(items,) int64 where they are known from the listing."""
        ...

    def __len__(self) -> int: ...

    def item_name(self, item: int) -> str:
        """What the user knows the item by, as a path below the source."""
        ...

    def part(self, items: np.ndarray) -> Source:
        """A small source of these items alone, renumbered from 0, that can be sent to another process."""
        ...

    def read(self, item: int) -> Mapping[str, bytes]:
        """The fields of an item: `image` to be checked and named by its format, or `png` etc. to be stored as read.

        Must not depend on what was read before. Raises BadItemError for an item that gives no sample; any other
        exception, as of a failing disk, stops the command.
        """
        ...


class Strings(Sequence[str]):
    """An immutable list of strings in two arrays: the bytes, and 8 more for each string."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._bytes, ends = bytearray(), array("q", [0])
        for string in strings:
            self._bytes += string.encode("utf-8", "surrogateescape")  # file names need not be valid UTF-8
            ends.append(len(self._bytes))
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, item):  # type: ignore[no-untyped-def]  # a slice is never taken
        return bytes(self._bytes[self._ends[item] : self._ends[item + 1]]).decode("utf-8", "surrogateescape")

    def take(self, items: np.ndarray) -> Strings:
        return Strings(self[item] for item in items.tolist())


def read_file(path: Path) -> bytes:
    """A file's content. Raises BadItemError where there is no regular file; one that cannot be read is an error."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its other end
    except ValueError:
        raise BadItemError("no such file") from None  # a zero byte in the name
    except OSError as error:
        if error.errno in _NO_FILE:
            raise BadItemError(_NO_FILE[error.errno]) from None
        if error.errno == errno.EACCES:
            raise UserError(f"{path}: may not be read; change its permissions") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadItemError("not a regular file")
    with open(descriptor, "rb") as file:
        return file.read()


def label_payload(label: int) -> bytes:
    """The field `cls`: the class in decimal ASCII."""
    return str(int(label)).encode("ascii")


def caption_payloads(captions: Sequence[str], **metadata: Any) -> dict[str, bytes]:
    """The fields `txt`, the first caption, and `json`, all of them and what else is known.

    Raises BadItemError where there is no caption.
    """
    stripped = [text for text in (caption.strip().strip("\ufeff").strip() for caption in captions) if text]
    if not stripped:
        raise BadItemError("no caption")
    if not all(map(is_utf8, stripped)):
        raise BadItemError("its caption is not UTF-8")
    if any("\0" in text for text in stripped):
        raise BadItemError("its caption holds zero bytes, as text in UTF-16 does")
    described = json.dumps({"captions": stripped, **metadata}, ensure_ascii=False)
    if not is_utf8(described):  # a path need not be
        described = json.dumps({"captions": stripped, **metadata})
    return {"txt": stripped[0].encode(), "json": described.encode()}
