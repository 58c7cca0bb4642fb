"""Small folders of shards with exactly the samples that a test wants."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.folder import ShardFolder
from data_tools.shards import write_shard
from diffmoe_dist.data.index import ShardIndex


def write_folder(
    out: Path, samples: Sequence[Mapping[str, bytes]], shard_sizes: Sequence[int], **description: Any
) -> ShardIndex:
    """Write the samples into shards of these sizes, of which 0 is one, and open them; the key of sample i is i."""
    assert sum(shard_sizes) == len(samples)
    folder = ShardFolder(out, [f"test-{shard:06d}.tar" for shard in range(len(shard_sizes))], {"command": "test"})
    folder.claim()
    keyed = iter([(f"{number:09d}", sample) for number, sample in enumerate(samples)])
    for slot, size in zip(folder.slots, shard_sizes, strict=True):
        slot.save(write_shard(slot.begin(), [next(keyed) for _ in range(size)]))
    folder.finish({"class_names": ["a", "b"], "channels": 3, **description})
    return ShardIndex.open(out)


def png(pixels_HW3: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HW3).save(file, format="PNG")
    return file.getvalue()


def random_images(count: int, size: int, channels: int = 3) -> np.ndarray:
    """(count, size, size, channels) uint8, smooth enough to be told apart after a crop."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 4, 4, channels), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)
