"""Images from a model: each a function of (weights, seed, its number, its class or caption).

With the batch-independent inference rule `threshold` nothing else plays a part. With `count`, `constant` and `static`
the images of one call compete for the experts, and an adaptive sampler gives them common steps: there the reproducible
unit is the block of images that is sampled together.

Shape legend: N images, C channels, H = W image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.config import Config, data_sets
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import Autoencoder, same_scaling
from diffmoe_dist.data.randomness import Stream, philox, sample_generator
from diffmoe_dist.diffusion.objectives import DDPM_STEPS, Objective, build_objective
from diffmoe_dist.diffusion.samplers import (
    ADAMS,
    ADAPTIVE,
    SAMPLERS,
    Guidance,
    Prediction,
    ddim_stride,
    filled_in,
    sample,
    with_guidance,
)
from diffmoe_dist.errors import UserError
from diffmoe_dist.logs import logger
from diffmoe_dist.model.condition import Condition, join, on_device
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.parallel.topology import all_gather
from diffmoe_dist.sampling.conditions import Conditions
from diffmoe_dist.sampling.grid import conditioned_grid
from diffmoe_dist.sampling.routing_trace import Recorder

Decode = Callable[[Tensor], Tensor]  # the model's images, (N, C, H, W), to pixels in about [-1, 1]
DEFAULT_STEPS = 50
UINT8_RULE = "clamp(127.5 x + 128, 0, 255), fractions cut off"


@dataclass(frozen=True)
class SamplerSettings:
    """How images are sampled, whatever they are conditioned on."""

    sampler: str  # a key of `SAMPLERS`
    steps: int | None  # None for the adaptive samplers
    guidance: Guidance = Guidance()
    seed: int = 0
    time_shift: float = 1.0


@dataclass(frozen=True)
class NonFinite:
    """Images whose predictions, and so whose pixels, are not all numbers."""

    images: int  # how many
    first: int  # the number of the first one
    nfe: int  # the function evaluation at which it began, counted from 1

    def __str__(self) -> str:
        return f"{self.images} images are not finite, first image {self.first} at function evaluation {self.nfe}"


@dataclass(frozen=True)
class Generated:
    images: Tensor  # (N, C, H, W) fp32, about [-1, 1]
    nfe: int  # function evaluations for each image: calls of the denoiser by the sampler, guidance included
    slots: float  # expert slots computed, over all layers and passes
    tokens: int  # tokens that met a router, over all layers and passes; 0: no experts
    non_finite: NonFinite | None = None

    @property
    def capacity(self) -> float | None:
        """Slots a token: C of DiffMoE eq. 8-9 over layers, steps and passes; None: no experts."""
        return self.slots / self.tokens if self.tokens else None


@torch.no_grad()
def generate(
    model: DiT,
    objective: Objective,
    numbers: list[int],
    conditions: Conditions,
    settings: SamplerSettings,
    recorder: Recorder | None = None,
) -> Generated:
    """Sample the images with these numbers, together in one batch.

    Args:
        model: in eval mode; with experts sharded over ranks, every rank makes the same number of calls.
        numbers: (N,) which image of the seed each is.
        recorder: learns which passes are conditional and which unconditional.
    """
    device = model.pos_embed.device
    keys = [conditions.noise_key(number) for number in numbers]
    noise = torch.stack([initial_noise(model, settings.seed, key) for key in keys]).to(device)
    slots: list[Tensor] = []
    tokens = nfe = 0

    def denoise(z: Tensor, t: Tensor, y: Condition) -> Prediction:
        nonlocal tokens
        output = model(z, objective.model_time(filled_in(t, device)), y)
        here = len(z) * model.grid_size**2
        slots.extend(stats.capacity.double() * here for stats in output.routing)
        tokens += here * len(output.routing)
        return output.prediction, output.variance

    conditional = on_device(conditions.of(numbers), device)
    unconditional = on_device(conditions.null(len(numbers)), device)
    if recorder is not None:
        recorder.begin(conditional, unconditional)
    both = cache(lambda: join(conditional, unconditional))
    guided = with_guidance(denoise, conditional, unconditional, both, settings.guidance)

    finite_EN: list[Tensor] = []  # of each evaluation, the images whose predictions are

    def counted(z: Tensor, t: Tensor) -> Prediction:
        nonlocal nfe
        nfe += 1
        prediction, variance = guided(z, t)
        finite_EN.append(prediction.isfinite().flatten(1).all(dim=1))
        if settings.sampler in ADAPTIVE and not finite_EN[-1].all():
            raise _NotFinite
        return prediction, variance

    generators = [step_generator(settings.seed, key) for key in keys]
    try:
        images = sample(settings.sampler, counted, noise, objective, settings.steps, generators, settings.time_shift)
    except _NotFinite:
        images = noise  # of which the caller keeps nothing
    total = float(torch.stack(slots).sum()) if slots else 0.0
    return Generated(images, nfe, total, tokens, _non_finite(finite_EN, numbers))


class _NotFinite(Exception):  # noqa: N818
    """Ends an adaptive sampler, which would look for ever smaller steps."""


def _non_finite(finite_EN: list[Tensor], numbers: list[int]) -> NonFinite | None:
    bad_EN = ~torch.stack(finite_EN).cpu()
    if not bad_EN.any():
        return None
    nfe, row = (int(place) for place in bad_EN.nonzero()[0])
    return NonFinite(int(bad_EN.any(dim=0).sum()), numbers[row], nfe + 1)


def initial_noise(model: DiT, seed: int, name: int) -> Tensor:
    """(C, H, W) standard normal, the start of the image of a seed that `Conditions.noise_key` calls so."""
    size = model.grid_size * model.patch_size
    generator = sample_generator(seed, Stream.SAMPLING, 0, name)
    return torch.from_numpy(generator.standard_normal((model.in_channels, size, size), dtype=np.float32))


def step_generator(seed: int, name: int) -> torch.Generator:
    """Of the noise that a sampler adds on the way to that image."""
    return torch.Generator().manual_seed(int(philox(seed, Stream.SAMPLING, 1, name).random_raw()))


def default_sampler(objective: str) -> str:
    """The first sampler for the objective of this name."""
    return next(name for name, made_for in SAMPLERS.items() if made_for == objective)


def run_sampler(config: Config) -> SamplerSettings:
    """How a run samples images for itself: its sample grids, scores and figures."""
    guidance = Guidance(config.sample.cfg_scale)
    own, sampler = config.sample, default_sampler(config.objective.name)
    return SamplerSettings(sampler, own.steps, guidance, config.seed, own.time_shift)


def choose_sampler(name: str | None, steps: int | None, objective: str) -> tuple[str, int | None]:
    """The sampler with this name, or the objective's default, and its steps.

    Raises:
        UserError: it is for another objective, or cannot take this number of steps.
    """
    name = name or default_sampler(objective)
    if SAMPLERS[name] != objective:
        fitting = " or ".join(known for known, made_for in SAMPLERS.items() if made_for == objective)
        raise UserError(f"--sampler {name} is not for a model with objective.name={objective}; choose {fitting}")
    if name in ADAPTIVE:
        if steps is not None:
            raise UserError(f"--steps {steps} has no effect with --sampler {name}, which chooses its own; leave it out")
        return name, None
    steps = DEFAULT_STEPS if steps is None else steps
    if name == "ddpm" and not 2 <= steps <= DDPM_STEPS:
        raise UserError(f"--steps {steps}: --sampler ddpm takes 2 to {DDPM_STEPS}")
    if name == "ddim" and ddim_stride(steps) is None:
        counts = sorted({len(range(0, DDPM_STEPS, stride)) for stride in range(1, DDPM_STEPS)})
        near = sorted(sorted(counts, key=lambda count: abs(count - steps))[:2])
        raise UserError(
            f"--steps {steps}: --sampler ddim takes each n-th of the {DDPM_STEPS} times, as published; the nearest "
            f"numbers of steps are {near[0]} and {near[1]}"
        )
    if name == "sde" and steps < 2:
        raise UserError(f"--steps {steps}: --sampler sde takes at least 2, the last one without noise")
    if name == "dpm-solver++" and steps >= DDPM_STEPS:
        raise UserError(f"--steps {steps}: --sampler dpm-solver++ takes 1 to {DDPM_STEPS - 1}; 20 are usually enough")
    return name, steps


def choose_time_shift(given: float | None, sampler: str, config: Config) -> float:
    """The shift of the sampler's steps: the given one, or the run's `sample.time_shift`.

    Raises:
        UserError: the sampler has no steps to shift, or is for equal ones.
    """
    if sampler in ADAPTIVE or config.objective.name != "flow":
        if given is not None:
            why = "which chooses its own steps" if sampler in ADAPTIVE else "which is not of a flow"
            raise UserError(f"--time-shift {given:g} has no effect with --sampler {sampler}, {why}; leave it out")
        return 1.0
    shift = config.sample.time_shift if given is None else given
    if sampler in ADAMS and shift != 1:
        named = f"sample.time_shift={shift:g}" if given is None else f"--time-shift {shift:g}"
        raise UserError(f"{named}: --sampler {sampler} is for equal steps; give --time-shift 1, or another sampler")
    return shift


def open_decoder(
    config: Config, folder: str | None, setting: str, device: torch.device, opened: Autoencoder | None = None
) -> Decode:
    """What turns the model's images into pixels: nothing for pixels, the autoencoder in `folder` for latents.

    Args:
        setting: how the user names the folder.
        opened: that of `data.autoencoder`, where something else has opened it on this device: it is not opened again.

    Raises:
        UserError: latents without a decoder, pixels with one, or a decoder of other latents than the model's.
    """
    folder = folder or config.data.autoencoder
    if not makes_latents(config) and folder is None:
        return lambda images: images
    if folder is None:
        raise UserError(
            f"model.in_channels={config.model.in_channels}: this model makes latents; give {setting} their autoencoder"
        )
    return find_autoencoder(config, folder, setting, device, opened).decode


def makes_latents(config: Config) -> bool:
    """Whether the model's images are an autoencoder's latents rather than pixels."""
    of_data = config.data.autoencoder is not None or any(entry.latents for entry in data_sets(config.data))
    return of_data or config.model.in_channels not in (1, 3)


def find_autoencoder(
    config: Config, folder: str, setting: str, device: torch.device, opened: Autoencoder | None = None
) -> Autoencoder:
    """The autoencoder in a folder, if it is one of the model's latents; arguments and errors are `open_decoder`'s."""
    if not makes_latents(config):
        raise UserError(f"{setting}={folder}: this model makes pixels, not latents; remove it")
    own, channels = config.data.autoencoder, config.model.in_channels
    decoder = opened if opened is not None and folder == own else Autoencoder.open(folder, setting, device)
    if decoder.latent_channels != channels:
        raise UserError(
            f"{setting}={folder}: has {decoder.latent_channels} latent channels, the model {channels}; give its own"
        )
    if own is not None and own != folder and Path(own).is_dir():
        trained = opened or Autoencoder.open(own, "data.autoencoder", "cpu")
        if (trained.scale, trained.shift) != (decoder.scale, decoder.shift):
            raise UserError(f"{setting}={folder}: takes latents of another scale or shift than data.autoencoder={own}")
    for entry in data_sets(config.data):
        if entry.latents and Path(entry.latents).is_dir():  # a model may be sampled where its data are not
            _check_scaling(decoder, entry.latents, f"{setting}={folder}")
    return decoder


def _check_scaling(decoder: Autoencoder, latents: str, named: str) -> None:
    spec = ShardIndex.open(latents, f"data.latents={latents}").latents
    if spec is not None and not same_scaling(decoder, spec):
        raise UserError(f"{named}: takes latents of another scale or shift than data.latents={latents}; give their own")


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] to (N, H, W, C) uint8 by `UINT8_RULE`, that of ADM."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def training_grid(model: DiT, config: Config, conditions: Conditions, decode: Decode) -> np.ndarray:
    """The sample grid of a training step, (H, W, C) uint8 on every rank; collective. Every rank samples as many."""
    num, rank, world_size = config.sample.num, dist.get_rank(), dist.get_world_size()
    share = -(-num // world_size)
    numbers = list(range(rank * share, (rank + 1) * share))
    sampled = generate(model, build_objective(config), numbers, conditions, run_sampler(config))
    if sampled.non_finite is not None:
        logger.warning("sample grid: %s", sampled.non_finite)
    pixels = decode(sampled.images)
    everyone = pixels.new_empty(world_size * share, *pixels.shape[1:])
    all_gather(everyone, pixels.contiguous())
    return conditioned_grid(to_uint8(everyone[:num]), conditions)
