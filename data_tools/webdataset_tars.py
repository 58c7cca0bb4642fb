"""Source: WebDataset tars of any origin, img2dataset's output among them, to be packed again."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.labels import refuse_max_label
from data_tools.source import IMAGE, BadItemError, Strings, label_payload
from data_tools.tars import Member, TarFile
from diffmoe_dist.data.captions import captions_in
from diffmoe_dist.data.format import CAPTION_FIELD, IMAGE_FIELDS, LABEL_FIELD, METADATA_FIELD
from diffmoe_dist.data.grouping import SAMPLE_FIELDS, group_members
from diffmoe_dist.data.labels import MAX_LABEL, label_in_payload
from diffmoe_dist.errors import UserError

logger = logging.getLogger("data_tools")
TORN = "its files do not lie side by side; write the tar again with tar --sort=name"


@dataclass(frozen=True)
class Group:
    """The members of one sample, by field."""

    key: str
    members: dict[str, Member]

    @property
    def has_image(self) -> bool:
        return not self.members.keys().isdisjoint(IMAGE_FIELDS)


class WebDatasetSource:
    """The samples of all tars, in order."""

    name = "webdataset"
    class_names: Sequence[str] = ()  # the samples tell
    channels = 3
    image_size = None
    labels = None

    def __init__(self, root: Path, max_label: int | None = None) -> None:
        self._max_label = MAX_LABEL if max_label is None else max_label
        self._tars = [TarFile(path) for path in list_tars(root)]
        found = Found()
        self._items = Strings(  # tar, key, and (field, offset, size) of each member
            json.dumps([number, group.key, [[f, m.offset, m.size] for f, m in group.members.items()]])
            for number, tar in enumerate(self._tars)
            for group in found.count(tar)
        )
        self._torn = {number: keys for number, tar in enumerate(self._tars) if (keys := found.torn.get(tar.path))}
        if self._torn:
            self._items = self._items.take(
                np.array([item for item, text in enumerate(self._items) if self._is_kept(text)])
            )
        self._required = found.required_fields()
        if LABEL_FIELD not in self._required:
            refuse_max_label(max_label, "there are no labels")

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
        number, key, members = json.loads(self._items[item])
        if key in self._torn.get(number, ()):
            raise BadItemError(TORN)
        tar = self._tars[number]
        used = used_fields(self._required)
        payloads = {field: tar.read(offset, size) for field, offset, size in members if field in used}
        check_payloads(payloads, self._required, self._max_label)
        image = next(field for field in payloads if field in IMAGE_FIELDS)
        if captions := captions_in(payloads):
            payloads[CAPTION_FIELD] = captions[0].strip().encode()
        return {IMAGE: payloads.pop(image), **payloads}

    def _is_kept(self, item: str) -> bool:
        """Whether an item is more than a piece of a sample that is torn apart: of those, the image stands for all."""
        number, key, members = json.loads(item)
        return key not in self._torn.get(number, ()) or any(field in IMAGE_FIELDS for field, *_ in members)


class Found:
    """What the samples of some tars have, told by looking at all of them."""

    def __init__(self) -> None:
        self.num_samples = self.num_tars = 0  # samples with an image
        self.fields: Counter[str] = Counter()  # label, caption, metadata: how many of the samples have each
        self.torn: dict[Path, frozenset[str]] = {}  # keys whose files do not lie side by side, by tar
        self._where = ""

    def count(self, tar: TarFile) -> Iterator[Group]:
        """The groups of one more tar, as they are counted.

        Raises UserError where the files of most samples do not lie side by side.
        """
        self.num_tars, self._where = self.num_tars + 1, str(tar.path.parent)
        images: set[int] = set()  # hashes of keys: a tar may hold millions
        alone: set[int] = set()
        torn: dict[str, None] = {}
        for group in groups_of(tar):
            fields = [name for name in SAMPLE_FIELDS if name in group.members]
            if group.has_image:
                self.num_samples += 1
                self.fields.update(fields)
            own, other = (images, alone) if group.has_image else (alone, images)
            if group.has_image or fields:
                own.add(hash(group.key))
                if hash(group.key) in other:
                    torn[group.key] = None
            yield group
        if 2 * len(torn) > len(images):
            raise UserError(
                f"{tar.path}: the files of {next(iter(torn))} do not lie side by side; write it again with "
                "tar --sort=name"
            )
        self.torn[tar.path] = frozenset(torn)

    def required_fields(self) -> tuple[str, ...]:
        """What a sample must have beside the image: what most samples have. Tells what was found.

        Raises UserError where no tar has an image.
        """
        if not self.num_samples:
            raise UserError(f"{self._where}: no sample with an image ({', '.join(IMAGE_FIELDS)}) in its tars")
        counts = "".join(f", {self.fields[name]} with {name}" for name in SAMPLE_FIELDS if self.fields[name])
        required = tuple(name for name in SAMPLE_FIELDS if 2 * self.fields[name] > self.num_samples)
        few_labels = self.fields[LABEL_FIELD] and LABEL_FIELD not in required
        aside = f"; left aside: {LABEL_FIELD}, which most samples lack" if few_labels else ""
        logger.info("%s: %d samples in %d tars%s%s", self._where, self.num_samples, self.num_tars, counts, aside)
        return required


def used_fields(required: Sequence[str]) -> tuple[str, ...]:
    """The members that are read. A label that only some samples have is left aside: all have one, or none."""
    return (*IMAGE_FIELDS, *required, *(name for name in (CAPTION_FIELD, METADATA_FIELD) if name not in required))


def is_tar_name(name: str) -> bool:
    """Whether a file is named like a tar, compressed or not."""
    return re.search(r"\.(tar|tgz|tbz2|txz)(\.[a-z0-9]+)?$", name.lower()) is not None


def list_tars(root: Path) -> list[Path]:
    """A tar, or the tars in a folder by name. Raises UserError for compressed ones, which cannot be read by offset."""
    paths = sorted(path for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else [root]
    tars = [path for path in paths if is_tar_name(path.name)]
    for path in tars:
        if not path.name.lower().endswith(".tar"):
            raise UserError(f"SOURCE={root}: {path.name} is compressed and cannot be read in place; gunzip it first")
        if not path.is_file():
            raise UserError(f"SOURCE={root}: {path.name} is no regular file; remove it")
    if not tars:
        raise UserError(f"SOURCE={root}: holds no .tar file; name a folder of WebDataset tars")
    return tars


def groups_of(tar: TarFile) -> Iterator[Group]:
    """The samples of a tar, and what lies between them, in order."""
    for key, members in group_members((member.name, member) for member in tar.members()):
        yield Group(key, members)


def check_payloads(payloads: dict[str, bytes], required: Sequence[str], max_label: int = MAX_LABEL) -> None:
    """Whether one image and the required fields are there and readable; normalises the label. Raises BadItemError."""
    images = [field for field in payloads if field in IMAGE_FIELDS]
    missing = [field for field in required if field not in payloads]
    if len(images) != 1 or missing:
        problem = "several images" if len(images) > 1 else f"no {missing[0] if images else 'image'}"
        raise BadItemError(f"{problem} among its members ({', '.join(payloads) or 'none of use'})")
    try:
        if LABEL_FIELD in payloads:
            payloads[LABEL_FIELD] = label_payload(label_in_payload(payloads[LABEL_FIELD], max_label))
        captions_in(payloads)
    except ValueError as error:
        raise BadItemError(str(error)) from None
