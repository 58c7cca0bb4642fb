"""From a file's bytes to pixels: decoding and cropping, the same when data are packed and when they are read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
Crop = Literal["adm", "center", "keep-ratio", "none"]
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # none of which runs a program or opens another file
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_PNG_DEPTH = 24  # where the bits of a channel stand in a PNG
_MAX_PIXELS = 178_956_970  # what Pillow decodes; a resized image may not be larger either


def find_images(folder: Path) -> Iterator[Path]:
    """The image files in a folder and those below it, by their endings, in the order of `walk_files`."""
    paths = (folder / name for name in walk_files(folder) if name.lower().endswith(IMAGE_ENDINGS))
    return (path for path in paths if path.is_file())


def walk_files(
    root: Path,
    on_folder: Callable[[str, Sequence[str], Sequence[str]], None] = lambda folder, subfolders, files: None,
    on_repeated: Callable[[str], None] = lambda folder: None,
) -> Iterator[str]:
    """All files below a folder, as paths relative to it, in their order; what is hidden is left out.

    Links to folders are followed, each folder once. `on_folder` is told each folder that is entered, with the names of
    its subfolders and files; `on_repeated` a link to one that was entered before. Folders are told with a slash at the
    end; the first one is "".
    """
    visited: set[tuple[int, int]] = set()

    def enter(folder: str) -> Iterator[str]:
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in visited:
            on_repeated(folder)
            return
        visited.add((status.st_dev, status.st_ino))
        names = sorted(name for name in os.listdir(root / folder) if not name.startswith("."))
        subfolders = {name: None for name in names if os.path.isdir(root / folder / name)}
        on_folder(folder, list(subfolders), [name for name in names if name not in subfolders])
        yield from (f"{folder}{name}/" if name in subfolders else f"{folder}{name}" for name in names)

    begun = [enter("")]
    while begun:
        path = next(begun[-1], None)
        if path is None:
            begun.pop()
        elif path.endswith("/"):
            begun.append(enter(path))
        else:
            yield path


class ImageError(ValueError):
    """Bytes that give no image; the message is the reason, the same on every machine and run."""


def decode_image(payload: bytes, channels: int, upright: bool = False) -> Image.Image:
    """Decode a file completely, into mode "RGB" (three channels) or "L" (one).

    16-bit values are scaled, not clipped; transparency is put on white; of an animation the first frame is taken; an
    embedded colour profile is ignored, as everywhere in this field. `upright` applies the EXIF orientation.
    Raises ImageError.
    """
    return convert_image(open_image(payload), channels, upright)


def open_image(payload: bytes) -> Image.Image:
    """Decode a file completely, in its own mode; `format` says which kind it is. Raises ImageError."""
    if not payload:
        raise ImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(payload), formats=_FORMATS)
        image.load()  # a file that ends too early opens well
    except UnidentifiedImageError:
        raise ImageError("not an image") from None
    except MemoryError:
        raise
    except Exception as error:  # on damaged input Pillow's decoders raise nearly anything
        raise ImageError(f"does not decode ({type(error).__name__}: {error})") from error
    transparent, depth = image.info.get("transparency"), payload[_PNG_DEPTH] if image.format == "PNG" else 8
    if image.mode == "L" and depth < 8 and isinstance(transparent, int):  # Pillow scales the pixels to 8 bits, not this
        image.info["transparency"] = transparent * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16 and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


def convert_image(image: Image.Image, channels: int, upright: bool = False) -> Image.Image:
    """The second half of `decode_image`. Raises ImageError for pixels that have no meaning as colours."""
    tags = dict(image.tag_v2) if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    image = ImageOps.exif_transpose(image) if upright else image
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = _scale_gray(image, tags)
    elif image.mode in ("I", "F"):
        raise ImageError(f"{image.mode} pixels (32 bits) have no known range")
    elif image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), transparent).convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError:
        raise ImageError(f"mode {image.mode} does not convert to {mode}") from None


def _scale_gray(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """More than 8 bits of gray scaled to 8; the one transparent value of a PNG becomes white."""
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    largest = 2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
    values = np.asarray(image)
    gray = np.rint(values.astype(np.float32) * (255 / largest)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds for 8 bits only
        gray = 255 - gray
    if isinstance(transparent := image.info.get("transparency"), int):
        gray[values == transparent] = 255
    return Image.fromarray(gray)


def crop_image(image: Image.Image, size: int, crop: Crop) -> Image.Image:
    """Scale an image and cut it: `adm` and `center` to a square of `size`, `keep-ratio` to a shorter side of `size`.

    Raises ImageError for an image so elongated that it would be enormous in between.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if crop != "center" and size * size * long > short * _MAX_PIXELS:
        raise ImageError(f"too elongated: {width}x{height} pixels cannot be scaled to a shorter side of {size}")
    if crop == "adm":
        return _crop_adm(image, size)
    if crop == "center":
        left, top = (width - short) // 2, (height - short) // 2
        return image.crop((left, top, left + short, top + short)).resize((size, size), Image.Resampling.LANCZOS)
    assert crop == "keep-ratio", crop
    return image.resize((round(width * size / short), round(height * size / short)), Image.Resampling.LANCZOS)


def _crop_adm(image: Image.Image, size: int) -> Image.Image:
    """The preprocessing of ADM (Dhariwal and Nichol 2021) and of every ImageNet model since.

    Halve with a box filter while the shorter side is at least twice the size, scale bicubically, take the centre.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
