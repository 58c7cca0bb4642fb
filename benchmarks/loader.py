"""The training loader against plain webdataset iteration of the same shards, and the memory of a worker.

What is measured. Samples a second of one process, page cache warm, over the shards of

- JPEG: 256-pixel cuts of scikit-learn's two photographs (quality 95), with labels;
- latents: fp16 moments (2 views, 8, 32, 32), as `encode-latents` writes them, and their base's labels.

Each is read in four ways that run in turn (A B C D A B C D ...):

- webdataset: `tarfile_to_samples` over the shards in their order, and nothing but what turns a sample into an array:
  for JPEG the same decoding as the trainer's, into the same fp32 buffers, and the label; for latents `np.load`.
- reading: the same arrays by the index, in training order: decoding and label, or the moments.
- webdataset + draws: the first way, into new batches, and for each sample what training draws for it: time, drop, flip,
  noise, and for latents the numbers that they are drawn with.
- loader: `TrainingLoader` as training uses it: reading, draws, the latent from its moments, its label, batches.

Rates are medians; a ratio is the median of the ratios of one round, so that a machine whose speed drifts cancels out.
`reading` is compared with `webdataset`, and `loader` with `webdataset + draws`.

Memory: a worker process of the loader reads 500 batches around the turn of an epoch, from an index of each number of
entries (all of which point to one sample); shown is what is private to the process.

    python -m benchmarks.loader
    python -m benchmarks.loader --entries 1000000 10000000
"""

from __future__ import annotations

import argparse
import datetime
import io
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from diffmoe_dist.data.batch import BatchBuffer
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.format import LATENT_FIELD, MEAN_LOGVAR
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import LatentReader, npy_bytes
from diffmoe_dist.data.loader import TrainingLoader, parse_label, read_pixels
from diffmoe_dist.data.order import BatchSplit, StreamOrder
from diffmoe_dist.data.randomness import Stream, sample_generator
from tests.data.folders import repeated_sample, write_folder

SIZE = 256
BATCH = 32
SHARD_SAMPLES = 500
MOMENTS_SHAPE = (2, 8, 32, 32)

Way = Callable[[int], None]  # reads this many samples


def jpeg_samples(count: int) -> list[dict[str, bytes]]:
    from sklearn.datasets import load_sample_images

    generator, samples = np.random.default_rng(0), []
    photographs = load_sample_images().images
    for number in range(count):
        photograph = photographs[number % 2]
        top, left = (generator.integers(0, side - SIZE) for side in photograph.shape[:2])
        file = io.BytesIO()
        Image.fromarray(photograph[top : top + SIZE, left : left + SIZE]).save(file, format="JPEG", quality=95)
        samples.append({"jpg": file.getvalue(), "cls": str(number % 2).encode()})
    return samples


def write_data(folder: Path, count: int) -> TrainingData:
    """JPEG shards, and latents beside them."""
    sizes = [SHARD_SAMPLES] * (count // SHARD_SAMPLES)
    base = write_folder(folder / "jpeg", jpeg_samples(count), sizes, image_size=SIZE)
    moments = np.random.default_rng(0).standard_normal((64, *MOMENTS_SHAPE)).astype(np.float16)
    spec = {
        "parametrisation": MEAN_LOGVAR, "channels": 4, "height": 32, "width": 32, "views": ["plain", "flip"],
        "scale": [0.18215] * 4, "shift": [0.0] * 4, "input_range": [-1.0, 1.0], "image_size": SIZE, "crop": "adm",
        "vae_sha256": "0" * 64,
    }  # fmt: skip
    side = {"base": {"fingerprint": base.fingerprint, "keys_sha256": base.meta.keys.sha256}, "latents": spec}
    latents = [{LATENT_FIELD: npy_bytes(moments[number % 64])} for number in range(count)]
    write_folder(folder / "latents", latents, sizes, class_names=[], channels=None, **side)
    return TrainingData((DataSet.open(folder / "jpeg", folder / "latents"),), 32)


def loader_way(data: TrainingData) -> Way:
    def way(count: int) -> None:
        loader = TrainingLoader(data, BatchSplit(BATCH, BATCH), seed=0, flip=True)
        for _ in range(count // BATCH):
            next(loader)
        loader.close()

    return way


def webdataset_samples(index: ShardIndex) -> webdataset.DataPipeline:
    urls = [str(index.folder / shard.name) for shard in index.shards]
    return webdataset.DataPipeline(webdataset.SimpleShardList(urls), webdataset.tarfile_to_samples())


class Drawn:
    """Batches that a plain loop over samples fills."""

    def __init__(self, channels: int, size: int, drawing: bool, latent: bool) -> None:
        self.shape, self.drawing, self.latent = (BATCH, channels, size), drawing, latent
        self.buffer = BatchBuffer(*self.shape)

    def row(self, number: int) -> np.ndarray:
        """The array of the next image; draws the numbers of its sample."""
        if self.drawing:
            if number % BATCH == 0:
                self.buffer.batch()
                self.buffer = BatchBuffer(*self.shape)
            generator = sample_generator(0, Stream.TRAINING, 0, number)
            self.buffer.draw(number % BATCH, generator)
            if self.latent:
                generator.standard_normal(self.buffer.images.shape[1:], dtype=np.float32)
        return self.buffer.images[number % BATCH]


def jpeg_ways(index: ShardIndex) -> dict[str, Way]:

    def plain(count: int, draws: bool = False) -> None:
        batches = Drawn(3, SIZE, draws, latent=False)
        for number, sample in enumerate(webdataset_samples(index)):
            read_pixels(sample["jpg"], 3, False, batches.row(number))
            parse_label(sample["cls"], 2)

    def reading(count: int) -> None:
        order, out = StreamOrder(index.num_samples, 0), BatchBuffer(BATCH, 3, SIZE).images
        for position in range(count):
            sample = index.read(order[position][1], {"jpg", "cls"})
            read_pixels(sample["jpg"], 3, False, out[position % BATCH])
            parse_label(sample["cls"], 2)

    return {
        "webdataset": plain,
        "reading": reading,
        "webdataset + draws": partial(plain, draws=True),
        "loader": loader_way(TrainingData((DataSet(index),), SIZE)),
    }


def latent_ways(data: TrainingData) -> dict[str, Way]:
    index = data.datasets[0].latents
    assert index is not None
    reader = LatentReader(index)

    def plain(count: int, draws: bool = False) -> None:
        batches = Drawn(4, 32, draws, latent=True)
        for number, sample in enumerate(webdataset_samples(index)):
            np.load(io.BytesIO(sample[LATENT_FIELD]))
            batches.row(number)

    def reading(count: int) -> None:
        order = StreamOrder(index.num_samples, 0)
        for position in range(count):
            reader.moments(order[position][1])

    return {
        "webdataset": plain,
        "reading": reading,
        "webdataset + draws": partial(plain, draws=True),
        "loader": loader_way(data),
    }


def compare(ways: dict[str, Way], count: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Way -> (median samples a second, median ratio to the way that it is compared with)."""
    for way in ways.values():
        way(count)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way(count)
            rates[name].append(count / (time.perf_counter() - begun))
    compared = {"loader": "webdataset + draws"}
    return {
        name: (
            statistics.median(found),
            statistics.median(a / b for a, b in zip(found, rates[compared.get(name, "webdataset")], strict=True)),
        )
        for name, found in rates.items()
    }


def worker_memory(folder: Path, entries: int, sample: dict[str, bytes]) -> int:
    """Bytes private to a worker that has read from an index of so many entries."""
    data = TrainingData((DataSet(repeated_sample(folder, sample, entries)),), SIZE)
    first = entries - 250 * BATCH
    loader = TrainingLoader(data, BatchSplit(BATCH, BATCH), seed=0, images_seen=first, flip=True, num_workers=1)
    for _ in range(500):  # half of them in the next epoch
        next(loader)
    (worker,) = multiprocessing.active_children()
    lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
    loader.close()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help=f"a multiple of {SHARD_SAMPLES}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--entries", type=int, nargs="+", default=[1_000_000], help="of the indexes, for memory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.machine()}, {arguments.samples} samples, {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder, arguments.samples)
        kinds = {"jpeg": jpeg_ways(data.datasets[0].base), "latents": latent_ways(data)}
        for kind, ways in kinds.items():
            for way, (rate, ratio) in compare(ways, arguments.samples, arguments.rounds).items():
                print(f"{kind:8} {way:18} {rate:8.0f} samples/s   {ratio:5.2f}", flush=True)
        (sample,) = jpeg_samples(1)
        for entries in arguments.entries:
            memory = worker_memory(folder / str(entries), entries, sample)
            print(f"memory   {entries:>11} entries: {memory / 2**20:.1f} MiB private to a worker", flush=True)


if __name__ == "__main__":
    main()
