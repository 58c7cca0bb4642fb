"""What the model is asked to predict, and how far off it is.

Shape legend: N images, C channels, H = W input size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_dist.config import ObjectiveConfig


class RectifiedFlow:
    """Straight paths between data and noise; the target is their velocity dz/dt.

    With `data_at_one` (DiffMoE) z_t = t x + (1 - t) e and the target is x - e; with `noise_at_one` (ProMoE, SD3)
    z_t = (1 - t) x + t e and the target is e - x. The model is given `time_scale` * t.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.time_distribution = config.time_distribution
        self.data_time = 1.0 if config.direction == "data_at_one" else 0.0
        self.time_scale = config.time_scale

    def times(self, uniform: Tensor) -> Tensor:
        """(N,) uniform numbers in (0, 1), fp64, to (N,) training times, fp32, by the inverse distribution function."""
        if self.time_distribution == "logit_normal":
            uniform = torch.special.ndtri(uniform).sigmoid()
        return uniform.float()

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy images at times t, (N, C, H, W)."""
        data_weight = (t if self.data_time == 1.0 else 1 - t)[:, None, None, None]
        return data_weight * x + (1 - data_weight) * noise

    def target(self, x: Tensor, noise: Tensor) -> Tensor:
        """The velocity dz/dt, (N, C, H, W)."""
        return x - noise if self.data_time == 1.0 else noise - x

    def loss(self, prediction: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of each image, (N,)."""
        return (prediction - self.target(x, noise)).square().flatten(1).mean(dim=1)
