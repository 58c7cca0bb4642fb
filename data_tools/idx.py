"""Source: MNIST and Fashion-MNIST as they are distributed, `*-images-idx3-ubyte.gz` with `*-labels-idx1-ubyte.gz`."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from data_tools.arrays import ArraySource
from data_tools.source import BadItemError, read_file
from diffmoe_dist.errors import UserError

_UNSIGNED_BYTES = 0x08


class IdxSource(ArraySource):
    """Gray images and their labels, from the file of the images; the labels' file lies beside it."""

    def __init__(self, path: Path) -> None:
        labels_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
        if labels_path == path:
            raise UserError(f"SOURCE={path}: not named *-images-idx3-ubyte[.gz]; name the file of the images")
        images, labels = _read_idx(path, dimensions=3), _read_idx(labels_path, dimensions=1)
        if len(images) != len(labels):
            raise UserError(f"SOURCE={path}: {len(images)} images but {len(labels)} labels; restore both")
        height, width = images.shape[1:]
        if height != width:
            raise UserError(f"SOURCE={path}: images of {width}x{height} pixels; only squares are read")
        super().__init__("idx", "image", images, labels, classes=int(labels.max(initial=0)) + 1)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file: two zero bytes, the type, the number of dimensions, their sizes (big-endian), the values."""
    try:
        content = read_file(path)
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except BadItemError as error:
        raise UserError(f"SOURCE={path}: {error}; images and labels belong side by side") from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"SOURCE={path}: cannot be read ({error}); restore it") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, _UNSIGNED_BYTES, dimensions]):
        raise UserError(f"SOURCE={path}: not an IDX file of bytes in {dimensions} dimensions; restore it")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) != start + math.prod(shape):
        raise UserError(f"SOURCE={path}: {len(content)} bytes, {shape} needs {start + math.prod(shape)}; restore it")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
