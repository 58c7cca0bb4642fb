"""Source: the 1,797 handwritten digits that come with scikit-learn. 8x8 pixels, gray, ten classes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from diffmoe_dist.errors import UserError

_LARGEST_VALUE = 16  # of scikit-learn's pixels


class DigitsSource:
    """scikit-learn's digits as PNG images and labels. Needs no download."""

    name = "digits"
    fields: Sequence[str] = ("png", "cls")
    class_names: Sequence[str] = tuple(str(digit) for digit in range(10))
    image_size = 8
    channels = 1

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError("SOURCE=digits: scikit-learn is not installed; run: pip install scikit-learn") from error
        digits = load_digits()
        self._images = np.rint(digits.images * (255 / _LARGEST_VALUE)).astype(np.uint8)  # (1797, 8, 8)
        self._labels = digits.target

    def __len__(self) -> int:
        return len(self._images)

    def read(self, item: int) -> dict[str, bytes]:
        """The PNG file and the label, in decimal ASCII, of one digit."""
        png = io.BytesIO()
        Image.fromarray(self._images[item]).save(png, format="PNG")
        return {"png": png.getvalue(), "cls": str(int(self._labels[item])).encode("ascii")}
