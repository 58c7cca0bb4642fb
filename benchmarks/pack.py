"""Packing against Pillow alone: images per second of one core, for the same decoding, cropping and encoding.

    python -m benchmarks.pack [--images 512] [--rounds 7]

The baseline reads each file and does what the pack does to its pixels, and nothing else: no shard, no checksum, no
fsync. Both run in one process, in turns, so that other work on the machine meets them alike; rates are of the median
round, the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.image_folder import ImageFolderSource
from data_tools.pack import PackSettings, pack
from data_tools.stored_images import ImageRules

SIZE = 256
WIDTH, HEIGHT = 500, 375  # the most common size in ImageNet
TARGET = 0.9


def make_images(folder: Path, count: int) -> None:
    """JPEG files that cost a decoder what photographs of this size cost: about 110 kB at quality 95."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    for number in range(count):
        rng = np.random.default_rng(number)
        waves = sum(
            rng.uniform(10, 40)
            * np.sin(rows * rng.uniform(-0.2, 0.2) + columns * rng.uniform(-0.2, 0.2) + rng.uniform(0, 6))
            for _ in range(6)
        )
        pixels = 128 + waves[..., None] * rng.uniform(0.5, 1.0, 3) + rng.normal(0, 6, (HEIGHT, WIDTH, 1))
        path = folder / f"class{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=95)


def pillow_check(path: Path) -> int:
    """What has to be done to an image that is kept as it is."""
    image = Image.open(io.BytesIO(path.read_bytes()))
    image.load()
    return image.width


def pillow_resize(path: Path) -> int:
    """Decode, ADM crop, lossless WebP."""
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    while min(image.size) >= 2 * SIZE:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    file = io.BytesIO()
    image.crop((left, top, left + SIZE, top + SIZE)).save(file, format="WEBP", lossless=True, method=0, quality=0)
    return len(file.getvalue())


@dataclass(frozen=True)
class Seconds:
    """Of one run over all images."""

    wall: float
    processor: float  # of this process alone, so that other work on the machine does not count


def measure(action: Callable[[], object]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def compare(folder: Path, images: ImageRules, baseline: Callable[[Path], int], rounds: int) -> str:
    """A line of the table."""
    paths = sorted(folder.glob("*/*.jpg"))
    out = folder.parent / "out"

    def run_pack() -> None:
        pack(ImageFolderSource(folder), out, PackSettings(images=images))

    ours, theirs = [], []
    for round_number in range(rounds + 1):
        shutil.rmtree(out, ignore_errors=True)
        pair = measure(run_pack), measure(lambda: [baseline(path) for path in paths])
        if round_number:  # the first one fills the page cache
            ours.append(pair[0])
            theirs.append(pair[1])
    columns = []
    for clock in ("wall", "processor"):
        pairs = [(getattr(mine, clock), getattr(other, clock)) for mine, other in zip(ours, theirs, strict=True)]
        rates = [len(paths) / statistics.median(times) for times in zip(*pairs, strict=True)]
        ratio = statistics.median(other / mine for mine, other in pairs)
        columns.append(f"{rates[0]:8.0f} {rates[1]:8.0f} {ratio:8.2f}")
    return "   ".join(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    cases = {
        "kept as they are, checked": (ImageRules(), pillow_check),
        f"ADM crop to {SIZE}, lossless WebP": (ImageRules("adm", SIZE), pillow_resize),
    }
    with tempfile.TemporaryDirectory(prefix="pack-") as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        make_images(folder, arguments.images)
        mean = statistics.mean(path.stat().st_size for path in folder.glob("*/*.jpg"))
        print(f"{arguments.images} JPEG files, {WIDTH}x{HEIGHT}, {mean / 1000:.0f} kB, {arguments.rounds} rounds")
        heads = f"{'pack':>8s} {'Pillow':>8s} {'ratio':>8s}"
        print(f"images/s by the clock, and by the processor's time; target {TARGET}")
        print(f"{'':32s} {heads}   {heads}")
        for name, (images, baseline) in cases.items():
            print(f"{name:32s} {compare(folder, images, baseline, arguments.rounds)}")


if __name__ == "__main__":
    main()
