"""The images that a page shows, and what their tokens did, sampled for it in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.data.class_names import ClassNames
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.open import open_data
from diffmoe_dist.data.stream import StreamedData
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.checkpoint import read_checkpoint_model
from diffmoe_dist.engine.ema import stored_average
from diffmoe_dist.engine.weights import read_class_names, read_settings
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import read_json_object
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.precision import set_weight_type, tf32_products
from diffmoe_dist.sampling.calibration import recalibrate_on_training_data
from diffmoe_dist.sampling.conditions import Conditions, job_classes, job_prompts, open_conditions, run_conditions
from diffmoe_dist.sampling.generate import generate, to_uint8
from diffmoe_dist.sampling.job import AS_BEFORE_0_2, describe_job, sampler_of
from diffmoe_dist.sampling.model import weights_fingerprint
from diffmoe_dist.sampling.routing_trace import RoutingTrace, recorded
from diffmoe_dist.sampling.settings import SamplingSettings

Data = TrainingData | StreamedData


@dataclass(frozen=True)
class FinishedSamples:
    """A folder that `sample` has finished; a page samples its first images once more, by the same settings."""

    folder: Path
    job: dict[str, Any]  # its sampling.json
    num: int  # of the images, at most as many as the folder has
    encoder: str | None = None  # the folder of the text encoder, for prompts
    tokenizer: str | None = None  # and of its tokenizer, where it lies elsewhere

    @staticmethod
    def open(folder: Path, num: int, encoder: str | None = None, tokenizer: str | None = None) -> FinishedSamples:
        """Read the folder's sampling.json.

        Raises:
            UserError: there is none.
        """
        try:
            job = AS_BEFORE_0_2 | read_json_object(folder / "sampling.json")
            if not {"weights", "overrides"} <= job.keys():
                raise ValueError("a setting is missing")
            if not all(isinstance(job.get(name), (float, int, type(None))) for name in ("ema_decay", "ema_length")):
                raise ValueError("an average has a number")
        except (OSError, ValueError):
            raise UserError(
                f"--samples {folder}: no readable sampling.json there; give a folder that diffmoe_dist.sample finished"
            ) from None
        return FinishedSamples(folder, job, num, encoder, tokenizer)

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(self.job["overrides"])

    @property
    def recalibrate(self) -> int:
        return int(self.job.get("recalibrate", 0))

    @property
    def ema_decay(self) -> float | None:
        return self.job.get("ema_decay")

    @property
    def ema_length(self) -> float | None:
        return self.job.get("ema_length")

    @property
    def precision(self) -> str:
        return str(self.job["precision"])


@dataclass(frozen=True)
class PageSamples:
    """Images and their routing."""

    images_NHWC: np.ndarray  # uint8
    conditions: Conditions
    settings: dict[str, Any]  # how they were sampled, for people
    trace: RoutingTrace | None  # None: no experts

    @property
    def labels(self) -> list[int]:
        return [self.conditions.label(number) for number in range(len(self.images_NHWC))]


def sample_for_page(checkpoint: Path, asked: SamplingSettings | FinishedSamples, device: torch.device) -> PageSamples:
    """Sample with the averaged weights of a checkpoint, and trace the routing.

    Raises:
        UserError: the samples are of other weights, or a setting is not for this model.
    """
    precision = [] if asked.precision is None else [f"precision={asked.precision}"]
    kind = stored_average(read_settings(checkpoint).ema, asked.ema_decay, asked.ema_length)
    model, config = read_checkpoint_model(checkpoint, device, kind, [*asked.overrides, *precision])
    weights = weights_fingerprint(model, is_sharded=False)
    if isinstance(asked, FinishedSamples) and asked.job["weights"] != weights:
        raise UserError(f"--samples {asked.folder}: they are of other weights than {checkpoint}; give samples of those")
    data = open_data(config, device) if asked.recalibrate or _wants_captions(asked, config) else None
    conditions = _conditions(asked, config, data, device, read_class_names(checkpoint))
    job = asked.job if isinstance(asked, FinishedSamples) else describe_job(asked, config, weights, conditions)
    set_weight_type(model, config.precision)
    with tf32_products(device, job["tf32"]):
        if data is not None and asked.recalibrate:
            recalibrate_on_training_data(model, config, data, asked.recalibrate, job["batch_size"])
        images, trace = _sample(model, config, conditions, job, min(asked.num or job["num"], job["num"]))
    return PageSamples(_visible(images), conditions, _settings_table(job), trace)


def _sample(
    model: DiT, config: Config, conditions: Conditions, job: dict[str, Any], num: int
) -> tuple[Tensor, RoutingTrace | None]:
    """The first `num` images of a job, (N, C, H, W), and their routing."""
    objective, numbers, settings = build_objective(config), list(range(num)), sampler_of(job)
    trace = None
    if model.moe_layers:
        with recorded(model, objective) as recorder:
            sampled = generate(model, objective, numbers, conditions, settings, recorder)
        trace = recorder.trace()
    else:
        sampled = generate(model, objective, numbers, conditions, settings)
    if sampled.non_finite is not None:  # they would be black images
        raise FloatingPointError(f"report: {sampled.non_finite}; do the weights come from a run that diverged?")
    return sampled.images, trace


def _wants_captions(asked: SamplingSettings | FinishedSamples, config: Config) -> bool:
    """Whether the images are conditioned on captions of the training data: text, and prompts are not to be had."""
    if config.model.condition != "text":
        return False
    if isinstance(asked, FinishedSamples):
        return asked.encoder is None
    return all(value is None for value in (asked.prompts, asked.prompt, asked.labels, asked.classes))


def _conditions(
    asked: SamplingSettings | FinishedSamples,
    config: Config,
    data: Data | None,
    device: torch.device,
    names: ClassNames,
) -> Conditions:
    if _wants_captions(asked, config):
        return run_conditions(config, data)
    if isinstance(asked, SamplingSettings):
        encoders = data.encoders if isinstance(data, TrainingData) else None
        return open_conditions(asked, config, device, encoders.text if encoders else None, names)
    if asked.encoder is None:
        return job_classes(asked.job, config, names)
    if "prompts" not in asked.job:
        raise UserError(f"--encoder {asked.encoder}: the samples are not conditioned on prompts; remove it")
    return job_prompts(asked.folder, asked.job, config, asked.encoder, asked.tokenizer, device)


def _settings_table(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "sampler": job["sampler"],
        "steps": "its own" if job["steps"] is None else job["steps"],
        "CFG scale": job["cfg_scale"],
        "inference rule": job["inference"] or "none",
        "seed": job["seed"],
        "precision": job["precision"] + (", TF32" if job["tf32"] else ""),
        "thresholds": "recalibrated for the averaged weights" if job["recalibrate"] else "as trained",
    }


def _visible(images: Tensor) -> np.ndarray:
    """Pixels as they are; of latents the first three channels, each from its darkest to its brightest value."""
    if images.shape[1] in (1, 3):
        return to_uint8(images)
    images = images[:, :3]
    low, high = images.amin(dim=(0, 2, 3), keepdim=True), images.amax(dim=(0, 2, 3), keepdim=True)
    return to_uint8(2 * (images - low) / (high - low).clamp_min(1e-9) - 1)
