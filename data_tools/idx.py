"""Source: MNIST and Fashion-MNIST as they are distributed, `*-images-idx3-ubyte.gz` with `*-labels-idx1-ubyte.gz`."""

from __future__ import annotations

import copy
import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.images import encode_image
from data_tools.source import label_payload
from diffmoe_dist.errors import UserError

_UNSIGNED_BYTES = 0x08


class IdxSource:
    """Gray images and their labels, from the file of the images; the labels' file lies beside it."""

    name = "idx"
    channels = 1

    def __init__(self, images: Path) -> None:
        labels = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
        if labels == images:
            raise UserError(f"SOURCE={images}: not named *-images-idx3-ubyte[.gz]; name the file of the images")
        self._images = _read_idx(images, dimensions=3)  # (items, H, W)
        self.labels: np.ndarray | None = _read_idx(labels, dimensions=1).astype(np.int64)
        if len(self._images) != len(self.labels):
            raise UserError(f"SOURCE={images}: {len(self._images)} images but {len(self.labels)} labels; restore both")
        height, width = self._images.shape[1:]
        if height != width:
            raise UserError(f"SOURCE={images}: images of {width}x{height} pixels; only squares are read")
        self.image_size: int | None = height
        self.class_names: Sequence[str] = [str(label) for label in range(self.labels.max(initial=0) + 1)]
        self._items = np.arange(len(self._images))

    def __len__(self) -> int:
        return len(self._images)

    def item_name(self, item: int) -> str:
        return f"image {self._items[item]}"

    def part(self, items: np.ndarray) -> IdxSource:
        part = copy.copy(self)
        assert self.labels is not None
        part._items, part._images, part.labels = self._items[items], self._images[items], self.labels[items]
        return part

    def read(self, item: int) -> dict[str, bytes]:
        """A PNG file and the label."""
        assert self.labels is not None
        return {
            "png": encode_image(Image.fromarray(self._images[item]), "png"),
            "cls": label_payload(self.labels[item]),
        }


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file: two zero bytes, the type, the number of dimensions, their sizes (big-endian), the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"SOURCE={path}: no such file; images and labels belong side by side") from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"SOURCE={path}: cannot be read ({error}); restore it") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, _UNSIGNED_BYTES, dimensions]):
        raise UserError(f"SOURCE={path}: not an IDX file of bytes in {dimensions} dimensions; restore it")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) != start + math.prod(shape):
        raise UserError(f"SOURCE={path}: {len(content)} bytes, {shape} needs {start + math.prod(shape)}; restore it")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
