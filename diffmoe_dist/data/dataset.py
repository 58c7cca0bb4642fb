"""What a run reads: a folder of shards with its side folders, or a weighted mixture of several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffmoe_dist.data.class_names import NO_NAMES, ClassNames, names_of_data
from diffmoe_dist.data.format import LatentSpec
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import LatentReader
from diffmoe_dist.data.online import OnlineEncoders
from diffmoe_dist.data.text import TextReader
from diffmoe_dist.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """A folder of shards and, where they are used, the latents and the encoded captions made from it."""

    base: ShardIndex
    latents: LatentReader | None = None
    text: TextReader | None = None

    @classmethod
    def open(
        cls,
        shards: str | Path,
        latents: str | Path | None = None,
        text: str | Path | None = None,
        section: str = "data",
    ) -> DataSet:
        """Open and check the folders. Raises UserError, also for a side folder of other data or of another kind.

        Args:
            section: of the configuration, whose settings `shards`, `latents` and `text` name the folders.
        """
        base = ShardIndex.open(shards, f"{section}.shards={shards}")

        def side(folder: str | Path, setting: str) -> ShardIndex:
            opened = ShardIndex.open(folder, f"{section}.{setting}={folder}")
            opened.check_base(base)
            return opened

        return cls(
            base,
            None if latents is None else LatentReader(side(latents, "latents")),
            None if text is None else TextReader(side(text, "text")),
        )

    @property
    def channels(self) -> int | None:
        """Of what the model is given; None: the folder holds no images."""
        return self.base.channels if self.latents is None else self.latents.spec.channels

    @property
    def image_size(self) -> int | None:
        """Height and width of what the model is given; None: images of all sizes, cropped as they are read."""
        return self.base.image_size if self.latents is None else self.latents.spec.height

    @property
    def where(self) -> str:
        """The setting and the folder that the model's inputs come from."""
        return self.base.named if self.latents is None else self.latents.index.named

    @property
    def fingerprints(self) -> list[str | None]:
        """Of the shards, the latents and the encoded captions."""
        sides = (self.latents, self.text)
        return [self.base.fingerprint, *(side.index.fingerprint if side else None for side in sides)]


@dataclass(frozen=True)
class TrainingData:
    """One data set, or several of one kind that share the stream of samples by their weights.

    Sample ids run through all of them: those of the second one follow those of the first.
    Raises UserError for data sets that do not belong into one run.
    """

    datasets: tuple[DataSet, ...]
    image_size: int  # height and width of what the model is given
    weights: tuple[float, ...] = (1.0,)
    encoders: OnlineEncoders | None = None  # of what is not encoded yet

    def __post_init__(self) -> None:
        assert len(self.datasets) == len(self.weights) > 0, (self.datasets, self.weights)
        traits: dict[str, Callable[[DataSet], Any]] = {
            "colour or latent channels": lambda dataset: dataset.channels,
            "classes": lambda dataset: self._classes(dataset),
            "autoencoder": lambda dataset: dataset.latents and _latent_traits(dataset.latents.spec),
            "text encoder": lambda dataset: dataset.text and dataset.text.spec.encoder_sha256,
        }
        first = self.datasets[0]
        of_place = [(dataset.where, dataset.fingerprints) for dataset in self.datasets]
        for number, (where, fingerprints) in enumerate(of_place):
            for other, same in of_place[:number]:
                if fingerprints == same:
                    raise UserError(f"data.mixture: {where} holds the data of {other}; name them once, with one weight")
        for dataset in self.datasets[1:]:
            for name, trait in traits.items():
                if trait(dataset) != trait(first):
                    raise UserError(
                        f"data.mixture: {dataset.where} has not the {name} of {first.where}; mix data of one kind"
                    )

    def _classes(self, dataset: DataSet) -> Any:
        has_captions = dataset.text is not None or (self.encoders is not None and self.encoders.text is not None)
        return None if has_captions else (dataset.base.num_classes, dataset.base.class_names)

    @cached_property
    def class_names(self) -> ClassNames:
        """What the labels are called; none where captions take their place."""
        base = self.datasets[0].base
        return NO_NAMES if self._classes(self.datasets[0]) is None else names_of_data(base.class_names, base.folder)

    @property
    def channels(self) -> int:
        channels = self.datasets[0].channels
        if channels is None:
            raise UserError(f"{self.datasets[0].where}: holds no images; give a folder that does, or its latents")
        return channels

    @property
    def text_encoder_sha256(self) -> str:
        """The fingerprint of the encoder of the captions; empty: there are none."""
        if self.encoders is not None and self.encoders.text is not None:
            return self.encoders.text.sha256
        text = self.datasets[0].text
        return "" if text is None else text.spec.encoder_sha256

    @property
    def read_size(self) -> int:
        """Height and width of what is read: of pixels, or of stored latents."""
        return self.image_size * (self.encoders.downsampling if self.encoders else 1)

    @cached_property
    def first_ids(self) -> tuple[int, ...]:
        """The sample id of each data set's sample 0."""
        sizes = [dataset.base.num_samples for dataset in self.datasets]
        return tuple(sum(sizes[:number]) for number in range(len(sizes)))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with every byte of the data and with the weights: what a run that is resumed must find again."""
        if len(self.datasets) == 1 and self.datasets[0].fingerprints[1:] == [None, None] and self.encoders is None:
            return self.datasets[0].base.fingerprint
        parts: list[Any]
        parts = [[*dataset.fingerprints, weight] for dataset, weight in zip(self.datasets, self.weights, strict=True)]
        parts += [] if self.encoders is None else [self.encoders.fingerprints]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def name_of(self, sample_id: int) -> str:
        """Where a sample lies, for people."""
        number = max(number for number, first in enumerate(self.first_ids) if first <= sample_id)
        base, local = self.datasets[number].base, sample_id - self.first_ids[number]
        return f"{base.folder / base.shards[base.shard_of(local)].name}, key {base.key(local)}"


def _latent_traits(spec: LatentSpec) -> tuple[Any, ...]:
    return spec.vae_sha256, spec.parametrisation, spec.scale, spec.shift, spec.height, spec.width
