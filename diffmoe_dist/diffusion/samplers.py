"""Samplers, from noise to images, and classifier-free guidance (CFG).

A sampler calls a denoiser, any callable (z, t) -> (prediction, variance). The times t (N,) are all the same, and on the
host but for those of the adaptive sampler: to compare them waits for no device. `with_guidance` makes a denoiser that
guides; its one or two forward passes of the model count as one function evaluation (NFE).

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
Y = TypeVar("Y")  # what a model is conditioned on; samplers do not look at it

# The objective each sampler is for; the first of an objective is its default.
SAMPLERS = {
    "euler": "flow",
    "heun": "flow",
    "dopri5": "flow",
    "ddpm": "ddpm",
    "ddim": "ddpm",
    "dpm-solver++": "ddpm",
}
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
    """Sample images with the sampler of this name, a key of `SAMPLERS`.

    Args:
        denoise: maps z (N, C, H, W) and the objective's times (N,) to its target and the variance, (N, C, H, W) each.
        noise: (N, C, H, W) standard normal, where the images start.
        steps: None for the adaptive sampler.
        generators: one for each image, of the noise that a sampler adds at each step; only `ddpm` adds any.

    Returns:
        (N, C, H, W).
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
        denoise: maps z (N, C, H, W) and the unscaled times (N,) to the velocity dz/dt.
        noise: (N, C, H, W) standard normal.
    """
    z = noise
    for now, after in _flow_steps(objective, steps):
        velocity, _ = denoise(z, torch.full((len(z),), now))
        z = z + (after - now) * velocity
    return z


def sample_heun(denoise: Denoiser, noise: Tensor, objective: RectifiedFlow, steps: int) -> Tensor:
    """Follow the flow with `steps` equal steps of Heun's second-order method: NFE is 2 * `steps`.

    Every step, also the last, takes the mean of the velocities at its two ends. The 250 NFE of the published comparison
    are 125 steps.
    """
    z = noise
    for now, after in _flow_steps(objective, steps):
        here, _ = denoise(z, torch.full((len(z),), now))
        there, _ = denoise(z + (after - now) * here, torch.full((len(z),), after))
        z = z + (after - now) * (here + there) / 2
    return z


def sample_dopri5(denoise: Denoiser, noise: Tensor, objective: RectifiedFlow) -> Tensor:
    """Follow the flow with the adaptive Runge-Kutta method of Dormand and Prince, tolerances `RTOL` and `ATOL`.

    All images of a batch take the same steps, so an image depends, within the tolerances, on its batch.
    """
    from torchdiffeq import odeint  # brings scipy along

    def velocity(t: Tensor, z: Tensor) -> Tensor:
        return denoise(z, t.float().expand(len(z)))[0]

    times = torch.tensor([1 - objective.data_time, objective.data_time], device=noise.device)
    # A step ends on the last time: left to itself it goes beyond, where no model was trained, and interpolates back.
    options = {"step_t": times[1:]}
    states: Tensor = odeint(velocity, noise, times, rtol=RTOL, atol=ATOL, method="dopri5", options=options)
    return states[-1]


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
        epsilon, variance = denoise(z, torch.full((len(z),), t))
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
        epsilon, _ = denoise(z, torch.full((len(z),), t))
        z = scheduler.step(epsilon, t, z).prev_sample
    return z


def sample_dpm_solver(denoise: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """Walk back with DPM-Solver++ of second order, multistep (Lu et al. 2022, Alg. 2); NFE is `steps`.

    The last step, to no noise at all, is of first order, and so are all steps where there are few of them, as diffusers
    has it. The solver follows the flow that adds no noise, and so the learned variance is not used.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler  # takes seconds

    scheduler = DPMSolverMultistepScheduler(**DDPM_SCHEDULE, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    z = noise
    for t in scheduler.timesteps.tolist():
        epsilon, _ = denoise(z, torch.full((len(z),), t))
        z = scheduler.step(epsilon, t, z).prev_sample
    return z


def filled_in(t: Tensor, device: torch.device) -> Tensor:
    """A sampler's times on the device of the images, without a copy."""
    return t if t.device == device else torch.full(t.shape, t[0].item(), dtype=t.dtype, device=device)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): unconditional + scale * (conditional - unconditional)."""

    scale: float = 1.0  # 1: the conditional prediction alone
    channels: int | None = None  # how many channels, from the first on, are guided; the others: conditional; None: all
    interval: tuple[float, float] | None = None  # the objective's times, ends included, with guidance; None: all times
    one_pass: bool = False  # conditional and unconditional images in one batch, so token pools mix them

    @property
    def active(self) -> bool:
        return self.scale != 1.0


def with_guidance(
    denoise: Callable[[Tensor, Tensor, Y], Prediction],
    conditional: Y,
    unconditional: Y,
    both: Callable[[], Y],
    guidance: Guidance,
) -> Denoiser:
    """A denoiser of images with the conditions `conditional` that guides as `guidance` says.

    There are two forward passes by default, so that a token pool never mixes conditional and unconditional tokens, and
    one where there is no guidance. The variance is that of the conditional pass: it is a fraction of a range, from
    which nothing may be extrapolated. (The published DDPM sampling takes it there too, but has both in one batch and
    guides three of the four channels.)

    Args:
        denoise: maps images (N, C, H, W), times (N,) and N conditions to a prediction.
        unconditional: N conditions, the null label or caption.
        both: returns the 2 N conditions, first `conditional` and then `unconditional`; for guidance in one pass.
    """

    def predictions(z: Tensor, t: Tensor) -> tuple[Prediction, Tensor]:
        """The conditional prediction with its variance, and the unconditional prediction."""
        if not guidance.one_pass:
            without, _ = denoise(z, t, unconditional)
            return denoise(z, t, conditional), without
        prediction, variance = denoise(torch.cat([z, z]), torch.cat([t, t]), both())
        with_condition, without = prediction.chunk(2)
        return (with_condition, None if variance is None else variance.chunk(2)[0]), without

    def guided(z: Tensor, t: Tensor) -> Prediction:
        if not _guides_at(guidance, t):
            return denoise(z, t, conditional)
        (with_condition, variance), without = predictions(z, t)
        prediction = without + guidance.scale * (with_condition - without)
        if guidance.channels is not None:
            prediction = torch.cat([prediction[:, : guidance.channels], with_condition[:, guidance.channels :]], dim=1)
        return prediction, variance

    return guided


def _guides_at(guidance: Guidance, t: Tensor) -> bool:
    """Whether there is guidance at the time that all images are at."""
    if guidance.active and guidance.interval is not None:
        begin, end = guidance.interval
        return bool((t[0] >= begin) & (t[0] <= end))  # compared in the precision of t
    return guidance.active
