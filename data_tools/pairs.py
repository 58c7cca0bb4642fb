"""Source: images with a text file of the same name beside each, `cat.jpg` and `cat.txt`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.image_folder import list_images, read_caption
from data_tools.source import IMAGE, BadItemError, caption_payloads, read_file


class PairsSource:
    """Every image below the folder; its caption is the whole text file. Subfolders are no classes."""

    name = "pairs"
    class_names: Sequence[str] = ()
    channels = 3
    image_size = None
    labels = None

    def __init__(self, root: Path) -> None:
        self._root = root
        listing = list_images(root)
        self._paths = listing.paths
        listing.tell(f"{root}: {len(self)} images")

    def __len__(self) -> int:
        return len(self._paths)

    def item_name(self, item: int) -> str:
        return self._paths[item]

    def part(self, items: np.ndarray) -> PairsSource:
        part = copy.copy(self)
        part._paths = self._paths.take(items)
        return part

    def read(self, item: int) -> dict[str, bytes]:
        image = self._root / self._paths[item]
        caption = read_caption(image)
        if caption is None:
            raise BadItemError("no text file beside it")
        return {IMAGE: read_file(image), **caption_payloads([caption])}
