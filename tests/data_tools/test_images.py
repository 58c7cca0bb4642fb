from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.image_folder import ImageFolderSource
from data_tools.pack import PackSettings, pack
from data_tools.stored_images import ImageRules, store_image
from diffmoe_dist.data.images import ImageError, crop_image, decode_image, find_images
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import encoded, gray16, picture, transparent, turned


def _pixels(payload: bytes, channels: int = 3, upright: bool = False) -> np.ndarray:
    return np.asarray(decode_image(payload, channels, upright))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    pixels = _pixels(encoded(gray16(), "PNG"))
    assert pixels.shape == (48, 64, 3) and pixels[0, 0].tolist() == [0] * 3 and pixels[-1, -1].tolist() == [255] * 3
    expected = np.asarray(gray16()).astype(np.float64) / 65535 * 255
    assert np.abs(pixels[:, :, 1] - expected).max() <= 0.5 + 1e-4  # rounded to the nearest; computed in fp32


def test_transparency_is_put_on_white() -> None:
    red, white = [255, 0, 0], [255, 255, 255]
    palette = transparent().convert("RGBA").quantize(4)
    for image in (transparent(), palette):
        pixels = _pixels(encoded(image, "PNG"))
        assert pixels[5, 5].tolist() == red and pixels[5, 50].tolist() == white, image.mode
    gray = Image.merge("LA", [Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 51)])  # black, a fifth opaque
    assert _pixels(encoded(gray, "PNG"))[0, 0].tolist() == [204] * 3
    assert _pixels(encoded(gray, "PNG"), channels=1)[0, 0] == 204


def _png(depth: int, kind: int, row: bytes, transparent: bytes) -> bytes:
    """Four pixels in a row, of which one value is transparent."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 4, 1, depth, kind, 0, 0, 0)), (b"tRNS", transparent)]
    parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _tiff(bits: int, photometric: int, data: bytes, orientation: int = 1) -> bytes:
    """Four gray pixels in a row."""
    tags = {
        256: 4,
        257: 1,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        274: orientation,
        277: 1,
        278: 1,
        279: len(data),
    }
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("upright", [False, True])
def test_the_transparent_value_of_a_png_is_put_on_white_at_every_depth(upright: bool) -> None:
    gray16 = _png(16, 0, struct.pack(">4H", 0, 30000, 300, 301), struct.pack(">H", 300))
    assert _pixels(gray16, 1, upright)[0].tolist() == [0, 117, 255, 1]
    gray2 = _png(2, 0, bytes([0b00011011]), struct.pack(">H", 1))
    assert _pixels(gray2, 1, upright)[0].tolist() == [0, 255, 170, 255]
    colour16 = _png(16, 2, struct.pack(">12H", *[256] * 3, *[512] * 3, *[0] * 6), struct.pack(">3H", *[512] * 3))
    assert _pixels(colour16, 3, upright)[0, :, 0].tolist() == [1, 255, 0, 0]


@pytest.mark.parametrize("orientation", [1, 3])
def test_tiff_in_which_white_is_zero_and_of_twelve_bits_has_the_right_gray(orientation: int) -> None:
    ramp16, ramp12 = struct.pack("<4H", 0, 65535, 32768, 65535), bytes([0x00, 0x0F, 0xFF, 0x80, 0x0F, 0xFF])
    turn = slice(None, None, -1 if orientation == 3 else 1)
    for bits, photometric, data, expected in [
        (16, 1, ramp16, [0, 255, 128, 255]),
        (16, 0, ramp16, [255, 0, 127, 0]),
        (12, 1, ramp12, [0, 255, 128, 255]),
        (8, 0, bytes([0, 255, 128, 255]), [255, 0, 127, 0]),
    ]:
        pixels = _pixels(_tiff(bits, photometric, data, orientation), 1, upright=True)
        assert pixels[0, turn].tolist() == expected, (bits, photometric)


def test_cmyk_palette_and_gray_become_rgb() -> None:
    original = np.asarray(picture(64, 64)).astype(int)
    for mode, kind, tolerance in (("CMYK", "JPEG", 12), ("P", "PNG", 60), ("L", "PNG", 200)):
        pixels = _pixels(encoded(picture(64, 64).convert(mode), kind))
        assert pixels.shape == (64, 64, 3) and np.abs(pixels - original).mean() < tolerance, mode
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # full magenta and yellow: red
    assert np.abs(_pixels(encoded(cmyk, quality=100))[4, 4].astype(int) - [255, 0, 0]).max() <= 2


def test_the_exif_orientation_is_applied_only_when_asked_for() -> None:
    as_stored, upright = _pixels(turned()), _pixels(turned(), upright=True)
    assert as_stored.shape == (30, 50, 3) and upright.shape == (50, 30, 3)
    np.testing.assert_array_equal(upright, np.rot90(as_stored, -1))  # 6: turn clockwise by a quarter


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>", "not an image"),
        (encoded(picture(90, 90))[:-600], r"does not decode \(OSError: image file is truncated"),
        (encoded(picture(30, 30), "PNG")[:200], "does not decode"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "F pixels"),
        (encoded(picture(20, 20), "PPM"), "not an image"),  # of a kind that no reader asks for
    ],
)
def test_what_is_no_image_has_a_reason_that_is_the_same_every_time(payload: bytes, reason: str) -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(ImageError, match=reason) as caught:
            decode_image(payload, 3)
        messages.add(str(caught.value))
    assert len(messages) == 1 and "0x" not in messages.pop()


def _adm_reference(image: Image.Image, size: int) -> np.ndarray:
    """The steps that ADM's paper code describes, written out on arrays: box means of 2x2 pixels, bicubic, centre."""
    pixels = np.asarray(image)
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
    scale = size / min(pixels.shape[:2])
    width, height = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)
    pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (64, 64), (63, 200), (31, 33), (129, 128), (1, 1)]
)
def test_the_adm_crop_is_that_of_adm(width: int, height: int) -> None:
    image = picture(width, height)
    cropped = crop_image(image, 64, "adm")
    assert cropped.size == (64, 64)
    np.testing.assert_array_equal(np.asarray(cropped), _adm_reference(image, 64))


def test_halving_is_the_mean_of_two_by_two_pixels() -> None:
    pixels = np.asarray(picture(128, 128)).astype(np.float64)
    means = pixels.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert (
        np.abs(np.asarray(crop_image(picture(128, 128), 64, "adm")) - means).max() <= 1
    )  # rounded twice, by rows and by columns


def test_a_centre_crop_is_the_square_in_the_middle_and_keep_ratio_keeps_everything() -> None:
    image = picture(100, 60)
    centre = crop_image(image, 60, "center")
    np.testing.assert_array_equal(np.asarray(centre), np.asarray(image)[:, 20:80])
    assert crop_image(image, 30, "keep-ratio").size == (50, 30)
    assert crop_image(picture(60, 100), 30, "keep-ratio").size == (30, 50)
    assert crop_image(image, 32, "center").size == (32, 32)


@pytest.mark.parametrize("crop", ["adm", "keep-ratio"])
def test_an_image_too_elongated_to_scale_is_refused_before_memory_is_taken(crop: str) -> None:
    with pytest.raises(ImageError, match="too elongated: 12000x2 pixels"):
        crop_image(Image.new("RGB", (12_000, 2)), 512, crop)  # type: ignore[arg-type]
    assert crop_image(Image.new("RGB", (12_000, 50)), 64, "adm").size == (64, 64)


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (encoded(picture(40, 30)), "jpg"),
        (encoded(picture(40, 30), "PNG"), "png"),
        (encoded(picture(40, 30), "GIF"), "gif"),
        (encoded(picture(40, 30).convert("CMYK")), "jpg"),
        (turned(), "jpg"),
    ],
)
def test_an_image_that_is_not_resized_keeps_its_bytes(payload: bytes, field: str) -> None:
    stored = store_image(payload, 3, ImageRules())
    assert (stored.field, stored.payload) == (field, payload)


@pytest.mark.parametrize("encoding", ["webp", "png"])
def test_a_resized_image_is_stored_without_loss(encoding: str) -> None:
    payload = encoded(picture(90, 70))
    stored = store_image(payload, 3, ImageRules("adm", 32, encoding))  # type: ignore[arg-type]
    assert (stored.field, stored.size) == (encoding, (32, 32))
    expected = crop_image(decode_image(payload, 3), 32, "adm")
    np.testing.assert_array_equal(_pixels(stored.payload), np.asarray(expected))


def test_an_image_turned_upright_is_stored_without_loss_and_others_keep_their_bytes() -> None:
    rules = ImageRules(upright=True)
    stored = store_image(turned(), 3, rules)
    assert (stored.field, stored.size) == ("webp", (30, 50))
    np.testing.assert_array_equal(_pixels(stored.payload), _pixels(turned(), upright=True))
    plain = encoded(picture(40, 30))
    assert store_image(plain, 3, rules).payload == plain


def test_an_image_too_long_for_webp_is_left_out_with_its_reason_and_fits_png(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 2000)).save(tmp_path / "in" / "long.png")
    (tmp_path / "in" / "plain.jpg").write_bytes(encoded(picture(40, 30)))
    rules = ImageRules("keep-ratio", 256)
    assert pack(ImageFolderSource(tmp_path / "in"), tmp_path / "out", PackSettings(images=rules)).num_samples == 1
    bad = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    reason = "a side of 25600 pixels is longer than WebP's 16383; use --encoding=png"
    assert (bad["item"], bad["reason"]) == ("long.png", reason)
    payload = (tmp_path / "in" / "long.png").read_bytes()
    assert store_image(payload, 3, ImageRules("keep-ratio", 256, "png")).size == (256, 25_600)


def test_images_are_found_behind_links_once_and_hidden_ones_are_not(tmp_path: Path) -> None:
    folder, other = tmp_path / "in", tmp_path / "other"
    for place in (folder / "b", folder / ".ipynb_checkpoints", other):
        place.mkdir(parents=True)
        (place / "x.png").touch()
    for name in ("a.JPG", "c.webp", "._c.webp", "notes.txt"):
        (folder / name).touch()
    (folder / "b" / "linked").symlink_to(other)
    (other / "up").symlink_to(folder)
    found = [path.relative_to(folder).as_posix() for path in find_images(folder)]
    assert found == ["a.JPG", "b/linked/x.png", "b/x.png", "c.webp"]


def test_an_encoding_of_images_that_are_stored_as_they_are_is_refused() -> None:
    with pytest.raises(UserError, match="--encoding=png: images are stored as they are; leave it out"):
        ImageRules(encoding="png")
    assert store_image(turned(), 3, ImageRules(encoding="png", upright=True)).field == "png"


@pytest.mark.parametrize(("crop", "size"), [("adm", None), ("none", 64), ("center", 0)])
def test_a_crop_without_a_size_or_a_size_without_a_crop_is_refused(crop: str, size: int | None) -> None:
    with pytest.raises(UserError, match="--size="):
        ImageRules(crop, size)  # type: ignore[arg-type]
