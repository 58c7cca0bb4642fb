"""Training batches: images from the shards and, with each, the random numbers that training needs for it."""

from __future__ import annotations

import dataclasses
import io
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.order import StreamOrder, batch_positions
from diffmoe_dist.data.randomness import Stream, sample_generator
from diffmoe_dist.errors import UserError

IMAGE_FIELDS = ("png", "jpg", "jpeg", "webp")
LABEL_FIELD = "cls"
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_SMALLEST_UNIFORM = 2.0**-54  # stands in for the 0.0 that one draw in 2**53 gives


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples on one rank."""

    images: Tensor  # (B, C, H, W) fp32 in [-1, 1]
    labels: Tensor  # (B,) int64
    noise: Tensor  # (B, C, H, W) fp32, standard normal
    time_uniform: Tensor  # (B,) fp64 in (0, 1): what the objective turns into a time
    drop_uniform: Tensor  # (B,) fp64 in [0, 1): the label is dropped below the drop probability
    sample_ids: Tensor  # (B,) int64
    epochs: Tensor  # (B,) int64

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; from pinned memory without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the DataLoader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(function(getattr(self, field.name)) for field in dataclasses.fields(self)))


class TrainingDataset(Dataset[Batch]):
    """Stream positions in, one `Batch` out. A whole micro-batch is one item, so that small images cost no collation."""

    def __init__(self, index: ShardIndex, seed: int, flip: bool) -> None:
        image_field = next((field for field in index.fields if field in IMAGE_FIELDS), None)
        if image_field is None or LABEL_FIELD not in index.fields:
            raise UserError(
                f"data.shards={index.folder}: fields {', '.join(index.fields)} lack an image "
                f"({', '.join(IMAGE_FIELDS)}) or a label ({LABEL_FIELD}); pack images with labels"
            )
        self.index, self.seed, self.flip = index, seed, flip
        self._image_field = image_field
        self._order = StreamOrder(index.num_samples, seed)

    def __getitem__(self, positions: range) -> Batch:
        count, size = len(positions), self.index.image_size
        pixels = np.empty((count, self.index.channels, size, size), dtype=np.uint8)
        noise = np.empty(pixels.shape, dtype=np.float32)
        uniforms = np.empty((3, count))
        labels, sample_ids, epochs = np.empty((3, count), dtype=np.int64)
        for row, position in enumerate(positions):
            epoch, sample_id = self._order[position]
            epochs[row], sample_ids[row] = epoch, sample_id
            # The order of the draws is fixed: time, drop, flip, then noise. A new one goes after them.
            generator = sample_generator(self.seed, Stream.TRAINING, epoch, sample_id)
            uniforms[:, row] = generator.random(3)
            generator.standard_normal(dtype=np.float32, out=noise[row])
            payloads = self.index.read(sample_id)
            labels[row] = self._label(payloads[LABEL_FIELD], sample_id)
            image = self._image(payloads[self._image_field], sample_id)  # (C, H, W)
            pixels[row] = image[:, :, ::-1] if self.flip and uniforms[2, row] < 0.5 else image
        return Batch(
            images=torch.from_numpy(pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)),
            labels=torch.from_numpy(labels),
            noise=torch.from_numpy(noise),
            time_uniform=torch.from_numpy(np.maximum(uniforms[0], _SMALLEST_UNIFORM)),
            drop_uniform=torch.from_numpy(uniforms[1]),
            sample_ids=torch.from_numpy(sample_ids),
            epochs=torch.from_numpy(epochs),
        )

    def _label(self, payload: bytes, sample_id: int) -> int:
        try:
            label = int(payload)
        except ValueError as error:
            raise self.index.corrupt(sample_id, f"label {payload[:20]!r} is not a number") from error
        if not 0 <= label < self.index.num_classes:
            raise self.index.corrupt(sample_id, f"label {label} is outside 0..{self.index.num_classes - 1}")
        return label

    def _image(self, payload: bytes, sample_id: int) -> np.ndarray:
        """Decode to (C, H, W) uint8."""
        mode = "L" if self.index.channels == 1 else "RGB"
        try:
            image = Image.open(io.BytesIO(payload), formats=_IMAGE_FORMATS)
            if image.size != (self.index.image_size, self.index.image_size):
                size, expected = "x".join(map(str, image.size)), self.index.image_size
                raise self.index.corrupt(sample_id, f"image is {size} pixels, the index says {expected}x{expected}")
            array = np.asarray(image if image.mode == mode else image.convert(mode))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise self.index.corrupt(sample_id, f"{self._image_field} does not decode ({error})") from error
        return array[None] if mode == "L" else array.transpose(2, 0, 1)


class MicroBatchSampler(Sampler[range]):
    """The stream positions of a rank's micro-batches, endlessly, from `images_seen` on."""

    def __init__(
        self, images_seen: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> None:
        self.images_seen, self.global_batch_size = images_seen, global_batch_size
        self._share = (global_batch_size, micro_batch_size, rank, world_size)
        batch_positions(images_seen, *self._share)  # a wrong batch size is refused here, not in the first step

    def __iter__(self) -> Iterator[range]:
        images_seen = self.images_seen
        while True:
            yield from batch_positions(images_seen, *self._share)
            images_seen += self.global_batch_size


class TrainingLoader:
    """An endless iterator over a rank's micro-batches, `global_batch_size / (micro_batch_size * world_size)` a step.

    `images_seen` is the only state: a loader made with it continues exactly where another one stopped, on any number
    of ranks and workers. `rank` and `world_size` count data-parallel ranks. Close it to end its worker processes.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        images_seen: int,
        flip: bool,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        loader = DataLoader(
            TrainingDataset(index, seed, flip),
            batch_size=None,  # an item is a micro-batch already
            sampler=MicroBatchSampler(images_seen, global_batch_size, micro_batch_size, rank, world_size),
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_rank,
            generator=torch.Generator(),  # else starting the workers would draw from torch's global generator
        )
        self._batches: Iterator[Batch] | None = iter(loader)

    def __iter__(self) -> TrainingLoader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        return next(self._batches)

    def close(self) -> None:
        """End the worker processes. The loader is exhausted afterwards; closing it again does nothing."""
        self._batches = None  # the last reference: the DataLoader's iterator joins its workers as it goes


def _leave_signals_to_the_rank(worker: int) -> None:
    # Ctrl-C and a scheduler's signals reach every process of a job; the rank ends its workers, without a traceback from
    # each of them. The rank's own pipe for signals came along with the fork, and must not hear the worker's.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
