"""A micro-batch: images or latents and, with each, the random numbers that training needs for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.model.condition import TextCondition

SMALLEST_UNIFORM = 2.0**-54  # stands in for 0.0, which one number in 2**53 is


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples on one rank. Images are what the model is given: pixels, or latents."""

    images: Tensor  # (B, C, H, W) fp32; pixels in [-1, 1]
    labels: Tensor  # (B,) int64
    noise: Tensor  # (B, C, H, W) fp32, standard normal
    time_uniform: Tensor  # (B,) fp64 in (0, 1): what the objective turns into a time
    drop_uniform: Tensor  # (B,) fp64 in [0, 1): the label is dropped below the drop probability
    sample_ids: Tensor  # (B,) int64, of the place in the order, also where another sample stands in
    epochs: Tensor  # (B,) int64
    bad: Tensor  # (B,) int64: how many samples that do not decode were passed over in this place
    text: TextCondition | None = None
    null_text: TextCondition | None = None  # one row: what a dropped caption becomes
    # What is not encoded yet, where that is done as it is read; `images` are pixels then.
    latent_noise: Tensor | None = None  # (B, C, h, w) fp32, standard normal, of the autoencoder's posterior
    captions: tuple[str, ...] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; from pinned memory without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the DataLoader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def mapped(value: Any) -> Any:
            if isinstance(value, TextCondition):
                return value.map(function)
            return function(value) if isinstance(value, Tensor) else value

        return Batch(**{field.name: mapped(getattr(self, field.name)) for field in dataclasses.fields(self)})


class BatchBuffer:
    """The arrays of a batch, filled row by row."""

    def __init__(
        self, count: int, channels: int, image_size: int, latent_CHW: tuple[int, int, int] | None = None
    ) -> None:
        self.images = np.empty((count, channels, image_size, image_size), dtype=np.float32)
        self.noise = np.empty((count, *(latent_CHW or self.images.shape[1:])), dtype=np.float32)
        self.latent_noise = None if latent_CHW is None else np.empty_like(self.noise)
        self.uniforms = np.empty((3, count))  # time, drop, flip
        self.labels, self.sample_ids, self.epochs, self.bad = np.empty((4, count), dtype=np.int64)

    def fill_random(self, row: int, generator: np.random.Generator) -> None:
        """The random numbers that come first, in this order. A new one goes after them."""
        self.uniforms[:, row] = generator.random(3)
        generator.standard_normal(dtype=np.float32, out=self.noise[row])

    def flips(self, row: int) -> bool:
        return bool(self.uniforms[2, row] < 0.5)

    def batch(
        self,
        text: TextCondition | None = None,
        null_text: TextCondition | None = None,
        captions: tuple[str, ...] | None = None,
    ) -> Batch:
        return Batch(
            images=torch.from_numpy(self.images),
            labels=torch.from_numpy(self.labels),
            noise=torch.from_numpy(self.noise),
            time_uniform=torch.from_numpy(np.maximum(self.uniforms[0], SMALLEST_UNIFORM)),
            drop_uniform=torch.from_numpy(self.uniforms[1]),
            sample_ids=torch.from_numpy(self.sample_ids),
            epochs=torch.from_numpy(self.epochs),
            bad=torch.from_numpy(self.bad),
            text=text,
            null_text=null_text,
            latent_noise=None if self.latent_noise is None else torch.from_numpy(self.latent_noise),
            captions=captions,
        )
