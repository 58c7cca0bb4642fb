"""Source: WebDataset tars of any origin, img2dataset's output among them, to be packed again."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.source import IMAGE, BadItemError, Strings, label_payload
from data_tools.tars import Member, TarFile
from diffmoe_dist.data.format import CAPTION_FIELD, IMAGE_FIELDS, LABEL_FIELD, METADATA_FIELD
from diffmoe_dist.errors import UserError

_META = re.compile(r"(^|/)__[^/]*__($|/)")  # WebDataset's own notes


@dataclass(frozen=True)
class Group:
    """The members of one sample, by field."""

    key: str
    members: dict[str, Member]


class WebDatasetSource:
    """The samples of all tars, in order."""

    name = "webdataset"
    class_names: Sequence[str] = ()  # the samples tell
    channels = 3
    image_size = None
    labels = None

    def __init__(self, root: Path) -> None:
        self._tars = [TarFile(path) for path in list_tars(root)]
        self._items = Strings(  # tar, key, and (field, offset, size) of each member
            json.dumps([number, group.key, [[f, m.offset, m.size] for f, m in group.members.items()]])
            for number, tar in enumerate(self._tars)
            for group in group_members(tar.members())
        )
        self._required = required_fields(self._tars)

    def __len__(self) -> int:
        return len(self._items)

    def item_name(self, item: int) -> str:
        number, key, _ = json.loads(self._items[item])
        return f"{self._tars[number].path.name}:{key}"

    def part(self, items: np.ndarray) -> WebDatasetSource:
        part = copy.copy(self)
        part._items = self._items.take(items)
        return part

    def read(self, item: int) -> dict[str, bytes]:
        number, _, members = json.loads(self._items[item])
        tar = self._tars[number]
        used = (*IMAGE_FIELDS, *self._required)
        payloads = {field: tar.read(offset, size) for field, offset, size in members if field in used}
        check_payloads(payloads, self._required)
        image = next(field for field in payloads if field in IMAGE_FIELDS)
        return {IMAGE: payloads.pop(image), **payloads}


def list_tars(root: Path) -> list[Path]:
    """A tar, or the tars in a folder by name. Raises UserError for compressed ones, which cannot be read by offset."""
    paths = sorted(path for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else [root]
    compressed = [path.name for path in paths if path.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz"))]
    if compressed:
        raise UserError(f"SOURCE={root}: {compressed[0]} is compressed and cannot be read in place; gunzip it first")
    tars = [path for path in paths if path.suffix == ".tar"]
    if not tars:
        raise UserError(f"SOURCE={root}: holds no .tar file; name a folder of WebDataset tars")
    return tars


def group_members(members: Iterator[Member]) -> Iterator[Group]:
    """Neighbours of one key form a sample, as in WebDataset: the key ends at the first dot of the file's name."""
    group: Group | None = None
    for member in members:
        key, field = split_name(member.name)
        if not key or _META.search(member.name):
            continue
        if group is None or group.key != key or field in group.members:
            if group is not None:
                yield group
            group = Group(key, {})
        group.members[field] = member
    if group is not None:
        yield group


def split_name(name: str) -> tuple[str, str]:
    """`a/b.c.jpg` is the key `a/b` and the field `c.jpg`."""
    folder, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem) if field else "", field.lower()


def required_fields(tars: Sequence[TarFile]) -> tuple[str, ...]:
    """What a sample must have beside the image: label, caption, metadata, as most samples of the first tar have them.

    Raises UserError where no tar has an image.
    """
    for tar in tars:
        groups = [group for group in group_members(tar.members()) if not group.members.keys().isdisjoint(IMAGE_FIELDS)]
        if groups:
            used = (LABEL_FIELD, CAPTION_FIELD, METADATA_FIELD)
            return tuple(name for name in used if 2 * sum(name in group.members for group in groups) > len(groups))
    raise UserError(f"{tars[0].path.parent}: no sample with an image ({', '.join(IMAGE_FIELDS)}) in its tars")


def check_payloads(payloads: dict[str, bytes], required: Sequence[str]) -> None:
    """Whether one image and the required fields are there and readable; normalises the label. Raises BadItemError."""
    images = [field for field in payloads if field in IMAGE_FIELDS]
    missing = [field for field in required if field not in payloads]
    if len(images) != 1 or missing:
        problem = "several images" if len(images) > 1 else f"no {missing[0] if images else 'image'}"
        raise BadItemError(f"{problem} among its members ({', '.join(payloads) or 'none of use'})")
    if LABEL_FIELD in payloads:
        label = payloads[LABEL_FIELD].strip()
        if not label.isdigit():
            raise BadItemError(f"label {label[:20]!r} is not a number")
        payloads[LABEL_FIELD] = label_payload(int(label))
    try:
        payloads.get(CAPTION_FIELD, b"").decode()
        json.loads(payloads.get(METADATA_FIELD, b"{}"))
    except UnicodeDecodeError:
        raise BadItemError("its text is not UTF-8") from None
    except ValueError:
        raise BadItemError("its json does not parse") from None
