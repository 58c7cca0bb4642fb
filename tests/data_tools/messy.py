"""Sources as they are found: every kind of image that goes wrong somewhere, in a folder of two classes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

BAD = {  # path below the folder: the reason
    "cat/empty.jpg": "the file is empty",
    "cat/text.jpg": "not an image",
    "dog/truncated.jpg": "does not decode (OSError: image file is truncated",
    "dog/float.tif": "F pixels (32 bits) have no known range",
}
NUM_GOOD = 60


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colour image with some noise: a photograph, for a decoder."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin((rows * (1 + band) + columns * (3 - band)) / 17 + seed) for band in range(3)]
    noise = np.random.default_rng(seed).normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def transparent() -> Image.Image:
    """Opaque red on the left; on the right fully transparent, with green hidden below."""
    pixels = np.zeros((40, 60, 4), dtype=np.uint8)
    pixels[:, :30] = (255, 0, 0, 255)
    pixels[:, 30:] = (0, 255, 0, 0)
    return Image.fromarray(pixels)


def gray16() -> Image.Image:
    """A 16-bit ramp from 0 to 65535."""
    return Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16))


def turned() -> bytes:
    """A JPEG, 50 wide and 30 high as stored, that wants to be shown turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(50, 30), exif=exif)


def make_messy_folder(root: Path) -> Path:
    """64 files in two classes, of which the four in `BAD` are bad."""
    good = {
        "cat/plain.jpg": encoded(picture(80, 60)),
        "cat/cmyk.jpg": encoded(picture(64, 64).convert("CMYK")),
        "cat/gray.png": encoded(picture(64, 50).convert("L"), "PNG"),
        "cat/gray16.png": encoded(gray16(), "PNG"),
        "cat/palette.png": encoded(picture(64, 50).convert("P"), "PNG"),
        "cat/transparent.png": encoded(transparent(), "PNG"),
        "cat/turned.jpg": turned(),
        "cat/a.dotted.name.v1.jpg": encoded(picture(40, 40, 1)),
        "cat/a.dotted.name.v2.jpg": encoded(picture(40, 40, 2)),
        "cat/n02105855_2933.JPEG": encoded(picture(45, 45), "PNG"),  # ImageNet has one of these
        "cat/deeper/same.jpg": encoded(picture(33, 44, 3)),
        "dog/same.jpg": encoded(picture(33, 44, 4)),
        "dog/deeper/same.jpg": encoded(picture(33, 44, 5)),
        "dog/größe 猫.jpg": encoded(picture(30, 30)),
        "dog/one_pixel.png": encoded(picture(1, 1), "PNG"),
        "dog/long.png": encoded(picture(12_000, 50), "PNG"),
        "dog/anim.gif": encoded(picture(20, 20).convert("P"), "GIF"),
        "dog/lossless.webp": encoded(picture(36, 28), "WEBP", lossless=True),
    }
    for number in range(NUM_GOOD - len(good)):
        good[f"{'cat' if number % 2 else 'dog'}/more{number}.jpg"] = encoded(picture(40 + number, 60, number))
    bad = {
        "cat/empty.jpg": b"",
        "cat/text.jpg": b"<html>404 Not Found</html>",
        "dog/truncated.jpg": encoded(picture(90, 90))[:-600],
        "dog/float.tif": encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"),
    }
    assert len(good) == NUM_GOOD and set(bad) == set(BAD)
    for name, payload in {**good, **bad}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(payload)
    return root
