"""Where the experts of a layer look: the patches of held-out images that each of them takes.

Shape legend: N images, S tokens an image in a square, E experts, T = N * S, A assignments.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.weights import find_model, read_model
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.routing import Routing
from studies.routing.images import to_model
from studies.routing.systems import EXPERTS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TIME = 0.5  # half noise, half image
_DIM = 0.2  # of the brightness, where an expert does not look
_TINT, _COLOR = 0.35, np.array([0.35, 0.62, 0.95])  # where it does
_CLASSES = 10


@torch.no_grad()
def taken_by_experts(model: DiT, z: Tensor, t: Tensor, y: Tensor) -> list[np.ndarray]:
    """Of each mixture-of-experts layer, (E, N, S): whether the expert takes the token."""
    found: list[Routing] = []
    hooks = [
        layer.router.register_forward_hook(lambda _, __, routing: found.append(routing)) for layer in model.moe_layers
    ]
    try:
        model(z, t, y)
    finally:
        for hook in hooks:
            hook.remove()
    return [_taken(routing, len(z)) for routing in found]


def _taken(routing: Routing, images: int) -> np.ndarray:
    tokens, experts = routing.scores_TN.shape
    taken_ET = np.zeros((experts, tokens), dtype=bool)
    taken_ET[routing.expert_index.numpy(), routing.token_index.numpy()] = True
    return taken_ET.reshape(experts, images, -1)


def draw_experts(run_dir: Path, images: Tensor, labels: Tensor, layer: int, out: Path) -> None:
    """One image of each class in a column, an expert in each row; what it does not take is dark."""
    model, config = read_model(find_model(run_dir), "cpu")
    objective = build_objective(config)
    first = torch.stack([(labels == label).nonzero()[0, 0] for label in range(_CLASSES)])
    x, noise = to_model(images[first]), torch.randn(images[first].shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((_CLASSES,), TIME)
    noisy = objective.corrupt(x, noise, t)
    taken_ENS = taken_by_experts(model, noisy, objective.model_time(t), labels[first])[layer]
    patch = config.model.patch_size
    grid = config.model.input_size // patch
    rows = [_gray(x), _gray(noisy)]
    for taken_NS in taken_ENS:
        mask = taken_NS.reshape(-1, grid, grid, 1).repeat(patch, axis=1).repeat(patch, axis=2)
        rows.append(np.where(mask, (1 - _TINT) * _gray(x) + _TINT * _COLOR, _DIM * _gray(x)))
    figure, axes = plt.subplots(figsize=(7, 0.7 * len(rows)))
    padded = [np.pad(row, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=1.0) for row in rows]
    axes.imshow(np.concatenate([np.concatenate(list(row), axis=1) for row in padded]))
    height = padded[0].shape[1]
    names = ["image", "as it is seen", *(f"expert {number + 1}" for number in range(EXPERTS))]
    axes.set_yticks([height * (row + 0.5) for row in range(len(rows))], names[: len(rows)])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, bbox_inches="tight", dpi=110, metadata={"Software": ""})
    plt.close(figure)


def _gray(x: Tensor) -> np.ndarray:
    """(N, 1, H, W) in [-1, 1] to (N, H, W, 3) in [0, 1]."""
    return ((x[:, 0, :, :, None] + 1) / 2).clamp(0, 1).expand(-1, -1, -1, 3).numpy()
