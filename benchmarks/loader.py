"""The training loader against plain webdataset iteration of the same shards, and the memory of a worker.

What is measured. Samples a second of one process, page cache warm, over the shards of

- JPEG: 256-pixel cuts of scikit-learn's two photographs (quality 95), with labels;
- latents: fp16 moments (2 views, 8, 32, 32), as `encode-latents` writes them, and their base's labels.

Each is read in four ways that run in turn (A B C D A B C D ...):

- webdataset: `tarfile_to_samples` over the shards in their order, and nothing but what turns a sample into an array:
  for JPEG the same decoding as the trainer's, into the same fp32 buffers, and the label; for latents `np.load`.
- reading: the same arrays by the index, in training order: decoding and label, or the moments.
- webdataset + random: the first way, into new batches, and for each sample the random numbers of training: time, drop,
  flip, noise, and for latents the numbers that they are sampled with.
- loader: `TrainingLoader` as training uses it: reading, random numbers, latents from their moments, labels, batches.

Rates are medians; a ratio is the median of the ratios of one round, so that a machine whose speed drifts cancels out.
`reading` is compared with `webdataset`, and `loader` with `webdataset + random`.

Memory: a worker process of the loader reads 500 batches around the turn of an epoch, from an index of each number of
entries (all of which point to one sample); shown is what is private to the process.

    python -m benchmarks.loader
    python -m benchmarks.loader --entries 1000000 10000000
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

from data_tools.folder import ShardFolder
from data_tools.pack import PackSettings, pack
from data_tools.parallel import SERIAL
from data_tools.side import ShardNotes, side_names, write_side
from diffmoe_dist.data.batch import BatchBuffer
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.format import INDEX_NAME, KEYS_NAME, LATENT_FIELD, MEAN_LOGVAR, OFFSETS_NAME
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import npy_bytes
from diffmoe_dist.data.loader import TrainingLoader, parse_label, read_pixels
from diffmoe_dist.data.order import BatchSplit, StreamOrder
from diffmoe_dist.data.randomness import Stream, sample_generator
from diffmoe_dist.files import file_sha256

SIZE = 256
BATCH = 32
SHARD_SAMPLES = 500
MOMENTS_SHAPE = (2, 8, 32, 32)

Way = Callable[[int], int]  # reads about this many samples; returns how many it was


@lru_cache
def photographs() -> list[np.ndarray]:
    return load_sample_images().images


class Photographs:
    """A source of cuts of scikit-learn's two photographs as JPEG, with the number of the photograph as the label."""

    name, channels = "photographs", 3
    image_size: int | None = SIZE
    class_names: Sequence[str] = ("0", "1")
    labels: np.ndarray | None = None

    def __init__(self, items: np.ndarray) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def item_name(self, item: int) -> str:
        return str(self._items[item])

    def part(self, items: np.ndarray) -> Photographs:
        return Photographs(self._items[items])

    def read(self, item: int) -> dict[str, bytes]:
        number = int(self._items[item])
        photograph = photographs()[number % 2]
        generator = np.random.default_rng(number)
        top, left = (generator.integers(0, side - SIZE) for side in photograph.shape[:2])
        file = io.BytesIO()
        Image.fromarray(photograph[top : top + SIZE, left : left + SIZE]).save(file, format="JPEG", quality=95)
        return {"jpg": file.getvalue(), "cls": str(number % 2).encode()}


def random_latents(base: ShardIndex, shard: int, settings: None, notes: ShardNotes) -> Iterator[tuple[str, Any]]:
    """Moments as `encode-latents` writes them, of no autoencoder."""
    generator = np.random.default_rng(shard)
    for sample_id in base.samples_of(shard):
        moments = generator.standard_normal(MOMENTS_SHAPE, dtype=np.float32).astype(np.float16)
        yield base.key(sample_id), {LATENT_FIELD: npy_bytes(moments)}


def write_data(folder: Path, count: int) -> TrainingData:
    """JPEG shards, and latents beside them."""
    pack(Photographs(np.arange(count)), folder / "jpeg", PackSettings(samples_per_shard=SHARD_SAMPLES))
    base = ShardIndex.open(folder / "jpeg")
    spec = {
        "parametrisation": MEAN_LOGVAR, "channels": 4, "height": 32, "width": 32, "views": ["plain", "flip"],
        "scale": [0.18215] * 4, "shift": [0.0] * 4, "input_range": [-1.0, 1.0], "image_size": SIZE, "crop": "adm",
        "vae_sha256": "0" * 64,
    }  # fmt: skip
    side = ShardFolder(folder / "latents", side_names("latents", base), spec)
    side.claim()
    write_side(
        side, base, None, random_latents, {"latents": spec}, max_bad=0, workers=SERIAL, on_shard=lambda count: None
    )
    return TrainingData((DataSet.open(folder / "jpeg", folder / "latents"),), 32)


def repeat_first_sample(index: ShardIndex, out: Path, count: int) -> ShardIndex:
    """A folder that says it has `count` samples, all of which lie in the one place where the first one is."""
    shutil.copytree(index.folder, out)
    meta = json.loads((out / INDEX_NAME).read_text())
    np.save(out / OFFSETS_NAME, np.tile(np.load(out / OFFSETS_NAME)[:1], (count, 1, 1)))
    np.save(out / KEYS_NAME, np.char.mod(b"%09d", np.arange(count)))
    for name in ("offsets", "keys"):
        meta[name]["sha256"] = file_sha256(out / meta[name]["name"])
    meta["shards"] = [{**meta["shards"][0], "num_samples": count}]
    meta["num_samples"] = count
    (out / INDEX_NAME).write_text(json.dumps(meta))
    return ShardIndex.open(out)


def loader_way(data: TrainingData) -> Way:
    def way(count: int) -> int:
        loader = TrainingLoader(data, BatchSplit(BATCH, BATCH), seed=0, flip=True)
        for _ in range(count // BATCH):
            next(loader)
        loader.close()
        return count // BATCH * BATCH

    return way


def webdataset_samples(index: ShardIndex) -> webdataset.DataPipeline:
    urls = [str(index.folder / shard.name) for shard in index.shards]
    return webdataset.DataPipeline(webdataset.SimpleShardList(urls), webdataset.tarfile_to_samples())


class Filled:
    """Batches that a plain loop over samples fills."""

    def __init__(self, channels: int, size: int, random: bool, latent: bool) -> None:
        self.shape, self.random, self.latent = (BATCH, channels, size), random, latent
        self.buffer = BatchBuffer(*self.shape)

    def row(self, number: int) -> np.ndarray:
        """The array of the next image; the random numbers of its sample are made, too."""
        if self.random:
            if number % BATCH == 0:
                self.buffer.batch()
                self.buffer = BatchBuffer(*self.shape)
            generator = sample_generator(0, Stream.TRAINING, 0, number)
            self.buffer.fill_random(number % BATCH, generator)
            if self.latent:
                generator.standard_normal(self.buffer.images.shape[1:], dtype=np.float32)
        return self.buffer.images[number % BATCH]


def jpeg_ways(index: ShardIndex) -> dict[str, Way]:
    def plain(count: int, random: bool = False) -> int:
        batches = Filled(3, SIZE, random, latent=False)
        for number, sample in enumerate(webdataset_samples(index)):
            read_pixels(sample["jpg"], 3, False, batches.row(number))
            parse_label(sample["cls"], 2)
        return index.num_samples

    def reading(count: int) -> int:
        order, out = StreamOrder(index.num_samples, 0), BatchBuffer(BATCH, 3, SIZE).images
        for position in range(count):
            sample = index.read(order[position][1], {"jpg", "cls"})
            read_pixels(sample["jpg"], 3, False, out[position % BATCH])
            parse_label(sample["cls"], 2)
        return count

    return {
        "webdataset": plain,
        "reading": reading,
        "webdataset + random": partial(plain, random=True),
        "loader": loader_way(TrainingData((DataSet(index),), SIZE)),
    }


def latent_ways(data: TrainingData) -> dict[str, Way]:
    reader = data.datasets[0].latents
    assert reader is not None
    index = reader.index

    def plain(count: int, random: bool = False) -> int:
        batches = Filled(4, 32, random, latent=True)
        for number, sample in enumerate(webdataset_samples(index)):
            np.load(io.BytesIO(sample[LATENT_FIELD]))
            batches.row(number)
        return index.num_samples

    def reading(count: int) -> int:
        order = StreamOrder(index.num_samples, 0)
        for position in range(count):
            reader.moments(order[position][1])
        return count

    return {
        "webdataset": plain,
        "reading": reading,
        "webdataset + random": partial(plain, random=True),
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
            read = way(count)
            rates[name].append(read / (time.perf_counter() - begun))
    compared = {"loader": "webdataset + random"}
    return {
        name: (
            statistics.median(found),
            statistics.median(a / b for a, b in zip(found, rates[compared.get(name, "webdataset")], strict=True)),
        )
        for name, found in rates.items()
    }


def worker_memory(index: ShardIndex) -> int:
    """Bytes private to a worker that has read 500 batches, half of them in the next epoch."""
    first = index.num_samples - 250 * BATCH
    data = TrainingData((DataSet(index),), SIZE)
    loader = TrainingLoader(data, BatchSplit(BATCH, BATCH), seed=0, images_seen=first, flip=True, num_workers=1)
    for _ in range(500):
        next(loader)
    (worker,) = multiprocessing.active_children()
    lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
    loader.close()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help=f"at least {BATCH} (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--entries", type=int, nargs="+", default=[1_000_000], help="of the indexes, for memory")
    arguments = parser.parse_args()
    if arguments.samples < BATCH:
        parser.error(f"--samples {arguments.samples}: give at least a batch, {BATCH}")
    if min(arguments.entries) < 250 * BATCH:
        parser.error(f"--entries {min(arguments.entries)}: give at least {250 * BATCH}, which are read")
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.machine()}, {arguments.samples} samples, {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder, arguments.samples)
        kinds = {"jpeg": jpeg_ways(data.datasets[0].base), "latents": latent_ways(data)}
        for kind, ways in kinds.items():
            for way, (rate, ratio) in compare(ways, arguments.samples, arguments.rounds).items():
                print(f"{kind:8} {way:18} {rate:8.0f} samples/s   {ratio:5.2f}", flush=True)
        for entries in arguments.entries:
            memory = worker_memory(repeat_first_sample(data.datasets[0].base, folder / str(entries), entries))
            print(f"memory   {entries:>11} entries: {memory / 2**20:.1f} MiB private to a worker", flush=True)


if __name__ == "__main__":
    main()
