"""Expert-parallel training of mixture-of-experts diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from diffmoe_dist.model.dit import DiT

__version__ = "0.1.0"


def load_model(directory: str | Path, device: str | torch.device = "cpu") -> DiT:
    """The averaged (EMA) model of a run, or the model of a folder of weights, in eval mode on one device.

    `model(x, t, y).prediction` has x's shape (N, C, H, W); t is the objective's time as the model is given it:
    `time_scale` * t for a flow, the step 0..999 for DDPM.

    Args:
        directory: a run folder, for its newest checkpoint, a `step-N` folder, or a folder that `diffmoe_dist.convert`
            has written.
    """
    from diffmoe_dist.engine.weights import find_model, read_model

    return read_model(find_model(directory), device)[0]
