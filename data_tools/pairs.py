"""Source: images with a text file of the same name beside each, `cat.jpg` and `cat.txt`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.image_folder import image_paths
from data_tools.source import IMAGE, BadItemError, Strings, caption_payloads, read_file


class PairsSource:
    """Every image below the folder; its caption is the whole text file."""

    name = "pairs"
    class_names: Sequence[str] = ()
    channels = 3
    image_size = None
    labels = None

    def __init__(self, root: Path) -> None:
        self._root = root
        self._paths = Strings(image_paths(root))

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
        text = image.with_suffix(".txt")
        if not text.is_file():
            raise BadItemError("no text file beside it")
        try:
            caption = read_file(text).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadItemError("its text file is not UTF-8") from None
        return {IMAGE: read_file(image), **caption_payloads([caption])}
