"""Where images to be scored come from, in their order, a batch at a time: an npz file, a folder, or shards.

Shape legend: N images, C channels, H, W image size.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.data.encoding import one_line
from diffmoe_dist.data.images import IMAGE_ENDINGS, ImageError, decode_image, find_images, open_image
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import refuse_irregular


class ImageSource(Protocol):
    num_images: int

    def batches(self, rows: range, batch_size: int) -> Iterator[Tensor | list[Tensor]]:
        """The images `rows`, in batches of (C, H, W) uint8."""
        ...


class NpzImages:
    """The array `arr_0` of an npz file, (N, H, W, C) uint8; read from front to back, never held as a whole.

    Args:
        named: how the user named the file, for messages; None: `--samples FILE`.

    Raises:
        UserError: the file is no npz, has no such array, or it is not of images with 1 or 3 channels.
    """

    def __init__(self, path: Path, named: str | None = None) -> None:
        self.path = path
        named = named or f"--samples {path}"
        try:
            with zipfile.ZipFile(refuse_irregular(path)) as archive, archive.open("arr_0.npy") as file:
                shape, fortran_order, dtype = _read_header(file)
                stored = archive.getinfo("arr_0.npy").file_size - file.tell()
        except OSError as error:
            raise UserError(f"{named}: cannot be read ({error.strerror}); give an npz file") from None
        except KeyError:
            raise UserError(f"{named}: it has no array arr_0; give an npz with images (N, H, W, C)") from None
        except Exception as error:  # encrypted, cut, of unknown compression, no header ...
            raise UserError(f"{named}: not an npz file ({one_line(error)})") from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran_order or min(shape) < 1:
            order = ", columns first" if fortran_order else ""
            raise UserError(
                f"{named}: arr_0 is {dtype} {list(shape)}{order}; it must be uint8 (N, H, W, C) with 1 or 3 channels"
            )
        if math.prod(shape) != stored:
            raise UserError(f"{named}: arr_0 says {list(shape)}, but holds {stored} bytes; write the file again")
        self.num_images, self.height, self.width, self.channels = shape
        self.size = f"{self.height} x {self.width} x {self.channels}"

    def batches(self, rows: range, batch_size: int) -> Iterator[Tensor]:
        image_bytes = self.height * self.width * self.channels
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _read_header(file)
            file.seek(rows.start * image_bytes, io.SEEK_CUR)
            for start in range(rows.start, rows.stop, batch_size):
                count = min(batch_size, rows.stop - start)
                try:
                    content = bytearray(file.read(count * image_bytes))
                except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise UserError(f"{self.path}: arr_0 is damaged ({error}); write the file again") from None
                if len(content) < count * image_bytes:
                    raise UserError(f"{self.path}: arr_0 ends before image {start + count}; write the file again")
                images = torch.frombuffer(content, dtype=torch.uint8)
                yield images.view(count, self.height, self.width, self.channels).permute(0, 3, 1, 2)


class FolderImages:
    """The image files of a folder and those below it, by their paths' order, each with three channels and its own size.

    Args:
        named: how the user named the folder, for messages.

    Raises:
        UserError: there are none.
    """

    size = "each its own"

    def __init__(self, path: Path, named: str) -> None:
        self.path = path
        self.files = sorted(find_images(path))
        if not self.files:
            raise UserError(f"{named}: no images there ({', '.join(IMAGE_ENDINGS)}); give the folder that has them")
        self.num_images = len(self.files)

    def batches(self, rows: range, batch_size: int) -> Iterator[list[Tensor]]:
        for start in range(rows.start, rows.stop, batch_size):
            yield [_read_rgb(path) for path in self.files[start : min(start + batch_size, rows.stop)]]


def open_images(path: Path) -> NpzImages | FolderImages:
    """The images of --samples: an npz or a folder. Raises UserError."""
    return FolderImages(path, f"--samples {path}") if path.is_dir() else NpzImages(path)


def _read_rgb(path: Path) -> Tensor:
    """(3, H, W) uint8, as Pillow converts it: transparency is dropped, as by clean-fid."""
    try:
        image = open_image(refuse_irregular(path).read_bytes()).convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); remove it, or fetch it again") from None
    except ImageError as error:
        raise UserError(f"{path}: {error}; remove it, or fetch it again") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ShardImages:
    """The images of packed shards, in their order.

    Raises:
        UserError: there are no shards, or what they hold are no images.
    """

    def __init__(self, folder: Path) -> None:
        self.index = ShardIndex.open(folder, f"--shards {folder}")
        if self.index.image_size is None or self.index.channels is None or not self.index.image_fields:
            raise UserError(f"{self.index.named}: holds no images of one size; pack them with --crop and --size")
        self.num_images, self.channels = self.index.num_samples, self.index.channels

    def batches(self, rows: range, batch_size: int) -> Iterator[Tensor]:
        for start in range(rows.start, rows.stop, batch_size):
            ids = range(start, min(start + batch_size, rows.stop))
            yield torch.from_numpy(np.stack([self.image(sample_id) for sample_id in ids]))

    def image(self, sample_id: int) -> np.ndarray:
        """One image as it is stored, (C, H, W) uint8. Raises CorruptShardError."""
        payloads = self.index.read(sample_id, self.index.image_fields)
        try:
            image = np.asarray(decode_image(next(iter(payloads.values()), b""), self.channels))
        except ImageError as error:
            raise self.index.corrupt(sample_id, str(error)) from None
        return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """What stands before an array's bytes, for which numpy has no reader that does not also read the array."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
