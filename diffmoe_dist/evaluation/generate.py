"""Images from a model: each a function of (weights, seed, its number, its label).

With the batch-independent inference rule `threshold` nothing else plays a part; with `count` and `static` the images
of one call compete for the experts, so there the reproducible unit is the block of images that is drawn together.

Shape legend: N images, C channels, H = W image size.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffmoe_dist.config import Config, data_sets
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import Autoencoder, same_scaling
from diffmoe_dist.data.randomness import Stream, philox, sample_generator
from diffmoe_dist.diffusion.objectives import DDPM_STEPS, Objective, build_objective
from diffmoe_dist.diffusion.samplers import SAMPLERS, Prediction, sample, with_guidance
from diffmoe_dist.engine.metrics import make_writable
from diffmoe_dist.engine.weights import find_model, read_model
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.parallel.topology import all_gather, from_first_rank

SAMPLING_OVERRIDES = ("moe.inference", "moe.constant_threshold", "data.shards")
Decode = Callable[[Tensor], Tensor]  # the model's images, (N, C, H, W), to pixels in about [-1, 1]
CELL_PIXELS = 64  # images smaller than this are enlarged in a grid


@dataclass(frozen=True)
class SamplingSettings:
    checkpoint: str
    num: int
    steps: int
    cfg_scale: float
    seed: int
    sampler: str | None  # None: the default of the model's objective
    batch_size: int
    decoder: str | None = None  # of latents; default: the run's own
    overrides: tuple[str, ...] = ()  # key=value: moe.inference, moe.constant_threshold, data.shards of the saved run
    recalibrate: int = 0  # batches of training data from which the thresholds are found anew

    def check(self) -> None:
        for name in ("num", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: choose at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: choose one from 0 to 2**63 - 1")
        if self.recalibrate < 0:
            raise UserError(f"--recalibrate {self.recalibrate}: choose 0 (no) or a number of batches, such as 4")
        for override in self.overrides:
            if override.partition("=")[0] not in SAMPLING_OVERRIDES:
                raise UserError(
                    f"{override}: sampling can change {', '.join(SAMPLING_OVERRIDES)} of a run, nothing else; remove it"
                )


@dataclass(frozen=True)
class Generated:
    images: Tensor  # (N, C, H, W) fp32, about [-1, 1]
    capacity: float | None  # assignments per token, mean over layers, steps and passes; None: no experts


@torch.no_grad()
def generate(
    model: DiT,
    objective: Objective,
    numbers: list[int],
    labels: list[int],
    *,
    seed: int,
    sampler: str,
    steps: int,
    cfg_scale: float,
) -> Generated:
    """Draw the images with these numbers and labels, together in one batch.

    Args:
        model: in eval mode; with experts spread over ranks, every rank makes the same number of calls.
        numbers: (N,) which image of the seed each is.
    """
    device = model.pos_embed.device
    noise = torch.stack([initial_noise(model, seed, number) for number in numbers]).to(device)
    capacities: list[Tensor] = []

    def denoise(z: Tensor, t: Tensor, y: Tensor) -> Prediction:
        output = model(z, objective.model_time(t), y)
        capacities.extend(stats.capacity for stats in output.routing)
        return output.prediction, output.variance

    guided = with_guidance(denoise, torch.tensor(labels, device=device), model.num_classes, cfg_scale)
    images = sample(sampler, guided, noise, objective, steps, [step_generator(seed, number) for number in numbers])
    return Generated(images, float(torch.stack(capacities).mean()) if capacities else None)


def initial_noise(model: DiT, seed: int, number: int) -> Tensor:
    """(C, H, W) standard normal, the start of image `number` of a seed."""
    size = model.grid_size * model.patch_size
    generator = sample_generator(seed, Stream.SAMPLING, 0, number)
    return torch.from_numpy(generator.standard_normal((model.in_channels, size, size), dtype=np.float32))


def step_generator(seed: int, number: int) -> torch.Generator:
    """Of the noise that a sampler adds on the way to image `number` of a seed."""
    return torch.Generator().manual_seed(int(philox(seed, Stream.SAMPLING, 1, number).random_raw()))


def default_sampler(objective: str) -> str:
    """The first sampler for the objective of this name."""
    return next(name for name, made_for in SAMPLERS.items() if made_for == objective)


def choose_sampler(name: str | None, steps: int, objective: str) -> str:
    """The sampler with this name, or the objective's default.

    Raises:
        UserError: it is for another objective, or cannot take this number of steps.
    """
    name = name or default_sampler(objective)
    if SAMPLERS[name] != objective:
        fitting = " or ".join(known for known, made_for in SAMPLERS.items() if made_for == objective)
        raise UserError(f"--sampler {name} is not for a model with objective.name={objective}; choose {fitting}")
    if name == "ddpm" and not 2 <= steps <= DDPM_STEPS:
        raise UserError(f"--steps {steps}: --sampler ddpm takes 2 to {DDPM_STEPS}")
    if name == "ddim" and (steps < 2 or DDPM_STEPS % steps):
        raise UserError(f"--steps {steps}: --sampler ddim takes a divisor of {DDPM_STEPS} above 1, such as 50 or 250")
    return name


def balanced_labels(num: int, num_classes: int) -> list[int]:
    """Every class in turn."""
    return [number % num_classes for number in range(num)]


def open_decoder(config: Config, folder: str | None, setting: str, device: torch.device) -> Decode:
    """What turns the model's images into pixels: nothing for pixels, the autoencoder in `folder` for latents.

    `setting` is how the user names the folder.

    Raises:
        UserError: latents without a decoder, pixels with one, or a decoder of other latents than the model's.
    """
    channels = config.model.in_channels
    latents = channels not in (1, 3) or any(entry.latents for entry in data_sets(config.data))
    if not latents and folder is None:
        return lambda images: images
    if not latents:
        raise UserError(f"{setting}={folder}: this model draws pixels, not latents; remove it")
    if folder is None:
        raise UserError(f"model.in_channels={channels}: this model draws latents; give {setting} their autoencoder")
    decoder = Autoencoder.open(folder, setting, device)
    if decoder.latent_channels != channels:
        raise UserError(f"{setting}={folder}: has {decoder.latent_channels} latent channels, the model {channels}")
    for entry in data_sets(config.data):
        if entry.latents and Path(entry.latents).is_dir():  # a model may be sampled where its data are not
            _check_scaling(decoder, entry.latents, f"{setting}={folder}")
    return decoder.decode


def _check_scaling(decoder: Autoencoder, latents: str, named: str) -> None:
    spec = ShardIndex.open(latents).latents
    if spec is not None and not same_scaling(decoder, spec):
        raise UserError(f"{named}: takes latents of another scale or shift than data.latents={latents}; give their own")


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] to (N, H, W, C) uint8: clamp(127.5 x + 128, 0, 255), the rule of ADM."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def image_grid(images_NHWC: np.ndarray, columns: int) -> np.ndarray:
    """One picture, (rows * H, columns * W, C) uint8 with thin gaps; small images enlarged without smoothing."""
    count, height, _, channels = images_NHWC.shape
    scale = max(1, CELL_PIXELS // height)
    cells = images_NHWC.repeat(scale, axis=1).repeat(scale, axis=2)
    cells = np.pad(cells, ((0, -count % columns), (2, 2), (2, 2), (0, 0)))
    rows, cell = len(cells) // columns, cells.shape[1]
    return (
        cells.reshape(rows, columns, cell, cell, channels).swapaxes(1, 2).reshape(rows * cell, columns * cell, channels)
    )


def training_grid(model: DiT, config: Config, decode: Decode | None, rank: int, world_size: int) -> np.ndarray:
    """The sample grid of a training step, (H, W, C) uint8 on every rank; collective. Each rank draws an equal share."""
    settings = config.sample
    share = -(-settings.num // world_size)
    numbers = list(range(rank * share, (rank + 1) * share))
    labels = balanced_labels(share * world_size, config.model.num_classes)[numbers[0] : numbers[-1] + 1]
    drawn = generate(
        model, build_objective(config.objective), numbers, labels,
        seed=config.seed, sampler=default_sampler(config.objective.name), steps=settings.steps,
        cfg_scale=settings.cfg_scale,
    )  # fmt: skip
    assert decode is not None, "sample.every opens it"
    pixels = decode(drawn.images)
    everyone = pixels.new_empty(world_size * share, *pixels.shape[1:])
    all_gather(everyone, pixels.contiguous())
    return image_grid(to_uint8(everyone[: settings.num]), grid_columns(config, settings.num))


def grid_columns(config: Config, num: int) -> int:
    """A column for each class where that makes a handsome grid, else a square."""
    return min(num, config.model.num_classes) if config.model.num_classes <= 16 else int(np.ceil(num**0.5))


def sample_to_folder(settings: SamplingSettings, out: str | Path, device: torch.device, rank: int, ranks: int) -> None:
    """Draw `settings.num` images on all ranks; the first one writes them; collective.

    Every rank holds the whole averaged model and takes every `ranks`-th block of `batch_size` images, so a block is the
    same on any number of ranks.

    Raises:
        UserError: there is no such checkpoint, its model draws latents, or the sampler is not for it.
    """
    try:
        make_writable(Path(out))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another") from None
    checkpoint = from_first_rank(find_model(settings.checkpoint))
    model, config = read_model(checkpoint, device, settings.overrides)
    decode = open_decoder(config, settings.decoder or config.sample.decoder, "--decoder", device)
    if settings.recalibrate:
        from diffmoe_dist.evaluation.calibration import recalibrate_on_training_data  # imports the training engine

        recalibrate_on_training_data(model, config, settings.recalibrate, settings.batch_size)
    sampler = choose_sampler(settings.sampler, settings.steps, config.objective.name)
    objective = build_objective(config.objective)
    labels = balanced_labels(settings.num, config.model.num_classes)
    starts = range(0, settings.num, settings.batch_size)
    mine: dict[int, tuple[np.ndarray, float | None]] = {}  # pixels and capacity of each block
    begun = time.perf_counter()
    for start in tqdm(starts[rank::ranks], unit="block", disable=rank != 0 or not sys.stderr.isatty()):
        numbers = list(range(start, min(start + settings.batch_size, settings.num)))
        drawn = generate(
            model, objective, numbers, [labels[number] for number in numbers],
            seed=settings.seed, sampler=sampler, steps=settings.steps, cfg_scale=settings.cfg_scale,
        )  # fmt: skip
        mine[start] = to_uint8(decode(drawn.images)), drawn.capacity
    blocks = _gather(mine, rank, ranks)
    if blocks is None:
        return
    seconds = time.perf_counter() - begun
    images = np.concatenate([blocks[start][0] for start in starts])
    capacities = [(blocks[start][1], len(blocks[start][0])) for start in starts]
    record = {
        **asdict(settings),
        "overrides": list(settings.overrides),
        "sampler": sampler,
        "checkpoint": str(checkpoint),
        "inference": getattr(config.moe, "inference", None),
        "labels": "balanced",
        "uint8_rule": "clamp(127.5 x + 128, 0, 255)",
        "capacity": None if capacities[0][0] is None else sum(c * n for c, n in capacities) / settings.num,
        "images_per_second": settings.num / seconds,
    }
    _write_samples(Path(out), images, labels, grid_columns(config, settings.num), record)


def _gather(mine: dict, rank: int, ranks: int) -> dict | None:
    """The blocks of all ranks, on the first one."""
    everyone: list[dict] | None = [{} for _ in range(ranks)] if rank == 0 else None
    dist.gather_object(mine, everyone)
    return None if everyone is None else {start: block for blocks in everyone for start, block in blocks.items()}


def _write_samples(out: Path, images_NHWC: np.ndarray, labels: list[int], columns: int, record: dict) -> None:
    np.savez(out / "samples.npz", arr_0=images_NHWC, arr_1=np.asarray(labels, dtype=np.int64))
    shown = images_NHWC[: 10 * columns]
    Image.fromarray(image_grid(shown, columns).squeeze()).save(out / "grid.png")
    (out / "sampling.json").write_text(json.dumps(record, indent=2) + "\n")
