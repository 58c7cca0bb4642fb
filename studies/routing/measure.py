"""What is measured of a trained model: losses on held-out images, samples, and what its experts do.

All models see the same images with the same noise at the same times, and begin sampling from the same noise, so
differences between them are paired: by image and noise level here, by seed between runs.

Shape legend: N images, K classes, L mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.weights import find_model, read_model
from diffmoe_dist.evaluation.metrics import Statistics, frechet_distance
from diffmoe_dist.model.accounting import account
from diffmoe_dist.model.dit import DiT
from studies.routing.classifier import Classifier, accuracy_by_class, look
from studies.routing.images import to_model
from studies.routing.results import LEVELS
from studies.routing.systems import OWN

BLOCK = 100  # images that are computed, and compete, together: here and in sampling
SEED = 2026  # of the noise, the times and their order


def rule_settings(rule: str, threshold: float | None = None) -> list[str]:
    """What a command is told to route by that rule.

    Args:
        threshold: of the rule `CONSTANT`.
    """
    if rule == OWN:
        return []
    constant = [] if threshold is None else [f"moe.constant_threshold={threshold:g}"]
    return [f"moe.inference={rule}", *constant]


def threshold_of_capacity_1(points: Sequence[dict[str, float]]) -> float:
    """Where C, which falls with the threshold, crosses 1 between the points of a search; straight between two."""
    ordered = sorted(points, key=lambda point: point["threshold"])
    thresholds = [point["threshold"] for point in ordered]
    falling = [-point["capacity"] for point in ordered]
    return round(float(np.interp(-1.0, falling, thresholds)), 4)


@torch.no_grad()
def held_out(run_dir: Path, rule: Sequence[str], images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The diffusion loss of the averaged weights on held-out images, and the experts' load there.

    A block has images of all noise levels, as a batch of training has. Losses are means over the images of each
    level, and of each block.

    Args:
        rule: how the model routes, as `rule_settings` has it.
        images, labels: (N, 1, H, W) uint8 and (N,), N a multiple of `BLOCK`.
    """
    model, config = read_model(find_model(run_dir), "cpu", rule)
    losses_N, levels_N, load_LE = losses_on(model, config, images, labels)
    by_level = [float(losses_N[levels_N == level].mean()) for level in range(LEVELS)]
    capacity = float(load_LE.sum() / (load_LE.shape[0] * _tokens(config, len(images)))) if load_LE.numel() else None
    counts = account(config)
    return {
        "loss": float(losses_N.mean()),
        "by_level": [round(loss, 7) for loss in by_level],
        "by_block": [round(loss, 7) for loss in losses_N.view(-1, BLOCK).mean(dim=1).tolist()],
        "capacity": capacity,
        "load": load_LE.long().tolist(),
        "parameters": counts.total,
        "activated_parameters": round(counts.activated(capacity)),
    }


@torch.no_grad()
def losses_on(model: DiT, config: Config, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) losses, (N,) noise levels, (L, E) assignments of tokens to experts."""
    objective = build_objective(config)
    generator = torch.Generator().manual_seed(SEED)
    losses, levels, load = [], [], torch.zeros(0)
    for x, y in zip(to_model(images).split(BLOCK), labels.split(BLOCK), strict=True):
        order = torch.randperm(BLOCK, generator=generator)
        uniform = (order + torch.rand(BLOCK, generator=generator, dtype=torch.float64)) / BLOCK
        noise = torch.randn(x.shape, generator=generator)
        t = objective.times(uniform)
        output = model(objective.corrupt(x, noise, t), objective.model_time(t), y)
        losses.append(objective.losses(output.prediction, output.variance, x, noise, t)["diffusion"].double())
        levels.append(order * LEVELS // BLOCK)
        if output.routing:
            taken = torch.stack([stats.tokens_per_expert for stats in output.routing]).double()
            load = taken if not load.numel() else load + taken
    return torch.cat(losses), torch.cat(levels), load


def _tokens(config: Config, images: int) -> int:
    return images * config.tokens_per_sample


def sampled(folder: Path, classifier: Classifier, reference: Statistics) -> dict[str, Any]:
    """How near the samples of `diffmoe_dist.sample` come to the reference, and whether they are of their class.

    Args:
        reference: of the features of the training images.
    """
    with np.load(folder / "samples.npz") as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file["arr_1"])
    about = json.loads((folder / "sampling.json").read_text())
    statistics, found = look(classifier, images)
    by_class = accuracy_by_class(found, labels)
    return {
        "num": about["num"],
        "nfe": about["nfe"],
        "seed": about["seed"],
        "capacity": about["capacity"],
        "activated_parameters": about["activated_parameters"],
        "frechet": frechet_distance(statistics, reference),
        "accuracy": sum(by_class) / len(by_class),
        "accuracy_by_class": by_class,
    }
