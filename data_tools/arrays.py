"""What sources have in common whose gray images and labels are held in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_tools.source import label_payload
from data_tools.stored_images import encode_image


class ArraySource:
    """Gray square images as PNG files, and their labels."""

    channels = 1

    def __init__(self, name: str, item: str, images_NHW: np.ndarray, labels: np.ndarray, classes: int) -> None:
        self.name, self._item = name, item  # the format's; what one of the images is called
        self._images = images_NHW
        self.labels = labels.astype(np.int64)
        self.image_size = images_NHW.shape[1]
        self.class_names: Sequence[str] = [str(label) for label in range(classes)]
        self._items = np.arange(len(images_NHW))

    def __len__(self) -> int:
        return len(self._images)

    def item_name(self, item: int) -> str:
        return f"{self._item} {self._items[item]}"

    def part(self, items: np.ndarray) -> ArraySource:
        part = copy.copy(self)
        part._items, part._images, part.labels = self._items[items], self._images[items], self.labels[items]
        return part

    def read(self, item: int) -> dict[str, bytes]:
        """A PNG file and the label."""
        return {
            "png": encode_image(Image.fromarray(self._images[item]), "png"),
            "cls": label_payload(self.labels[item]),
        }
