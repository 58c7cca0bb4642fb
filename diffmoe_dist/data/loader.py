"""Training batches: images or latents from the shards and, with each, the random numbers that training needs for it."""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from diffmoe_dist.data.batch import Batch, BatchBuffer
from diffmoe_dist.data.class_names import NO_NAMES
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.format import LABEL_FIELD
from diffmoe_dist.data.images import ImageError, crop_image, decode_image
from diffmoe_dist.data.labels import label_in_payload
from diffmoe_dist.data.latents import FLIP_VIEW
from diffmoe_dist.data.online import OnlineEncoders
from diffmoe_dist.data.order import BatchSplit, MixtureOrder
from diffmoe_dist.data.randomness import Stream, philox, sample_generator
from diffmoe_dist.data.text import EncodedText, captions_of, choose_caption, pad_text
from diffmoe_dist.errors import UserError

logger = logging.getLogger("diffmoe_dist.data")
_REPLACEMENTS = 16  # tried for a bad sample; with more, the data set is bad


def read_pixels(payload: bytes, channels: int, flip: bool, out_CHW: np.ndarray) -> tuple[int, int]:
    """Decode an image, crop it to the square `out_CHW`, and write it there in [-1, 1], fp32.

    Returns the (width, height) that it had. Raises ImageError for bytes that give no image.
    """
    image = decode_image(payload, channels)
    found, size = image.size, out_CHW.shape[-1]
    array = np.asarray(image if found == (size, size) else crop_image(image, size, "adm"))
    if flip:
        array = array[:, ::-1]
    np.divide(array if channels == 1 else array.transpose(2, 0, 1), np.float32(127.5), out=out_CHW, dtype=np.float32)
    out_CHW -= np.float32(1)
    return found


def parse_label(payload: bytes, num_classes: int) -> int:
    """The class of a `cls` payload. Raises ValueError where it is none."""
    label = label_in_payload(payload)
    if label >= num_classes:
        raise ValueError(f"label {label} is outside 0..{num_classes - 1}")
    return label


Caption = EncodedText | str | None  # encoded before, to be encoded, or none


@dataclass(frozen=True)
class _RandomInputs:
    """The random numbers of a place that come after `BatchBuffer.fill_random`; a sample that stands in has the same."""

    flip: bool
    latent_noise_CHW: np.ndarray | None
    caption_uniform: float | None


class _SampleReader:
    """Reads the samples of one data set."""

    def __init__(self, dataset: DataSet, flip: bool, samples_latents: bool, reads_captions: bool) -> None:
        self.base, self.flip = dataset.base, flip
        self.samples_latents = samples_latents or dataset.latents is not None
        self.latents, self.text = dataset.latents, dataset.text
        self.has_captions = self.text is not None or reads_captions
        self._fields = {LABEL_FIELD, *(self.base.image_fields if self.latents is None else ())}
        if self.latents is None and not self.base.image_fields:
            raise UserError(f"{dataset.where}: fields {', '.join(self.base.fields)} lack an image; pack images")
        if not self.has_captions and self.base.num_classes and LABEL_FIELD not in self.base.fields:
            raise UserError(f"{self.base.named}: has classes but no {LABEL_FIELD}; pack it with labels")
        if self.latents is not None and flip and FLIP_VIEW not in self.latents.spec.views:
            raise UserError(
                f"data.flip=true, but {dataset.where} holds no mirrored latents; use false or encode without --no-flip"
            )

    def random_inputs(self, generator: np.random.Generator, flip: bool, shape_CHW: tuple[int, ...]) -> _RandomInputs:
        noise = generator.standard_normal(shape_CHW, dtype=np.float32) if self.samples_latents else None
        uniform = generator.random() if self.has_captions else None
        return _RandomInputs(self.flip and flip, noise, uniform)

    def read(self, sample_id: int, random: _RandomInputs, out_CHW: np.ndarray) -> tuple[int, Caption]:
        """Write the image or the latent. Returns the label and the caption.

        Raises ImageError for a bad sample, CorruptShardError for damage.
        """
        payloads = self.base.read(sample_id, self._fields)
        if self.latents is not None:
            assert random.latent_noise_CHW is not None
            self.latents.read(sample_id, random.flip, random.latent_noise_CHW, out_CHW)
        else:
            self._read_pixels(sample_id, payloads, random.flip, out_CHW)
        return self._label(payloads, sample_id), self._caption(sample_id, random.caption_uniform)

    def _caption(self, sample_id: int, uniform: float | None) -> Caption:
        if uniform is None:
            return None
        if self.text is None:
            return choose_caption(captions_of(self.base, sample_id), uniform)
        return self.text.read(sample_id, uniform)

    def _read_pixels(self, sample_id: int, payloads: dict[str, bytes], flip: bool, out_CHW: np.ndarray) -> None:
        payload = next((payloads[field] for field in self.base.image_fields if field in payloads), None)
        if payload is None:
            raise ImageError("has no image")
        width, height = read_pixels(payload, len(out_CHW), flip, out_CHW)
        recorded = self.base.image_size
        if recorded is not None and (width, height) != (recorded, recorded):
            problem = f"image is {width}x{height} pixels, the index says {recorded}x{recorded}"
            raise self.base.corrupt(sample_id, problem)

    def _label(self, payloads: dict[str, bytes], sample_id: int) -> int:
        if self.base.num_classes == 0 or self.has_captions:
            return 0  # what stands for "no class": the number after the last one
        try:
            return parse_label(payloads.get(LABEL_FIELD, b""), self.base.num_classes)
        except ValueError as error:
            raise self.base.corrupt(sample_id, str(error)) from None


class TrainingDataset(Dataset[Batch]):
    """Stream positions in, one `Batch` out. A whole micro-batch is one item, so that small images cost no collation."""

    def __init__(self, data: TrainingData, seed: int, flip: bool) -> None:
        self.seed = seed
        autoencoder = data.encoders.autoencoder if data.encoders else None
        encodes_text = data.encoders is not None and data.encoders.text is not None
        self._latent_CHW = None
        if autoencoder is not None:
            self._latent_CHW = (autoencoder.latent_channels, data.image_size, data.image_size)
        self._readers = [
            _SampleReader(dataset, flip, autoencoder is not None, encodes_text) for dataset in data.datasets
        ]
        self._order = MixtureOrder([reader.base.num_samples for reader in self._readers], data.weights, seed)
        self._first_ids, self._channels, self._read_size = data.first_ids, data.channels, data.read_size
        texts = [reader.text for reader in self._readers if reader.text]
        self._text_length = max((text.spec.max_length for text in texts), default=0)
        self._null_text = pad_text([texts[0].null], self._text_length) if texts else None

    def __getitem__(self, positions: range) -> Batch:
        buffer = BatchBuffer(len(positions), self._channels, self._read_size, self._latent_CHW)
        captions: list[Caption] = []
        for row, position in enumerate(positions):
            number, epoch, sample_id = self._order[position]
            name = self._first_ids[number] + sample_id
            generator = sample_generator(self.seed, Stream.TRAINING, epoch, name)
            buffer.fill_random(row, generator)
            image = buffer.images[row]
            random = self._readers[number].random_inputs(generator, buffer.flips(row), buffer.noise[row].shape)
            if buffer.latent_noise is not None:
                buffer.latent_noise[row] = random.latent_noise_CHW
            buffer.epochs[row], buffer.sample_ids[row] = epoch, name
            buffer.bad[row], buffer.labels[row], caption = self._read(number, sample_id, random, image)
            captions.append(caption)
        encoded = [caption for caption in captions if isinstance(caption, EncodedText)]
        texts = tuple(caption for caption in captions if isinstance(caption, str))
        return buffer.batch(pad_text(encoded, self._text_length) if encoded else None, self._null_text, texts or None)

    def _read(
        self, number: int, sample_id: int, random: _RandomInputs, out_CHW: np.ndarray
    ) -> tuple[int, int, Caption]:
        """Read a sample, or another one in the place of a bad one. Returns how many were bad, label and caption."""
        reader, reason = self._readers[number], ""
        for bad, candidate in enumerate(self._candidates(number, sample_id)):
            try:
                return bad, *reader.read(candidate, random, out_CHW)
            except ImageError as error:
                reason = reason or str(error)
        raise reader.base.corrupt(sample_id, f"{reason}; so it is with {_REPLACEMENTS} samples tried in its place")

    def _candidates(self, number: int, sample_id: int) -> Iterator[int]:
        """A sample, and those that stand in for it if it is bad: the same in every epoch, on any rank and worker."""
        yield sample_id
        bits = philox(self.seed, Stream.REPLACEMENT, 0, self._first_ids[number] + sample_id)
        yield from (int(raw) % self._readers[number].base.num_samples for raw in bits.random_raw(_REPLACEMENTS))


class MicroBatchSampler(Sampler[range]):
    """The stream positions of a rank's micro-batches, endlessly, from `images_seen` on."""

    def __init__(self, split: BatchSplit, images_seen: int) -> None:
        self.split, self.images_seen = split, images_seen

    def __iter__(self) -> Iterator[range]:
        for images_seen in itertools.count(self.images_seen, self.split.global_batch_size):
            yield from self.split.positions(images_seen)


class BatchLoader:
    """An endless iterator over a rank's micro-batches. Close it to end its worker processes."""

    class_names = NO_NAMES  # what their labels are called

    def __init__(self, loader: DataLoader[Batch], encoders: OnlineEncoders | None = None) -> None:
        self._batches: Iterator[Batch] | None = iter(loader)
        self._encoders = encoders

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        batch = next(self._batches)
        for sample_id in batch.sample_ids[batch.bad > 0].tolist():
            logger.warning("%s", self.describe_bad(sample_id))
        return batch if self._encoders is None else self._encoders.encode(batch)

    def describe_bad(self, sample_id: int) -> str:
        raise NotImplementedError

    def close(self) -> None:
        """End the worker processes. The loader is exhausted afterwards; closing it again does nothing."""
        batches, self._batches = self._batches, None
        # Dropping the last reference would do it too, but the traceback of an error may hold another one.
        if batches is not None and hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


class TrainingLoader(BatchLoader):
    """A rank's micro-batches from indexed shards.

    `images_seen` is the only state: a loader made with it continues exactly where another one stopped, on any number
    of ranks and workers.
    """

    def __init__(
        self,
        data: TrainingData,
        split: BatchSplit,
        *,
        seed: int,
        images_seen: int = 0,
        flip: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        dataset, sampler = TrainingDataset(data, seed, flip), MicroBatchSampler(split, images_seen)
        super().__init__(make_loader(dataset, sampler, num_workers, pin_memory), data.encoders)
        self.data, self.class_names = data, data.class_names

    def describe_bad(self, sample_id: int) -> str:
        return f"{self.data.name_of(sample_id)}: does not decode; another sample stands in"


def make_loader(
    dataset: Dataset[Batch], sampler: Sampler[range] | None, num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """A DataLoader whose items are micro-batches; each worker process has two of them ready."""
    return DataLoader(
        dataset,
        batch_size=None,  # an item is a micro-batch already
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_rank,
        generator=torch.Generator(),  # else starting the workers would draw from torch's global generator
    )


def _leave_signals_to_the_rank(worker: int) -> None:
    # Ctrl-C and a scheduler's signals reach every process of a job; the rank ends its workers, without a traceback from
    # each of them. The rank's own pipe for signals came along with the fork, and must not hear the worker's.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
