"""What images are conditioned on, by their number: classes, captions of the training data, or prompts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from diffmoe_dist.config import Config
from diffmoe_dist.data.class_names import NO_NAMES, ClassNames, taken_once
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.prompts import EncodedPrompts, read_prompts
from diffmoe_dist.data.randomness import Stream, philox
from diffmoe_dist.data.stream import StreamedData
from diffmoe_dist.data.text import EncodedText, captions_of, choose_caption, pad_text
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.condition import Condition
from diffmoe_dist.sampling.prompts import encode_for_model, open_prompts
from diffmoe_dist.sampling.settings import PROMPTS_NAME, SamplingSettings


class Conditions(Protocol):
    kind: str  # what `label` counts, such as class
    kinds: str  # many of them

    def of(self, numbers: Sequence[int]) -> Condition:
        """The conditions of the images with these numbers."""
        ...

    def null(self, count: int) -> Condition:
        """The conditions that guidance moves away from, for so many images."""
        ...

    def noise_key(self, number: int) -> int:
        """The key of an image's noise, from 0 to 2**64 - 1: images with the same key and seed start from one noise."""
        ...

    def label(self, number: int) -> int:
        """The number of an image's condition: images with one condition have one label."""
        ...

    def name(self, label: int) -> str:
        """The condition with this label, for people."""
        ...


@dataclass(frozen=True)
class ClassLabels:
    labels: Sequence[int]  # of image 0, 1, ..., and then again from the first
    null_label: int
    names: ClassNames = NO_NAMES
    chosen: tuple[int, ...] | None = None  # the classes that were asked for; None: all
    kind, kinds = "class", "classes"

    def of(self, numbers: Sequence[int]) -> Condition:
        return torch.tensor([self.label(number) for number in numbers])

    def null(self, count: int) -> Condition:
        return torch.full((count,), self.null_label)

    def noise_key(self, number: int) -> int:
        return number

    def label(self, number: int) -> int:
        return self.labels[number % len(self.labels)]

    def name(self, label: int) -> str:
        if not self.null_label:
            return "no class"
        name = self.heading(label)
        return f"class {name}" if name.isdigit() else name

    def heading(self, label: int) -> str:
        """The name alone; the number where it has none."""
        return self.names.shown[label] if label < len(self.names.of_class) else str(label)


class DataCaptions:
    """The first captions of a data set's samples, in their order; guided away from the empty caption."""

    kind, kinds = "caption", "captions"

    def __init__(self, dataset: DataSet, encoder: TextEncoder | None, max_length: int) -> None:
        self.base, self.max_length = dataset.base, max_length
        self._read: Callable[[int], EncodedText]
        if encoder is not None:
            self._read = lambda label: encoder.encode_alone(self.name(label))
            self._null = encoder.encode_alone("")
        else:
            assert dataset.text is not None, dataset.where
            reader = dataset.text
            self._read, self._null = lambda label: reader.read(label, uniform=0.0), reader.null

    def of(self, numbers: Sequence[int]) -> Condition:
        return pad_text([self._read(self.label(number)) for number in numbers], self.max_length)

    def null(self, count: int) -> Condition:
        return pad_text([self._null] * count, self.max_length)

    def noise_key(self, number: int) -> int:
        return number

    def label(self, number: int) -> int:
        return number % self.base.num_samples

    def name(self, label: int) -> str:
        return choose_caption(captions_of(self.base, label), uniform=0.0)


class PromptConditions:
    """Prompts in turn. The noise of an image belongs to its prompt: neither their order nor other prompts matter."""

    kind, kinds = "prompt", "prompts"

    def __init__(self, encoded: EncodedPrompts, max_length: int) -> None:
        self.encoded, self.max_length = encoded, max_length
        texts = [prompt.text for prompt in encoded.prompts]
        self._times = Counter(texts)
        seen: Counter[str] = Counter()
        self._before = []  # how many earlier prompts have the text of this one
        for text in texts:
            self._before.append(seen[text])
            seen[text] += 1

    def of(self, numbers: Sequence[int]) -> Condition:
        return pad_text([self.encoded.caption(self.label(number)) for number in numbers], self.max_length)

    def null(self, count: int) -> Condition:
        return pad_text([self.encoded.negative] * count, self.max_length)

    def noise_key(self, number: int) -> int:
        label = self.label(number)
        text = self.name(label)
        copy = number // len(self.encoded.prompts) * self._times[text] + self._before[label]
        return int.from_bytes(hashlib.sha256(f"{copy} {text}".encode()).digest()[:8], "little")

    def label(self, number: int) -> int:
        return number % len(self.encoded.prompts)

    def name(self, label: int) -> str:
        return self.encoded.prompts[label].text

    @cached_property
    def every_metadata(self) -> list[dict[str, Any]]:
        """What their file says of the prompts; of each at least `prompt`."""
        return [prompt.metadata or {"prompt": prompt.text} for prompt in self.encoded.prompts]


def run_conditions(config: Config, data: TrainingData | StreamedData | None) -> Conditions:
    """What a run's own samples are conditioned on: its classes in turn, or the captions of its training data.

    Args:
        data: that it trains on; None will do for classes.
    """
    if config.model.condition == "class":
        names = NO_NAMES if data is None else data.class_names
        return ClassLabels(_all_classes(config.model.num_classes), config.model.num_classes, names)
    assert isinstance(data, TrainingData)
    encoder = data.encoders.text if data.encoders else None
    return DataCaptions(data.datasets[0], encoder, config.model.text_max_length)


def open_conditions(
    settings: SamplingSettings,
    config: Config,
    device: torch.device,
    encoder: TextEncoder | None = None,
    names: ClassNames = NO_NAMES,
) -> Conditions:
    """What the images of a job are conditioned on.

    Args:
        encoder: that of `data.text_encoder`, where something else has opened it: it is not opened again.
        names: of the model's classes.

    Raises:
        UserError: classes for a model that is conditioned on captions, or the other way round; or a text encoder that
            is not the model's.
    """
    if config.model.condition == "class":
        return _open_classes(settings, config.model.num_classes, names)
    for name in ("labels", "classes"):
        value = getattr(settings, name)
        if value is not None:
            raise UserError(f"--{name} {value}: this model is conditioned on captions; give --prompts FILE")
    if settings.prompts is None and settings.prompt is None:
        raise UserError(
            "--prompts is missing: this model is conditioned on captions; give a FILE of them, or --prompt TEXT"
        )
    return PromptConditions(open_prompts(settings, config, device, encoder), config.model.text_max_length)


def job_classes(job: dict[str, Any], config: Config, names: ClassNames) -> ClassLabels:
    """The classes that the images of a job are conditioned on, by its sampling.json."""
    classes = _all_classes(config.model.num_classes) if job["classes"] == "all" else job["classes"]
    labels = choose_labels(job["labels"], job["num"], classes, job["seed"])
    return ClassLabels(labels, config.model.num_classes, names)


def job_prompts(
    out: Path, job: dict[str, Any], config: Config, encoder: str, tokenizer: str | None, device: torch.device
) -> PromptConditions:
    """The prompts that the images of a finished job are conditioned on.

    Raises:
        UserError: the prompts are not there, or the encoder is not the one that the model was trained with.
    """
    prompts = read_prompts(out / PROMPTS_NAME, "--samples")[: job["num_prompts"]]
    encoded = encode_for_model(prompts, job["negative_prompt"], config, encoder, tokenizer, device)
    return PromptConditions(encoded, encoded.max_length)


def choose_labels(rule: Literal["balanced", "random"], num: int, classes: list[int], seed: int) -> list[int]:
    """The labels of images 0 to num - 1: every class in turn, or each a function of (seed, its number)."""
    if rule == "balanced":
        return [classes[number % len(classes)] for number in range(num)]
    randoms = (int(philox(seed, Stream.SAMPLING, 2, number).random_raw()) for number in range(num))
    return [classes[random % len(classes)] for random in randoms]


def _all_classes(num_classes: int) -> list[int]:
    return list(range(num_classes)) or [0]  # without classes all images have label 0


def _open_classes(settings: SamplingSettings, num_classes: int, names: ClassNames) -> ClassLabels:
    if settings.prompts or settings.prompt:
        prompt = f"--prompts {settings.prompts}" if settings.prompts else f"--prompt {settings.prompt}"
        raise UserError(
            f"{prompt}: this model is conditioned on classes; give --num, and --classes for some of them only"
        )
    assert settings.num is not None, "settings.check refuses it"
    given: dict[str, Any] = {"--labels": settings.labels, "--classes": settings.classes}
    given["--cfg-scale"] = settings.cfg_scale if settings.cfg_scale != 1 else None
    for option, value in given.items():
        if value is not None and not num_classes:
            raise UserError(f"{option} has no effect with this model, which was trained without classes; leave it out")
    chosen = settings.classes
    if isinstance(chosen, str):
        chosen = names.numbers(chosen, num_classes)
    elif chosen is not None:
        chosen = taken_once(chosen, "--classes")
    for label in chosen or ():
        if not 0 <= label < max(num_classes, 1):
            raise UserError(f"--classes {label}: this model knows the classes 0 to {num_classes - 1}")
    classes = _all_classes(num_classes) if chosen is None else list(chosen)
    labels = choose_labels(settings.labels or "balanced", settings.num, classes, settings.seed)
    return ClassLabels(labels, num_classes, names, chosen)
