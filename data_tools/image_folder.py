"""Source: a folder of images, a subfolder for each class (ImageNet, torchvision's ImageFolder), or without classes."""

from __future__ import annotations

import copy
import logging
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_tools.source import IMAGE, BadItemError, Strings, caption_payloads, label_payload, read_file
from diffmoe_dist.data.images import walk_files
from diffmoe_dist.errors import UserError

logger = logging.getLogger("data_tools")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_TEXTS = (".txt", ".TXT")
_MAX_NAMED = 5


class ImageFolderSource:
    """Images below a folder, in the order of their paths. A class is a subfolder; its label, its rank by name.

    An image with a text file beside it has a caption, too. A few images beside the class folders are strays and left
    out. Raises UserError where it is not clear whether there are classes, or where a class would have no images.
    """

    name = "image-folder"
    channels = 3
    image_size = None

    def __init__(self, root: Path) -> None:
        self._root = root
        listing = list_images(root)
        folders = listing.top_folders if has_classes(root, listing) else []
        strays = listing.num_top if folders else 0
        self.class_names: Sequence[str] = folders
        self._paths = Strings(path for path in listing.paths if not folders or "/" in path)
        self.labels: np.ndarray | None = None
        if folders:
            self.labels = _labels(root, folders, self._paths)
        named = f" in {len(folders)} classes ({name_some(folders)})" if folders else " without classes"
        listing.tell(f"{root}: {len(self)} images{named}", strays)

    def __len__(self) -> int:
        return len(self._paths)

    def item_name(self, item: int) -> str:
        return self._paths[item]

    def part(self, items: np.ndarray) -> ImageFolderSource:
        part = copy.copy(self)
        part._paths = self._paths.take(items)
        part.labels = None if self.labels is None else self.labels[items]
        part.class_names = ()
        return part

    def read(self, item: int) -> dict[str, bytes]:
        image = self._root / self._paths[item]
        payloads = {IMAGE: read_file(image)}
        if self.labels is not None:
            payloads["cls"] = label_payload(self.labels[item])
        caption = read_caption(image)
        return payloads if not caption else {**payloads, **caption_payloads([caption])}


@dataclass
class Listing:
    """All that lies below a folder, hidden files and folders excepted; links to folders are followed, each once."""

    paths: Strings  # of the images, relative to the folder, in the order of their names
    num_top: int = 0  # of them, in the folder itself
    num_texts: int = 0  # of them, with a text file of the same name beside
    top_folders: list[str] = field(default_factory=list)
    top_files: list[str] = field(default_factory=list)  # that are no images
    others: Counter[str] = field(default_factory=Counter)  # files that are neither image nor text of one, by suffix
    repeated: list[str] = field(default_factory=list)  # links to folders that were visited before

    def add(self, folder: str, subfolders: Sequence[str], files: Sequence[str]) -> None:
        """Note what a folder holds beside the images; "" is the one that all others lie in."""
        images = [name for name in files if is_image_name(name)]
        texts, used = {name for name in files if name.endswith(_TEXTS)}, set(images)
        for name in images:
            own = texts.intersection(os.path.splitext(name)[0] + suffix for suffix in _TEXTS)
            self.num_texts += bool(own)
            used |= own
        if not folder:
            self.num_top, self.top_folders = len(images), list(subfolders)
            self.top_files = [name for name in files if not is_image_name(name)]
        self.others.update(os.path.splitext(name)[1].lower() for name in files if name not in used)

    def tell(self, found: str, num_strays: int = 0) -> None:
        """Say what was found, and what was left aside."""
        aside = [f"{number} {suffix or 'without suffix'}" for suffix, number in self.others.most_common(_MAX_NAMED)]
        if num_strays:
            strays = [path for path in self.paths if "/" not in path]
            aside.insert(0, f"{num_strays} images beside the class folders ({name_some(strays)})")
        if self.repeated:
            aside.append(f"links to folders that are read already ({name_some(self.repeated)})")
        captions = f", {self.num_texts} with a caption" if self.num_texts else ""
        logger.info("%s%s%s", found, captions, f"; left aside: {', '.join(aside)}" if aside else "")


def list_images(root: Path) -> Listing:
    """Look at everything below a folder once. Raises UserError where that is not allowed."""
    listing = Listing(Strings(()))
    paths = walk_files(root, listing.add, lambda folder: listing.repeated.append(folder.rstrip("/")))
    try:
        listing.paths = Strings(path for path in paths if is_image_name(os.path.basename(path)))
    except OSError as error:
        raise UserError(f"SOURCE={root}: {error.filename} cannot be listed ({error.strerror}); repair it") from error
    return listing


def is_image_name(name: str) -> bool:
    """Whether a file is named like an image, hidden ones (as macOS leaves them) excepted."""
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def read_caption(image: Path) -> str | None:
    """The whole text file beside an image; None where there is none. Raises BadItemError."""
    text = next((text for text in map(image.with_suffix, _TEXTS) if text.is_file()), None)
    if text is None:
        return None
    try:
        return read_file(text).decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadItemError("its text file is not UTF-8") from None


def name_some(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join([*names[:_MAX_NAMED], *(["..."] if len(names) > _MAX_NAMED else [])])


def has_classes(root: Path, listing: Listing) -> bool:
    """Whether the subfolders are classes. Raises UserError where images lie in and beside them in like numbers."""
    top, below = listing.num_top, len(listing.paths) - listing.num_top
    if not top or not below:
        return not top
    if 2 * top <= below and len(listing.top_folders) > 1:
        return True
    if top > below:
        return False
    raise UserError(
        f"SOURCE={root}: {top} images beside {below} in subfolders ({name_some(listing.top_folders)}): classes, or one "
        "flat set? move the ones apart"
    )


def _labels(root: Path, folders: Sequence[str], paths: Strings) -> np.ndarray:
    """(items,) int64, the rank of each path's first folder. Raises UserError for a folder without images."""
    rank = {folder: label for label, folder in enumerate(folders)}
    labels = np.array(array("q", (rank[path.partition("/")[0]] for path in paths)), dtype=np.int64)
    empty = np.flatnonzero(np.bincount(labels, minlength=len(folders)) == 0)
    if len(empty):
        raise UserError(
            f"SOURCE={root}: class folder {folders[empty[0]]} has no images of its own; remove it, for labels are ranks"
        )
    return labels
