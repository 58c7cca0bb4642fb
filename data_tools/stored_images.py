"""How images are stored: the original bytes, checked, unless they are resized; then without loss."""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from PIL import ExifTags, Image

from diffmoe_dist.data.images import Crop, ImageError, convert_image, crop_image, open_image
from diffmoe_dist.errors import UserError

_FIELD_OF_FORMAT = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif",
}  # fmt: skip
_MAX_WEBP_SIDE = 16_383  # pixels


@dataclass(frozen=True)
class ImageRules:
    """What is done to every image. Raises UserError for settings that contradict each other."""

    crop: Crop = "none"
    size: int | None = None  # side of the square, or the shorter side under keep-ratio
    encoding: Literal["webp", "png"] = "webp"  # of changed images; both are lossless
    upright: bool = False  # apply the EXIF orientation

    def __post_init__(self) -> None:
        if (self.crop == "none") != (self.size is None):
            raise UserError(
                f"--crop={self.crop}, --size={self.size}: a crop needs a size and a size a crop; give both or neither"
            )
        if self.size is not None and self.size < 1:
            raise UserError(f"--size={self.size}: not a number of pixels; 256 and 512 are usual")
        if self.encoding != "webp" and self.size is None and not self.upright:
            raise UserError(
                f"--encoding={self.encoding}: images are stored as they are; leave it out, or give --crop and --size"
            )


@dataclass(frozen=True)
class StoredImage:
    field: str
    payload: bytes
    size: tuple[int, int]  # width, height


def store_image(payload: bytes, channels: int, rules: ImageRules) -> StoredImage:
    """Check a file by decoding it completely, and change it where the rules ask for it. Raises ImageError."""
    original = open_image(payload)
    turn = rules.upright and original.getexif().get(ExifTags.Base.Orientation, 1) != 1
    image = convert_image(original, channels, rules.upright)
    if rules.size is not None:
        image = crop_image(image, rules.size, rules.crop)
    elif not turn:
        return StoredImage(_FIELD_OF_FORMAT[str(original.format)], payload, image.size)
    field = "png" if channels == 1 else rules.encoding
    return StoredImage(field, encode_image(image, field), image.size)


def common_side(sizes: Collection[tuple[int, int]]) -> int | None:
    """The side of the images, where all are squares of one size; `sizes` are the different (width, height)."""
    width, height = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    return width if width == height else None


def encode_image(image: Image.Image, field: str) -> bytes:
    """Encode without loss, the same bytes every time. Raises ImageError for an image that the format cannot hold."""
    file = io.BytesIO()
    if field == "webp":
        if max(image.size) > _MAX_WEBP_SIDE:
            raise ImageError(
                f"a side of {max(image.size)} pixels is longer than WebP's {_MAX_WEBP_SIDE}; use --encoding=png"
            )
        image.save(file, format="WEBP", lossless=True, method=0, quality=0)
    else:
        image.save(file, format="PNG", compress_level=6)
    return file.getvalue()
