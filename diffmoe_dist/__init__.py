"""Expert-parallel training of mixture-of-experts diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from diffmoe_dist.model.dit import DiT

__version__ = "0.1.0"


def load_model(directory: str | Path, device: str | torch.device = "cpu") -> DiT:
    """The averaged (EMA) model of a run, in eval mode on one device.

    `model(x, t, y).prediction` has x's shape (N, C, H, W); t is the objective's time as the model is given it:
    `time_scale` * t for a flow, the step 0..999 for DDPM.

    Args:
        directory: a run folder, for its newest checkpoint, or a `step-N` folder.
    """
    from diffmoe_dist.engine.checkpoint import load_ema_model

    return load_ema_model(directory, device)
