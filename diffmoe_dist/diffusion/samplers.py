"""From noise to images: samplers are functions of a denoiser, any callable (z, t) -> (prediction, variance).

Shape legend: N images, C channels, H = W input size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from diffmoe_dist.diffusion.objectives import DDPM_SCHEDULE, Objective, RectifiedFlow

Prediction = tuple[Tensor, Tensor | None]  # the objective's target and, where the objective learns one, the variance
Denoiser = Callable[[Tensor, Tensor], Prediction]
Y = TypeVar("Y")  # what a model is told about images, of which samplers know nothing

# The objective each sampler is for; the first of an objective is its default.
SAMPLERS = {
    "euler": "flow", "heun": "flow", "dopri5": "flow", "ddpm": "ddpm", "ddim": "ddpm", "dpm-solver++": "ddpm",
}  # fmt: skip
ADAPTIVE = "dopri5"  # takes as many steps as its tolerances need
RTOL, ATOL = 1e-3, 1e-6  # of the adaptive sampler, those of SiT


def sample(
    name: str,
    denoise: Denoiser,
    noise: Tensor,
    objective: Objective,
    steps: int | None,
    generators: list[torch.Generator],
) -> Tensor:
    """Draw images with the sampler of `SAMPLERS` with this name.

    Args:
        denoise: given z (N, C, H, W) and the objective's times (N,), its target and the variance, (N, C, H, W) each.
        noise: (N, C, H, W) standard normal, where the images start.
        steps: None for the adaptive sampler.
        generators: one for each image, of the noise that a sampler adds on the way; only `ddpm` adds any.
    """
    if name == ADAPTIVE:
        assert steps is None and isinstance(objective, RectifiedFlow)
        return sample_dopri5(denoise, noise, objective)
    assert steps is not None
    if name in ("euler", "heun"):
        assert isinstance(objective, RectifiedFlow)
        follow = sample_euler if name == "euler" else sample_heun
        return follow(denoise, noise, objective, steps)
    if name == "ddpm":
        return sample_ddpm(denoise, noise, steps, generators)
    if name == "ddim":
        return sample_ddim(denoise, noise, steps)
    assert name == "dpm-solver++", name
    return sample_dpm_solver(denoise, noise, steps)


def sample_euler(denoise: Denoiser, noise: Tensor, objective: RectifiedFlow, steps: int) -> Tensor:
    """Follow the flow from noise to data with `steps` equal Euler steps.

    Args:
        denoise: given z (N, C, H, W) and the unscaled times (N,), the velocity dz/dt.
        noise: (N, C, H, W) standard normal.
    """
    z = noise
    for now, after in _flow_steps(objective, steps):
        velocity, _ = denoise(z, torch.full((len(z),), now, device=z.device))
        z = z + (after - now) * velocity
    return z


def sample_heun(denoise: Denoiser, noise: Tensor, objective: RectifiedFlow, steps: int) -> Tensor:
    """Follow the flow with `steps` equal steps of Heun's second-order method: two evaluations a step.

    Every step goes by the mean of the velocities at its two ends, the last one too, so 125 steps are the 250
    evaluations of the published comparison.
    """
    z = noise
    for now, after in _flow_steps(objective, steps):
        here, _ = denoise(z, torch.full((len(z),), now, device=z.device))
        there, _ = denoise(z + (after - now) * here, torch.full((len(z),), after, device=z.device))
        z = z + (after - now) * (here + there) / 2
    return z


def sample_dopri5(denoise: Denoiser, noise: Tensor, objective: RectifiedFlow) -> Tensor:
    """Follow the flow with the adaptive Runge-Kutta method of Dormand and Prince, tolerances `RTOL` and `ATOL`.

    The images of a batch share their steps, so that an image depends, within the tolerances, on its batch.
    """
    from torchdiffeq import odeint  # brings scipy along

    def velocity(t: Tensor, z: Tensor) -> Tensor:
        return denoise(z, t.float().expand(len(z)))[0]

    times = torch.tensor([1 - objective.data_time, objective.data_time], device=noise.device)
    # A step ends on the last time: left to itself it goes beyond, where no model was trained, and interpolates back.
    options = {"step_t": times[1:]}
    return odeint(velocity, noise, times, rtol=RTOL, atol=ATOL, method="dopri5", options=options)[-1]


def _flow_steps(objective: RectifiedFlow, steps: int) -> list[tuple[float, float]]:
    """The start and the end of each of `steps` equal steps from noise to data."""
    times = torch.linspace(1 - objective.data_time, objective.data_time, steps + 1, dtype=torch.float64).tolist()
    return list(itertools.pairwise(times))


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


def sample_dpm_solver(denoise: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """Walk back with DPM-Solver++ of second order, multistep (Lu et al. 2022, Alg. 2); one evaluation a step.

    The last step, to no noise at all, is of first order, and so are all steps where there are few of them, as diffusers
    has it. The learned variance is not used: the solver follows the flow that adds no noise.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler  # takes seconds

    scheduler = DPMSolverMultistepScheduler(**DDPM_SCHEDULE, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    z = noise
    for t in scheduler.timesteps.tolist():
        epsilon, _ = denoise(z, torch.full((len(z),), t, device=z.device))
        z = scheduler.step(epsilon, t, z).prev_sample
    return z


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: null + scale * (conditional - null)."""

    scale: float = 1.0  # 1: the conditional prediction alone
    channels: int | None = None  # the first so many are guided, the others conditional; None: all
    interval: tuple[float, float] | None = None  # the objective's times at which there is guidance; None: at all
    one_pass: bool = False  # conditional and null tokens in one batch, where pools mix them

    @property
    def active(self) -> bool:
        return self.scale != 1.0


def with_guidance(
    denoise: Callable[[Tensor, Tensor, Y], Prediction], given: Y, null: Y, both: Callable[[], Y], guidance: Guidance
) -> Denoiser:
    """A denoiser of images with the condition `given` that guides as `guidance` says.

    Args:
        denoise: (images, times, conditions) to a prediction.
        null: what guidance moves away from, as many conditions as `given`.
        both: makes `given` and then `null` into one, for one pass.

    Two passes by default, so that a token pool never mixes conditional and null tokens; one where there is no guidance.
    The variance is the conditional pass's: it is a fraction of a range, which nothing may be extrapolated from. (The
    published DDPM sampling takes it there too, but has both in one batch and guides three of the four channels.)
    """

    def predictions(z: Tensor, t: Tensor) -> tuple[Prediction, Tensor]:
        """The conditional prediction with its variance, and the null prediction."""
        if not guidance.one_pass:
            unconditional, _ = denoise(z, t, null)
            return denoise(z, t, given), unconditional
        prediction, variance = denoise(torch.cat([z, z]), torch.cat([t, t]), both())
        conditional, unconditional = prediction.chunk(2)
        return (conditional, None if variance is None else variance.chunk(2)[0]), unconditional

    def guided(z: Tensor, t: Tensor) -> Prediction:
        if not _guides_at(guidance, t):
            return denoise(z, t, given)
        (conditional, variance), unconditional = predictions(z, t)
        prediction = unconditional + guidance.scale * (conditional - unconditional)
        if guidance.channels is not None:
            prediction = torch.cat([prediction[:, : guidance.channels], conditional[:, guidance.channels :]], dim=1)
        return prediction, variance

    return guided


def _guides_at(guidance: Guidance, t: Tensor) -> bool:
    """Whether there is guidance at the time that all images are at."""
    if guidance.active and guidance.interval is not None:
        begin, end = guidance.interval
        return bool((t[0] >= begin) & (t[0] <= end))  # compared in the precision of t
    return guidance.active
