"""Images side by side in one, with what they are called.

Shape legend: N images, H = W image size, C channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffmoe_dist.sampling.conditions import ClassLabels, Conditions

CELL_PIXELS = 64  # images smaller than this are enlarged in a grid
_GAP = 2  # pixels around an image
_LINES = 2  # of a name
_MOST = 100  # images of a job's grid


def image_grid(
    images_NHWC: np.ndarray, labels: Sequence[int] | None = None, name: Callable[[int], str] | None = None
) -> np.ndarray:
    """One image, (height, width, C) uint8, near to a square; small images enlarged without smoothing.

    Args:
        labels: of the images; where they are of few enough classes, each column is of one class.
        name: what is written over the columns, or else over every image, by label.
    """
    places = lay_out(len(images_NHWC), labels)
    _, height, _, channels = images_NHWC.shape
    scale = max(1, CELL_PIXELS // height)
    cells = images_NHWC.repeat(scale, axis=1).repeat(scale, axis=2)
    cells = np.pad(cells, ((0, 1), (_GAP, _GAP), (_GAP, _GAP), (0, 0)))  # the last one is an empty place
    rows = [np.concatenate(cells[row], axis=1) for row in places]
    if labels is None or name is None:
        return np.concatenate(rows)
    cell = cells.shape[1]
    headed = rows[:1] if has_class_columns(places, labels) else rows
    for number in range(len(headed)):
        names = ["" if place < 0 else name(labels[place]) for place in places[number]]
        rows[number] = np.concatenate([_headings(names, cell, channels), rows[number]])
    return np.concatenate(rows)


def lay_out(num: int, labels: Sequence[int] | None = None) -> np.ndarray:
    """(rows, columns) the number of the image in each place, -1: none. Near to a square.

    Where `labels` are of at most as many classes as the square has columns, each column is of one class, in the order
    in which the classes come first; a class may have several columns, side by side.
    """
    side = math.ceil(math.sqrt(num))
    classes = list(dict.fromkeys(labels or ()))
    if not 1 < len(classes) <= side:
        return np.pad(np.arange(num), (0, -num % side), constant_values=-1).reshape(-1, side)
    most = max(Counter(labels).values())

    def is_far_from_square(many: int) -> float:
        return round(abs(math.log(len(classes) * many / math.ceil(most / many))), 6)

    many = min(range(most, 0, -1), key=is_far_from_square)  # rather wide than high
    places = np.full((math.ceil(most / many), len(classes), many), -1)
    filled: Counter[int] = Counter()
    for number, label in enumerate(labels or ()):
        row, column = divmod(filled[label], many)
        places[row, classes.index(label), column] = number
        filled[label] += 1
    return places.reshape(len(places), -1)


def has_class_columns(places: np.ndarray, labels: Sequence[int]) -> bool:
    """Whether each column of the layout is of one class."""
    return all(len({labels[place] for place in column if place >= 0}) == 1 for column in places.T)


def conditioned_grid(images_NHWC: np.ndarray, conditions: Conditions) -> np.ndarray:
    """The grid of the first images of a job, at most 100; those of classes with their names."""
    images_NHWC = images_NHWC[:_MOST]
    if not isinstance(conditions, ClassLabels) or not conditions.null_label:
        return image_grid(images_NHWC)
    labels = [conditions.label(number) for number in range(len(images_NHWC))]

    def drawn(label: int) -> str:
        name = conditions.heading(label)
        return name if all(ord(letter) < 0x180 for letter in name) else str(label)  # what Pillow's font has

    return image_grid(images_NHWC, labels, drawn)


def _headings(names: Sequence[str], cell: int, channels: int) -> np.ndarray:
    """(height, len(names) * cell, C): each name over its column; of neighbours with one name only the first has it."""
    size = min(max(cell // 6, 11), 24)
    font = ImageFont.load_default(size)
    letters = cell / font.getlength("n")
    firsts = [column for column, name in enumerate(names) if not column or name != names[column - 1]]
    widths = [after - first for first, after in pairwise([*firsts, len(names)])]
    texts = [
        wrap(names[first], max(1, int(letters * width)), max_lines=_LINES, placeholder=" ...")
        for first, width in zip(firsts, widths, strict=True)
    ]
    line = size + 2
    height = line * max(map(len, texts), default=0) + 4
    strip = Image.new("L", (len(names) * cell, height))
    draw = ImageDraw.Draw(strip)
    for column, lines in zip(firsts, texts, strict=True):
        for number, text in enumerate(lines):
            draw.text((column * cell + _GAP, height - line * (len(lines) - number) - 2), text, fill=235, font=font)
    return np.repeat(np.asarray(strip)[:, :, None], channels, axis=2)
