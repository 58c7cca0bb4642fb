"""From noise to images: samplers are functions of a denoiser, any callable (z, t) -> prediction.

Shape legend: N images, C channels, H = W input size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffmoe_dist.diffusion.objectives import RectifiedFlow

Denoiser = Callable[[Tensor, Tensor], Tensor]


def sample_euler(denoise: Denoiser, noise: Tensor, objective: RectifiedFlow, steps: int) -> Tensor:
    """Follow the flow from noise to data with `steps` equal Euler steps.

    Args:
        denoise: given z (N, C, H, W) and the unscaled times (N,), the velocity dz/dt.
        noise: (N, C, H, W) standard normal.
    """
    times = torch.linspace(1 - objective.data_time, objective.data_time, steps + 1, dtype=torch.float64).tolist()
    z = noise
    for now, after in zip(times, times[1:], strict=False):
        z = z + (after - now) * denoise(z, torch.full((len(z),), now, device=z.device))
    return z


def with_guidance(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor, null_label: int, scale: float
) -> Denoiser:
    """Classifier-free guidance over all channels: null + scale * (conditional - null).

    Two passes, so that a token pool never mixes conditional and null tokens; one where scale is 1.
    """
    if scale == 1.0:
        return lambda z, t: denoise(z, t, labels)
    nulls = torch.full_like(labels, null_label)

    def guided(z: Tensor, t: Tensor) -> Tensor:
        unconditional = denoise(z, t, nulls)
        return unconditional + scale * (denoise(z, t, labels) - unconditional)

    return guided
