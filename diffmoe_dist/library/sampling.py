"""Images from a loaded model, as the command `diffmoe_dist.sample` makes them: block by block, by the same code.

Shape legend: N images, C channels, H = W image size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.data.prompts import Prompt
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.errors import UserError
from diffmoe_dist.library.model import LoadedModel, label_numbers
from diffmoe_dist.model.condition import Condition, TextCondition
from diffmoe_dist.model.precision import tf32_products
from diffmoe_dist.sampling.blocks import BlockSampler, not_finite
from diffmoe_dist.sampling.conditions import ClassLabels, Conditions, PromptConditions
from diffmoe_dist.sampling.generate import Decode, Generated, open_decoder, to_uint8
from diffmoe_dist.sampling.job import describe_job, sampler_of
from diffmoe_dist.sampling.prompts import encode_for_model
from diffmoe_dist.sampling.settings import SAMPLERS, SamplingSettings

_OF_TEXT = ("negative_prompt", "encoder", "tokenizer")


class SampleOptions(TypedDict, total=False):
    """The options of the command, by the same names and with the same defaults."""

    num: int  # images; default: one for each label or prompt. More of them take these in turn.
    steps: int
    sampler: str
    cfg_scale: float
    cfg_interval: tuple[float, float]
    cfg_channels: int
    one_pass: bool
    seed: int
    time_shift: float
    batch_size: int
    decoder: str | Path  # of a model of latents; default: the run's own
    negative_prompt: str | TextCondition
    encoder: str | Path
    tokenizer: str | Path


@dataclass(frozen=True)
class Samples:
    """What `sample` returns."""

    images: Tensor  # (N, C, H, W) fp32, pixels in about [-1, 1]; without a decoder the latents
    latents: Tensor  # (N, C, H, W) fp32, what the model made: the same, where it makes pixels
    labels: list[int]  # (N,) of classes, or the numbers of the prompts
    nfe: float  # function evaluations for each image
    capacity: float | None  # measured C, experts a token; None: no experts

    def to_uint8(self) -> np.ndarray:
        """(N, H, W, C) uint8, as `samples.npz` has them and PIL's `Image.fromarray` takes each with three channels."""
        return to_uint8(self.images)


class _EncodedCaptions:
    """Captions that are encoded already. The noise of an image belongs to its number."""

    kind, kinds = "caption", "captions"

    def __init__(self, captions: TextCondition, negative: TextCondition | None) -> None:
        self.captions, self.negative = captions, negative

    def of(self, numbers: Sequence[int]) -> Condition:
        rows = torch.tensor([self.label(number) for number in numbers], device=self.captions.null.device)
        return self.captions.map(lambda tensor: tensor[rows])

    def null(self, count: int) -> Condition:
        first = self.captions if self.negative is None else self.negative  # without guidance nobody looks
        return first.map(lambda tensor: tensor[:1].expand(count, *tensor.shape[1:]))

    def noise_key(self, number: int) -> int:
        return number

    def label(self, number: int) -> int:
        return number % len(self.captions)

    def name(self, label: int) -> str:
        return f"caption {label}"


def draw_samples(model: Any, given: Any, prompts: Any, options: SampleOptions) -> Samples:
    """`diffmoe_dist.sample`.

    Args:
        given: labels, or of a model that is conditioned on captions prompts.
        prompts: the same by their name.
    """
    loaded = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(loaded, LoadedModel):
        raise UserError(f"model is a {type(model).__name__}; give what load_model returns")
    if loaded.training:
        raise UserError("the model is in training mode, in which experts choose as in training; call model.eval()")
    unknown = [name for name in options if name not in SampleOptions.__annotations__]
    if unknown:
        raise TypeError(f"sample() has no option {unknown[0]!r}; it takes {', '.join(SampleOptions.__annotations__)}")
    with _in_words_of_python():
        settings, conditions = _asked(loaded, given, prompts, options)
        job = describe_job(settings, loaded.config, "", conditions)
        decode = _decoder(loaded, options.get("decoder"))
    sampler = BlockSampler(
        loaded.unchecked() if loaded is model else model, build_objective(loaded.config), decode, conditions,
        sampler_of(job), job["num"], job["batch_size"], is_sharded=False,
    )  # fmt: skip
    with tf32_products(loaded.device, enabled=False):
        return _joined(sampler, [sampler.draw(start) for start in sampler.starts])


def _joined(sampler: BlockSampler, drawn: list[Generated]) -> Samples:
    for block in drawn:
        if block.non_finite is not None:
            raise FloatingPointError(not_finite(block.non_finite))
    latents = torch.cat([block.images for block in drawn])
    images = torch.cat([sampler.decode(block.images) for block in drawn])
    nfe = sum(block.nfe * len(block.images) for block in drawn) / len(latents)
    slots, tokens = sum(block.slots for block in drawn), sum(block.tokens for block in drawn)
    labels = [sampler.conditions.label(number) for number in range(len(latents))]
    return Samples(images, latents, labels, nfe, slots / tokens if tokens else None)


def _asked(model: LoadedModel, given: Any, prompts: Any, options: SampleOptions) -> tuple[SamplingSettings, Conditions]:
    """The settings and what the images are conditioned on. Raises UserError."""
    if options.get("sampler") not in (None, *SAMPLERS):
        raise UserError(f"--sampler {options['sampler']} is none; choose from {', '.join(SAMPLERS)}")
    if given is not None and prompts is not None:
        raise UserError("labels and prompts: a model is conditioned on one of them; give that alone")
    plain: dict[str, Any] = {name: value for name, value in options.items() if name not in ("decoder", *_OF_TEXT)}
    if plain.get("cfg_interval") is not None:
        plain["cfg_interval"] = tuple(plain["cfg_interval"])
    if model.config.model.condition == "class":
        return _asked_of_classes(model, given, prompts, options, plain)
    prompts = given if prompts is None else prompts
    if prompts is None:
        raise UserError("--prompts is missing: this model is conditioned on captions; give one, or a list of them")
    if isinstance(prompts, TextCondition):
        return _asked_of_encoded(prompts, options, plain)
    return _asked_of_prompts(model, [prompts] if isinstance(prompts, str) else list(prompts), options, plain)


def _asked_of_classes(
    model: LoadedModel, given: Any, prompts: Any, options: SampleOptions, plain: dict[str, Any]
) -> tuple[SamplingSettings, Conditions]:
    for name, value in {"prompts": prompts, **{name: options.get(name) for name in _OF_TEXT}}.items():
        if value is not None:
            raise UserError(f"--{name} has no effect with this model, which is conditioned on classes; give labels")
    if given is None and plain.get("num") is None:
        raise UserError("--num is missing: how many images to sample, of all classes in turn; or give labels")
    every = list(range(model.num_classes)) or [0]
    labels = every if given is None else label_numbers(model, given, "labels")
    if not labels:
        raise UserError("labels is empty; give one for each image")
    if not model.num_classes and plain.get("cfg_scale", 1.0) != 1.0:
        raise UserError("--cfg-scale has no effect with this model, which was trained without classes; leave it out")
    settings = SamplingSettings("", **{"num": len(labels), **plain})
    settings.check()
    return settings, ClassLabels(labels, model.num_classes, model.names)


def _asked_of_encoded(
    captions: TextCondition, options: SampleOptions, plain: dict[str, Any]
) -> tuple[SamplingSettings, Conditions]:
    for name in ("encoder", "tokenizer"):
        if options.get(name) is not None:
            raise UserError(f"--{name} has no effect with captions that are encoded; leave it out")
    settings = SamplingSettings("", **{"num": len(captions), **plain})
    settings.check()
    negative = options.get("negative_prompt")
    if settings.cfg_scale == 1.0 and negative is not None:
        raise UserError("--negative-prompt has no effect without guidance; leave it out, or give cfg_scale above 1")
    if settings.cfg_scale != 1.0 and not (isinstance(negative, TextCondition) and len(negative) == 1):
        raise UserError(
            "--negative-prompt: to guide captions that are encoded, give an encoded one as well: "
            'encode_captions([""], ...) for the empty one'
        )
    return settings, _EncodedCaptions(captions, negative if isinstance(negative, TextCondition) else None)


def _asked_of_prompts(
    model: LoadedModel, texts: list[Any], options: SampleOptions, plain: dict[str, Any]
) -> tuple[SamplingSettings, Conditions]:
    negative: Any = options.get("negative_prompt")
    wrong = [text for text in [*texts, *([] if negative is None else [negative])] if not isinstance(text, str)]
    if wrong or not texts:
        raise UserError(f"prompts: {wrong[0]!r} is no text; give strings" if wrong else "prompts is empty; give one")
    folders: dict[str, Any] = {name: str(options[name]) for name in ("encoder", "tokenizer") if options.get(name)}
    settings = SamplingSettings("", prompt=texts[0], negative_prompt=negative, **folders, **plain)
    settings.check()
    if settings.encoder is None:
        raise UserError("--encoder is missing: the folder of the text encoder that the model was trained with")
    prompts = [Prompt(text) for text in texts]
    encoded = encode_for_model(prompts, negative, model.config, settings.encoder, settings.tokenizer, model.device)
    return settings, PromptConditions(encoded, model.config.model.text_max_length)


def _decoder(model: LoadedModel, given: str | Path | None) -> Decode:
    folder = model.config.sample.decoder if given is None else str(given)
    if folder is None and model.config.data.autoencoder is None:
        return lambda images: images
    return open_decoder(model.config, folder, "--decoder", model.device)


@contextmanager
def _in_words_of_python() -> Iterator[None]:
    """Names of options as they are here: `--cfg-scale 2` is said as `cfg_scale 2`."""
    try:
        yield
    except UserError as error:
        named = re.sub(r"(?<!\S)--([a-z]+(?:-[a-z]+)*)", lambda option: option[1].replace("-", "_"), str(error))
        raise UserError(named) from None
