"""Source: images of squares, triangles and crosses with captions that say so; and what any such image shows.

For trying out text-to-image training: small enough to be learned in minutes, and whether an image follows its caption
is measured from its pixels.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from data_tools.source import caption_payloads
from data_tools.stored_images import encode_image

SIZE = 16  # pixels, height and width of an image
COLOURS = {
    "red": (220, 40, 40), "green": (30, 160, 60), "blue": (50, 70, 230),
    "yellow": (235, 220, 40), "magenta": (225, 50, 215), "cyan": (40, 205, 220),
}  # fmt: skip
SHAPES = ("square", "triangle", "cross")
# To the centre of a field of 8x8 pixels, in which the shape, of 7x7, lies anywhere: (row, column) of pixels' edges
POSITIONS = {
    "top left": (4, 4),
    "top right": (4, 12),
    "bottom left": (12, 4),
    "bottom right": (12, 12),
    "centre": (8, 8),
}
_FIELD, _SIDE = 8, 7
_GROUNDS = (32, 224)
_VARIATION = 12  # of the ground's gray and of the colour's brightness, up and down
_WORDINGS = (
    "a {colour} {shape} {at_the} {position}",
    "{position}: a {colour} {shape}",
    "{shape}, {colour}, {position}",
)
_ITEMS_OF_EACH = 32  # images of the same colour, shape and position
_DIFFERENCE = 50.0  # from the ground; half the smallest one of a colour is 53
# Guided images have brighter colours than those that were learned from; an orange is 95 from the nearest one
_COLOUR_TOLERANCE = 80.0
_OVERLAP = 0.6  # intersection over union; two different shapes have up to 0.68, and in other fields 0.39


@dataclass(frozen=True)
class Drawing:
    """What a caption asks for, or what an image shows; None: not to be told."""

    colour: str | None
    shape: str | None
    position: str | None


class ShapesSource:
    """Images of one shape on a plain ground, dark or light, and three captions of each. Needs no download."""

    name = "shapes"
    class_names: Sequence[str] = ()
    channels = 3
    image_size = SIZE
    labels = None

    def __init__(self) -> None:
        self._items = np.arange(_ITEMS_OF_EACH * len(drawings()))

    def __len__(self) -> int:
        return len(self._items)

    def item_name(self, item: int) -> str:
        number = int(self._items[item])
        return f"shape {number}: {captions(drawing_of(number))[0]}"

    def part(self, items: np.ndarray) -> ShapesSource:
        part = copy.copy(self)
        part._items = self._items[items]
        return part

    def read(self, item: int) -> dict[str, bytes]:
        """The PNG file and the captions of one image."""
        number = int(self._items[item])
        return {
            "png": encode_image(Image.fromarray(draw(number)), "png"),
            **caption_payloads(captions(drawing_of(number))),
        }


def drawings() -> list[Drawing]:
    """Every colour, shape and position, in a fixed order."""
    return [Drawing(*choice) for choice in itertools.product(COLOURS, SHAPES, POSITIONS)]


def prompts() -> list[str]:
    """A caption for each of `drawings`."""
    return [captions(drawing)[0] for drawing in drawings()]


def drawing_of(number: int) -> Drawing:
    """What the image with this number shows."""
    every = drawings()
    return every[number % len(every)]


def captions(drawing: Drawing) -> list[str]:
    """The same in several wordings."""
    at_the = "in the" if drawing.position == "centre" else "at the"
    return [wording.format(at_the=at_the, **vars(drawing)) for wording in _WORDINGS]


def read_caption(caption: str) -> Drawing:
    """What a caption asks for, in any wording; None for what it does not say, or of which it says two."""

    def the_one(names: Iterable[str]) -> str | None:
        found = [name for name in names if re.search(rf"\b{name}\b", caption, re.IGNORECASE)]
        return found[0] if len(found) == 1 else None

    return Drawing(the_one(COLOURS), the_one(SHAPES), the_one(POSITIONS))


def draw(number: int) -> np.ndarray:
    """The image with this number, (SIZE, SIZE, 3) uint8: a function of the number alone."""
    drawing = drawing_of(number)
    assert drawing.colour is not None and drawing.shape is not None and drawing.position is not None
    chance = hashlib.sha256(f"shapes/{number}".encode()).digest()
    ground, brighter = (byte % (2 * _VARIATION + 1) - _VARIATION for byte in chance[:2])
    row, column = (
        centre - _FIELD // 2 + byte % (_FIELD - _SIDE + 1)
        for centre, byte in zip(POSITIONS[drawing.position], chance[2:4], strict=True)
    )
    image = np.full((SIZE, SIZE, 3), _GROUNDS[chance[4] % 2] + ground, dtype=np.uint8)
    place = image[row : row + _SIDE, column : column + _SIDE]
    place[_mask(drawing.shape)] = np.array(COLOURS[drawing.colour]) + brighter
    return image


def measure(image: np.ndarray) -> Drawing:
    """What an image shows, (SIZE, SIZE, 3) uint8; nothing is learned.

    The ground is the median of the pixels, and the shape is what lies beyond half the way from it to the median of what
    differs from it. Its colour is the nearest one to its mean; its form and place are those of the template,
    anywhere in the image, that overlaps it best. What is too far from every colour, shape or position is none.
    """
    pixels = image.reshape(-1, 3).astype(np.float64)
    ground = np.median(pixels, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=1)  # (SIZE * SIZE,)
    if not (distance > _DIFFERENCE).any():
        return Drawing(None, None, None)
    foreground = np.median(pixels[distance > _DIFFERENCE], axis=0)
    covered = distance > np.linalg.norm(foreground - ground) / 2
    colour = _nearest(pixels[covered].mean(axis=0), COLOURS, _COLOUR_TOLERANCE)
    masks, named = _templates()
    shared = masks @ covered.astype(np.float64)
    overlap = shared / (masks.sum(axis=1) + covered.sum() - shared)
    best = int(overlap.argmax())
    if overlap[best] < _OVERLAP:
        return Drawing(colour, None, None)
    shape, centre = named[best]
    return Drawing(colour, shape, _nearest(np.array(centre), POSITIONS, _FIELD / 4))


def _nearest(value: np.ndarray, known: Mapping[str, tuple[int, ...]], tolerance: float) -> str | None:
    distances = {name: float(np.linalg.norm(value - other)) for name, other in known.items()}
    name = min(distances, key=lambda one: distances[one])
    return name if distances[name] <= tolerance else None


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, list[tuple[str, tuple[float, float]]]]:
    """Every shape at every place: (templates, SIZE * SIZE) of 0 and 1; its name and the (row, column) of its centre."""
    masks, named = [], []
    places = range(SIZE - _SIDE + 1)
    for shape, row, column in itertools.product(SHAPES, places, places):
        image = np.zeros((SIZE, SIZE))
        image[row : row + _SIDE, column : column + _SIDE] = _mask(shape)
        masks.append(image.reshape(-1))
        named.append((shape, (row + _SIDE / 2, column + _SIDE / 2)))
    return np.stack(masks), named


def _mask(shape: str) -> np.ndarray:
    """Which pixels of its square the shape covers, (_SIDE, _SIDE) bool."""
    rows, columns = np.mgrid[:_SIDE, :_SIDE]
    across, down = np.abs(columns - _SIDE // 2), np.abs(rows - _SIDE // 2)
    if shape == "triangle":
        return across <= (rows + 1) / 2
    if shape == "cross":
        return np.minimum(across, down) <= 1
    assert shape == "square", shape
    return np.ones((_SIDE, _SIDE), dtype=bool)
