"""Shards read as a stream, without an index: for data that are far away, or made by a command as they are read.

webdataset opens and shuffles, and little is exact. A pass is a permutation of the shards, dealt out to the workers of
all ranks; each worker goes through its part, pass by pass, for ever. So a pass has every sample at least once (more
often where there are fewer shards than workers), but the workers' passes drift apart, another number of ranks is
another run, a resumed run starts a new pass in another order, and damage is found only if the tar or the image shows
it: then it is counted. What holds: no rank runs out of samples before another, and the noise of a sample is a function
of (seed, pass, key).
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import webdataset
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen_ais, gopen_curl, gopen_gsutil, gopen_schemes
from webdataset.shardlists import expand_urls

from diffmoe_dist.data.batch import Batch, BatchBuffer
from diffmoe_dist.data.class_names import NO_NAMES
from diffmoe_dist.data.format import IMAGE_FIELDS, LABEL_FIELD
from diffmoe_dist.data.images import ImageError
from diffmoe_dist.data.index import CorruptShardError
from diffmoe_dist.data.loader import BatchLoader, make_loader, parse_label, read_pixels
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.data.randomness import Stream, permutation, sample_generator
from diffmoe_dist.data.streamed_tar import StreamDamageError, stream_samples
from diffmoe_dist.errors import UserError

logger = logging.getLogger("diffmoe_dist.data")
PIPE = "pipe:"
_SHUFFLED_SAMPLES = 1000  # held by a worker
_KEY = "__key__"
_URL = "__url__"
_MAX_BAD_IN_A_ROW = 100


@dataclass(frozen=True)
class StreamedData:
    """The shards of a stream, and what its samples are turned into."""

    urls: tuple[str, ...]
    channels: int
    image_size: int
    num_classes: int
    class_names = NO_NAMES  # a stream has none

    @classmethod
    def open(cls, shards: str, *, allow_pipe: bool, channels: int, image_size: int, num_classes: int) -> StreamedData:
        """`shards` is a URL or a path, `a-{000000..000099}.tar` for many, `::` between several.

        Raises UserError for a command in it, unless commands are allowed, and for what cannot be opened.
        """
        try:
            urls = tuple(expand_urls(shards))
            schemes = [urlparse(url).scheme for url in urls]
        except (AssertionError, ValueError) as error:  # a variable that is not set, a brace without its other
            raise UserError(
                f"data.shards={shards}: not a path or URL, nor a list of them ({error}); see docs/data.md, Streams"
            ) from None
        if not allow_pipe and (command := next((url for url in urls if url.strip().startswith(PIPE)), None)):
            raise UserError(f"data.shards={command}: runs a command; set data.allow_pipe=true if you trust it")
        for url, scheme in zip(urls, schemes, strict=True):
            _check_url(url, scheme)
        return cls(urls, channels, image_size, num_classes)

    @property
    def folders(self) -> set[Path]:
        """Where the shards lie that are files here."""
        paths = [Path(url) for url in self.urls if not urlparse(url).scheme]
        return {path.resolve().parent for path in paths}

    @property
    def fingerprint(self) -> str:
        """Of the names: the content is not known before it is read."""
        return hashlib.sha256("\0".join(self.urls).encode()).hexdigest()


class StreamLoader(BatchLoader):
    """A rank's micro-batches from a stream of shards."""

    def __init__(
        self,
        data: StreamedData,
        split: BatchSplit,
        *,
        seed: int,
        images_seen: int = 0,
        flip: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            make_loader(StreamedDataset(data, split, seed, images_seen, flip), None, num_workers, pin_memory)
        )

    def describe_bad(self, sample_id: int) -> str:
        return "a streamed sample does not decode, or the rest of a shard is lost; the next one takes its place"


class StreamedDataset(IterableDataset[Batch]):
    """The micro-batches of one worker."""

    def __init__(self, data: StreamedData, split: BatchSplit, seed: int, images_seen: int, flip: bool) -> None:
        self.data, self.split, self.seed, self.images_seen, self.flip = data, split, seed, images_seen, flip
        self._damaged_shards = 0  # met by this worker, and not counted yet

    def __iter__(self) -> Iterator[Batch]:
        samples = self._samples()
        while True:
            buffer = BatchBuffer(self.split.micro_batch_size, self.data.channels, self.data.image_size)
            for row in range(self.split.micro_batch_size):
                self._fill(buffer, row, samples)
            yield buffer.batch()

    def _fill(self, buffer: BatchBuffer, row: int, samples: Iterator[tuple[int, dict[str, Any]]]) -> None:
        lost = 0
        for bad in range(_MAX_BAD_IN_A_ROW):
            number, sample = next(samples)
            lost, self._damaged_shards = lost + self._damaged_shards, 0
            name = hashlib.blake2b(sample[_KEY].encode(), digest_size=7).digest()
            buffer.sample_ids[row] = int.from_bytes(name, "big")
            epoch = self.images_seen + number  # else a resumed run would give the noise of the passes before again
            buffer.fill_random(row, sample_generator(self.seed, Stream.TRAINING, epoch, int(buffer.sample_ids[row])))
            buffer.epochs[row], buffer.bad[row] = number, bad + lost
            try:
                self._read(sample, buffer, row)
                return
            except ImageError:
                continue
        raise CorruptShardError(f"{sample[_URL]}: {_MAX_BAD_IN_A_ROW} samples in a row give no image")

    def _read(self, sample: dict[str, Any], buffer: BatchBuffer, row: int) -> None:
        payload = next((sample[field] for field in IMAGE_FIELDS if field in sample), None)
        if payload is None:
            raise ImageError("has no image")
        read_pixels(payload, self.data.channels, self.flip and buffer.flips(row), buffer.images[row])
        try:
            if self.data.num_classes:
                buffer.labels[row] = parse_label(sample.get(LABEL_FIELD, b""), self.data.num_classes)
        except ValueError as error:
            raise CorruptShardError(f"{sample[_URL]}, key {sample[_KEY]}: {error}") from None

    def _samples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(pass, raw sample) for ever."""
        worker = get_worker_info()
        workers, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        place, places = self.split.rank * workers + own, self.split.world_size * workers
        number = 0
        while True:
            urls = self._urls(number, place, places)
            mixer = random.Random(f"{self.seed} {self.images_seen} {number} {place}")
            mixed = webdataset.shuffle(_SHUFFLED_SAMPLES, rng=mixer)
            found = 0
            for sample in mixed(self._shards(urls)):
                found += 1
                yield number, sample
            if not found:
                raise CorruptShardError(f"{urls[0]}: no sample in the shards of this worker")
            number += 1

    def _shards(self, urls: list[str]) -> Iterator[dict[str, Any]]:
        """The samples of some shards. Of a damaged one those before the damage; it is named, and counted."""
        for url in urls:
            try:
                for key, payloads in stream_samples(url):
                    yield {_KEY: key, _URL: url, **payloads}
            except StreamDamageError as error:
                logger.warning("%s; the rest of this shard is left out", error)
                self._damaged_shards += 1

    def _urls(self, number: int, place: int, places: int) -> list[str]:
        """The shards of one worker in a pass; with fewer shards than workers some are read by several."""
        urls = self.data.urls
        order = permutation(len(urls), self.seed, Stream.STREAMED_SHARDS, self.images_seen, number)
        mine = order[place::places] if len(urls) >= places else order[place % len(urls) :: places]
        return [urls[shard] for shard in np.atleast_1d(mine).tolist()]


_PROGRAMS = {gopen_curl: "curl", gopen_gsutil: "gsutil", gopen_ais: "ais"}  # that webdataset reads URLs with


def _check_url(url: str, scheme: str) -> None:
    """Raises UserError for a path where no file is, and for a scheme that webdataset cannot open here."""
    if scheme not in ("", "file"):
        if scheme not in gopen_schemes or scheme.startswith("__"):
            known = ", ".join(name for name in gopen_schemes if not name.startswith("__"))
            raise UserError(f"data.shards={url}: no way to open {scheme}:; name a path or one of {known}")
        program = _PROGRAMS.get(gopen_schemes[scheme])
        if program is not None and shutil.which(program) is None:
            raise UserError(f"data.shards={url}: {scheme}: is read with {program}, which is not installed; install it")
        return
    path = Path(url2pathname(urlparse(url).path) if scheme else url)
    if path.is_dir():
        raise UserError(f"data.shards={url}: a folder; a stream is of tars: {path}/NAME-{{000000..000099}}.tar")
    if not os.path.exists(path):
        raise UserError(f"data.shards={url}: no such file; name a tar, or a-{{000000..000099}}.tar for many")
