"""Source: the 1,797 handwritten digits that come with scikit-learn. 8x8 pixels, gray, ten classes."""

from __future__ import annotations

import numpy as np

from data_tools.arrays import ArraySource
from diffmoe_dist.errors import UserError

_LARGEST_VALUE = 16  # of scikit-learn's pixels


class DigitsSource(ArraySource):
    """scikit-learn's digits. Needs no download."""

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError("SOURCE=digits: scikit-learn is not installed; run: pip install scikit-learn") from error
        digits = load_digits()
        images = np.rint(digits.images * (255 / _LARGEST_VALUE)).astype(np.uint8)
        super().__init__("digits", "digit", images, digits.target, classes=10)
