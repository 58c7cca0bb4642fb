"""Source: a folder of images, a subfolder for each class (ImageNet, torchvision's ImageFolder), or without classes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_tools.source import IMAGE, Strings, label_payload, read_file
from diffmoe_dist.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class ImageFolderSource:
    """Images below a folder, in the order of their paths. A class is a subfolder; its label, its rank by name."""

    name = "image-folder"
    channels = 3
    image_size = None

    def __init__(self, root: Path) -> None:
        self._root = root
        if any(is_image_name(name) for name in os.listdir(root)):
            self.class_names: Sequence[str] = ()  # images lie in the folder itself: it is one flat set
            self._paths = Strings(image_paths(root))
            self.labels: np.ndarray | None = None
            return
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        counts, paths = [], []
        for folder in folders:
            of_class = [f"{folder}/{path}" for path in image_paths(root / folder)]
            if not of_class:
                raise UserError(f"SOURCE={root}: class folder {folder} has no images; remove it, for labels are ranks")
            counts.append(len(of_class))
            paths.append(Strings(of_class))
        self.class_names = folders
        self._paths = Strings(path for of_class in paths for path in of_class)
        self.labels = np.repeat(np.arange(len(folders), dtype=np.int64), counts)

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
        payloads = {IMAGE: read_file(self._root / self._paths[item])}
        if self.labels is not None:
            payloads["cls"] = label_payload(self.labels[item])
        return payloads


def is_image_name(name: str) -> bool:
    """Whether a file is named like an image, hidden ones (as macOS leaves them) excepted."""
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def image_paths(root: Path) -> Iterator[str]:
    """Paths of the images below a folder, relative to it, in the order of their names, links to folders followed."""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir():
            if not entry.name.startswith("."):
                yield from (f"{entry.name}/{path}" for path in image_paths(Path(entry.path)))
        elif is_image_name(entry.name):
            yield entry.name
