"""How images lie in a grid."""

from __future__ import annotations

import numpy as np
import pytest

from diffmoe_dist.sampling.grid import has_class_columns, image_grid, lay_out


@pytest.mark.parametrize(
    ("classes", "num", "shape"),
    [(3, 42, (7, 6)), (2, 9, (3, 4)), (10, 100, (10, 10)), (1, 9, (3, 3)), (10, 20, (4, 5)), (1000, 100, (10, 10))],
)
def test_grids_are_near_to_squares_and_of_few_classes_each_column_is_one(
    classes: int, num: int, shape: tuple[int, int]
) -> None:
    labels = [number % classes for number in range(num)]
    places = lay_out(num, labels)
    assert places.shape == shape
    assert sorted(places[places >= 0].tolist()) == list(range(num))
    assert has_class_columns(places, labels) == (classes <= shape[1])


def test_columns_are_in_the_order_of_the_classes_asked_for_and_named() -> None:
    labels = [7, 2, 7, 2, 7, 2, 7, 2]
    assert lay_out(8, labels).tolist() == [[0, 2, 1, 3], [4, 6, 5, 7]]
    images_NHWC = np.zeros((8, 64, 64, 3), np.uint8)
    plain, named = image_grid(images_NHWC), image_grid(images_NHWC, labels, lambda label: f"cat {label}")
    assert plain.shape == (3 * 68, 3 * 68, 3)
    assert named.shape[1] == 4 * 68 and 2 * 68 < named.shape[0] < 2 * 68 + 40
    heading = named[: named.shape[0] - 2 * 68]
    assert heading[:, :68].any() and heading[:, 2 * 68 : 3 * 68].any() and not heading[:, 68 : 2 * 68].any()
