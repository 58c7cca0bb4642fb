"""From noise to images: samplers are functions of a denoiser, any callable (z, t) -> (prediction, variance).

Shape legend: N images, C channels, H = W input size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffmoe_dist.diffusion.objectives import DDPM_SCHEDULE, Objective, RectifiedFlow

Prediction = tuple[Tensor, Tensor | None]  # the objective's target and, where the objective learns one, the variance
Denoiser = Callable[[Tensor, Tensor], Prediction]

# The objective each sampler is for; the first of an objective is its default.
SAMPLERS = {"euler": "flow", "ddpm": "ddpm", "ddim": "ddpm"}


def sample(
    name: str,
    denoise: Denoiser,
    noise: Tensor,
    objective: Objective,
    steps: int,
    generators: list[torch.Generator],
) -> Tensor:
    """Draw images with the sampler of `SAMPLERS` with this name.

    Args:
        denoise: given z (N, C, H, W) and the objective's times (N,), its target and the variance, (N, C, H, W) each.
        noise: (N, C, H, W) standard normal, where the images start.
        generators: one for each image, of the noise that a sampler adds on the way; only `ddpm` adds any.
    """
    if name == "euler":
        assert isinstance(objective, RectifiedFlow)
        return sample_euler(denoise, noise, objective, steps)
    if name == "ddpm":
        return sample_ddpm(denoise, noise, steps, generators)
    assert name == "ddim", name
    return sample_ddim(denoise, noise, steps)


def sample_euler(denoise: Denoiser, noise: Tensor, objective: RectifiedFlow, steps: int) -> Tensor:
    """Follow the flow from noise to data with `steps` equal Euler steps.

    Args:
        denoise: given z (N, C, H, W) and the unscaled times (N,), the velocity dz/dt.
        noise: (N, C, H, W) standard normal.
    """
    times = torch.linspace(1 - objective.data_time, objective.data_time, steps + 1, dtype=torch.float64).tolist()
    z = noise
    for now, after in zip(times, times[1:], strict=False):
        velocity, _ = denoise(z, torch.full((len(z),), now, device=z.device))
        z = z + (after - now) * velocity
    return z


def sample_ddpm(denoise: Denoiser, noise: Tensor, steps: int, generators: list[torch.Generator]) -> Tensor:
    """Walk back along `steps` of the 1000 times, evenly spread from the last to the first, with the learned variance.

    The chosen times form a chain of their own (IDDPM, section 4): its betas, between which the variance is
    interpolated, are those of the longer steps. Predicted images are not clipped: latents have no range.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # takes seconds to import

    scheduler = DDPMScheduler(
        **DDPM_SCHEDULE, variance_type="learned_range", timestep_spacing="linspace", clip_sample=False
    )
    scheduler.set_timesteps(steps)
    z = noise
    for t in scheduler.timesteps.tolist():
        epsilon, variance = denoise(z, torch.full((len(z),), t, device=z.device))
        assert variance is not None
        z = scheduler.step(torch.cat([epsilon, variance], dim=1), t, z, generator=generators).prev_sample
    return z


def sample_ddim(denoise: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """Walk back without adding noise (DDIM, Song et al. 2021, eq. 12 with eta = 0); `steps` divides 1000.

    The times are 0, s, 2 s, ... with s = 1000 / steps, as published. diffusers' step back is by 1000 // steps
    whatever the spacing, which is right for these alone.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # takes seconds to import

    scheduler = DDIMScheduler(**DDPM_SCHEDULE, timestep_spacing="leading", clip_sample=False)
    scheduler.set_timesteps(steps)
    z = noise
    for t in scheduler.timesteps.tolist():
        epsilon, _ = denoise(z, torch.full((len(z),), t, device=z.device))
        z = scheduler.step(epsilon, t, z).prev_sample
    return z


def with_guidance(
    denoise: Callable[[Tensor, Tensor, Tensor], Prediction], labels: Tensor, null_label: int, scale: float
) -> Denoiser:
    """Classifier-free guidance over all channels of the target: null + scale * (conditional - null).

    Two passes, so that a token pool never mixes conditional and null tokens; one where scale is 1. The variance is the
    conditional pass's: it is a fraction of a range, which nothing may be extrapolated from. (The published DDPM
    sampling takes it there too, but has both in one batch and guides three of the four channels.)
    """
    if scale == 1.0:
        return lambda z, t: denoise(z, t, labels)
    nulls = torch.full_like(labels, null_label)

    def guided(z: Tensor, t: Tensor) -> Prediction:
        unconditional, _ = denoise(z, t, nulls)
        conditional, variance = denoise(z, t, labels)
        return unconditional + scale * (conditional - unconditional), variance

    return guided
