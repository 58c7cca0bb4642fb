"""Source: the 1,797 handwritten digits that come with scikit-learn. 8x8 pixels, gray, ten classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_tools.images import encode_image
from data_tools.source import label_payload
from diffmoe_dist.errors import UserError

_LARGEST_VALUE = 16  # of scikit-learn's pixels


class DigitsSource:
    """scikit-learn's digits as PNG images and labels. Needs no download."""

    name = "digits"
    class_names: Sequence[str] = tuple(str(digit) for digit in range(10))
    channels = 1
    image_size: int | None = 8

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError("SOURCE=digits: scikit-learn is not installed; run: pip install scikit-learn") from error
        digits = load_digits()
        self._items = np.arange(len(digits.images))
        self._images = np.rint(digits.images * (255 / _LARGEST_VALUE)).astype(np.uint8)  # (items, 8, 8)
        self.labels: np.ndarray | None = digits.target.astype(np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def item_name(self, item: int) -> str:
        return f"digit {self._items[item]}"

    def part(self, items: np.ndarray) -> DigitsSource:
        part = copy.copy(self)
        assert self.labels is not None
        part._items, part._images, part.labels = self._items[items], self._images[items], self.labels[items]
        return part

    def read(self, item: int) -> dict[str, bytes]:
        """The PNG file and the label of one digit."""
        assert self.labels is not None
        return {
            "png": encode_image(Image.fromarray(self._images[item]), "png"),
            "cls": label_payload(self.labels[item]),
        }
