"""Samplers, from noise to images, and classifier-free guidance (CFG).

A sampler calls a denoiser, any callable (z, t) -> (prediction, variance). The times t (N,) are all the same, and on the
host but for those of torchdiffeq's samplers: to compare them waits for no device. `with_guidance` makes a denoiser that
guides; its one or two forward passes of the model count as one function evaluation (NFE).

Shape legend: N images, C channels, H = W input size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffmoe_dist.diffusion.objectives import DDPM_SCHEDULE, DDPM_STEPS, Objective, RectifiedFlow

Prediction = tuple[Tensor, Tensor | None]  # the objective's target and, where the objective learns one, the variance
Denoiser = Callable[[Tensor, Tensor], Prediction]
Y = TypeVar("Y")  # what a model is conditioned on; samplers do not look at it

# Those of torchdiffeq, by its names: on a grid of equal steps, and adaptive ones, which take as many as their
# tolerances need. Its `euler` is the one here, its `heun2` the `heun`.
ADAMS = ("explicit_adams", "implicit_adams")  # whose coefficients are those of equal steps
FIXED_GRID = ("midpoint", "heun2", "heun3", "rk4", *ADAMS)
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
# Of these the images of a batch decide together how often they are evaluated.
JOINT = (*ADAPTIVE, "implicit_adams")
# The objective each sampler is for; the first of an objective is its default.
SAMPLERS = {
    **dict.fromkeys(("euler", "heun", "sde", *FIXED_GRID, *ADAPTIVE), "flow"),
    **dict.fromkeys(("ddpm", "ddim", "dpm-solver++"), "ddpm"),
}
# torchdiffeq's `max_order`; its explicit method is of one order less. Its default of 12 multiplies rounding:
# docs/log.md has what comes out.
ADAMS_ORDER = 4
RTOL, ATOL = 1e-3, 1e-6  # of torchdiffeq's, those of SiT
LAST_SDE_STEP = 0.04  # of the way from noise to data (SiT)


def sample(
    name: str,
    denoise: Denoiser,
    noise: Tensor,
    objective: Objective,
    steps: int | None,
    generators: list[torch.Generator],
    time_shift: float = 1.0,
) -> Tensor:
    """Sample images with the sampler of this name, a key of `SAMPLERS`.

    Args:
        denoise: maps z (N, C, H, W) and the objective's times (N,) to its target and the variance, (N, C, H, W) each.
        noise: (N, C, H, W) standard normal, where the images start.
        steps: None for the adaptive samplers.
        generators: one for each image, of the noise that a sampler adds at each step; only `ddpm` and `sde` add any.
        time_shift: of a flow's steps, which are equal before `RectifiedFlow.shifted`; 1 for the adaptive samplers, and
            for `ADAMS`, which a shift takes to order 2.

    Returns:
        (N, C, H, W).
    """
    if isinstance(objective, RectifiedFlow):
        if name in ADAPTIVE:
            assert steps is None and time_shift == 1.0
            return sample_adaptive(name, denoise, noise, objective)
        assert steps is not None
        if name == "sde":
            return sample_sde(denoise, noise, flow_times(objective, steps, time_shift, LAST_SDE_STEP), generators)
        times = flow_times(objective, steps, time_shift)
        if name in FIXED_GRID:
            return sample_fixed_grid(name, denoise, noise, times)
        return {"euler": sample_euler, "heun": sample_heun}[name](denoise, noise, times)
    assert steps is not None
    if name == "ddpm":
        return sample_ddpm(denoise, noise, steps, generators, objective.learned_variance)
    return {"ddim": sample_ddim, "dpm-solver++": sample_dpm_solver}[name](denoise, noise, steps)


def flow_times(
    objective: RectifiedFlow, steps: int, time_shift: float = 1.0, last_step: float | None = None
) -> list[float]:
    """The times, from noise to data, of equal steps that are then shifted; the last one may have its own length."""
    data = objective.data_time
    if last_step is None:
        times = torch.linspace(1 - data, data, steps + 1, dtype=torch.float64)
    else:
        before = data + (1 - 2 * data) * last_step
        times = torch.linspace(1 - data, before, steps, dtype=torch.float64)
        times = torch.cat([times, times.new_tensor([data])])
    return [float(t) for t in objective.shifted(times, time_shift)]


def sample_euler(denoise: Denoiser, noise: Tensor, times: list[float]) -> Tensor:
    """Follow the flow from noise to data with an Euler step from each time to the next.

    Args:
        denoise: maps z (N, C, H, W) and the unscaled times (N,) to the velocity dz/dt.
        noise: (N, C, H, W) standard normal.
    """
    z = noise
    for now, after in itertools.pairwise(times):
        velocity, _ = denoise(z, torch.full((len(z),), now))
        z = z + (after - now) * velocity
    return z


def sample_heun(denoise: Denoiser, noise: Tensor, times: list[float]) -> Tensor:
    """Follow the flow with steps of Heun's second-order method: NFE is twice their number.

    Every step, also the last, takes the mean of the velocities at its two ends. The 250 NFE of the published comparison
    are 125 steps.
    """
    z = noise
    for now, after in itertools.pairwise(times):
        here, _ = denoise(z, torch.full((len(z),), now))
        there, _ = denoise(z + (after - now) * here, torch.full((len(z),), after))
        z = z + (after - now) * (here + there) / 2
    return z


def sample_sde(denoise: Denoiser, noise: Tensor, times: list[float], generators: list[torch.Generator]) -> Tensor:
    """Follow SiT's stochastic flow by Euler and Maruyama's method; the last step adds no noise. NFE is the steps.

    With d the weight of the data and v the velocity dz/dd, the score is (d v - z) / (1 - d). SiT's `sigma` diffusion,
    w = 2 (1 - d), makes of the flow dz = (v + w / 2 score) dd + sqrt(w) dW, which has the same marginals: its drift
    is (1 + d) v - z.
    """
    sign = 1 if times[-1] == 1.0 else -1
    z = noise
    for now, after in itertools.pairwise(times):
        velocity, _ = denoise(z, torch.full((len(z),), now))
        data = now if sign == 1 else 1 - now
        length = abs(after - now)
        z = z + length * ((1 + data) * sign * velocity - z)
        if after != times[-1]:
            added = torch.stack([torch.randn(z.shape[1:], generator=generator) for generator in generators])
            z = z + math.sqrt(2 * (1 - data) * length) * added.to(z)
    return z


def sample_adaptive(name: str, denoise: Denoiser, noise: Tensor, objective: RectifiedFlow) -> Tensor:
    """Follow the flow with an adaptive Runge-Kutta method of torchdiffeq, tolerances `RTOL` and `ATOL`.

    All images of a batch take the same steps, so an image depends, within the tolerances, on its batch.
    """
    times = torch.tensor([1 - objective.data_time, objective.data_time], device=noise.device)
    # A step ends on the last time: left to itself it goes beyond, where no model was trained, and interpolates back.
    return _odeint(name, denoise, noise, times, {"step_t": times[1:]})


def sample_fixed_grid(name: str, denoise: Denoiser, noise: Tensor, times: list[float]) -> Tensor:
    """Follow the flow with a method of torchdiffeq that steps from each time to the next.

    `implicit_adams` repeats a step, up to four times, until all images of the batch keep `RTOL` and `ATOL`.
    """
    grid, ends = (torch.tensor(values, device=noise.device) for values in (times, [times[0], times[-1]]))
    # With the grid in the place of the times every state on it would be kept.
    options: dict[str, Any] = {"grid_constructor": lambda f, z, t: grid}
    if name in ADAMS:
        options["max_order"] = ADAMS_ORDER
    return _odeint(name, denoise, noise, ends, options)


def _odeint(name: str, denoise: Denoiser, noise: Tensor, ends: Tensor, options: dict[str, Any]) -> Tensor:
    from torchdiffeq import odeint  # brings scipy along

    def velocity(t: Tensor, z: Tensor) -> Tensor:
        return denoise(z, t.float().expand(len(z)))[0]

    states: Tensor = odeint(velocity, noise, ends, rtol=RTOL, atol=ATOL, method=name, options=options)
    return states[-1]


def ddpm_chain(steps: int) -> list[int]:
    """`steps` of the 1000 times, from the last to the first, as published code spreads them (IDDPM).

    It adds up a stride in floating point and rounds each sum, so where one is nearly a half, the error of the sum
    decides: to compute the times directly gives others at 278 of the possible numbers of steps.
    """
    stride = (DDPM_STEPS - 1) / (steps - 1)
    return [round(time) for time in itertools.accumulate([0.0, *[stride] * (steps - 1)])][::-1]


def ddim_stride(steps: int) -> int | None:
    """The whole stride that takes `steps` of the 1000 times, as published code looks for it; None: there is none."""
    return next((stride for stride in range(1, DDPM_STEPS) if len(range(0, DDPM_STEPS, stride)) == steps), None)


def sample_ddpm(
    denoise: Denoiser, noise: Tensor, steps: int, generators: list[torch.Generator], learned_variance: bool = True
) -> Tensor:
    """Walk back along the times of `ddpm_chain`, with the learned variance or, without one, the larger of the two.

    The chosen times form a chain of their own (IDDPM, section 4): its betas, between which the variance is
    interpolated, are those of the longer steps. A variance that is not learned is that beta, as in published code.
    Predicted images are not clipped: latents have no range.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # takes seconds to import

    kind = "learned_range" if learned_variance else "fixed_large"
    scheduler = DDPMScheduler(**DDPM_SCHEDULE, variance_type=kind, clip_sample=False)
    scheduler.set_timesteps(timesteps=ddpm_chain(steps))
    z = noise
    for t in scheduler.timesteps.tolist():
        prediction, variance = denoise(z, torch.full((len(z),), t))
        if learned_variance:
            assert variance is not None
            prediction = torch.cat([prediction, variance], dim=1)
        z = scheduler.step(prediction, t, z, generator=generators).prev_sample
    return z


def sample_ddim(denoise: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """Walk back without adding noise (DDIM, Song et al. 2021, eq. 12 with eta = 0).

    The times are 0, s, 2 s, ... with the whole stride s that makes `steps` of them, as published.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # takes seconds to import

    alpha_bar = DDIMScheduler(**DDPM_SCHEDULE).alphas_cumprod.double().tolist()
    stride = ddim_stride(steps)
    assert stride is not None, "see choose_sampler"
    z = noise
    # diffusers' own step goes back by 1000 // steps, which is the stride where it divides 1000 alone.
    for t in range((steps - 1) * stride, -1, -stride):
        epsilon, _ = denoise(z, torch.full((len(z),), t))
        data = (z - math.sqrt(1 - alpha_bar[t]) * epsilon) / math.sqrt(alpha_bar[t])
        before = alpha_bar[t - stride] if t else 1.0
        z = math.sqrt(before) * data + math.sqrt(1 - before) * epsilon
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
