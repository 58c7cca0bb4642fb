"""From a batch to the inputs of the model: in training, validation and calibration alike."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.data.batch import SMALLEST_UNIFORM, Batch
from diffmoe_dist.data.randomness import Stream, sample_generator
from diffmoe_dist.diffusion.objectives import Objective
from diffmoe_dist.model.condition import Condition


def noisy_inputs(batch: Batch, objective: Objective, config: Config) -> tuple[Tensor, Tensor, Condition]:
    """What a training step shows the model: noisy images (N, C, H, W), the objective's times (N,), the condition."""
    t = objective.times(batch.time_uniform)
    z = objective.corrupt(batch.images, batch.noise, t)
    dropped = batch.drop_uniform < config.train.label_dropout
    if config.model.condition == "class":
        return z, t, torch.where(dropped, config.model.num_classes, batch.labels)
    assert batch.text is not None and batch.null_text is not None
    return z, t, batch.text.replaced(dropped, batch.null_text)


def with_one_time(batch: Batch, seed: int, images_seen: int) -> Batch:
    """The batch with the time of the step after `images_seen` for each of its images."""
    uniform = max(sample_generator(seed, Stream.STEP_TIME, 0, images_seen).random(), SMALLEST_UNIFORM)
    return replace(batch, time_uniform=torch.full_like(batch.time_uniform, uniform))
