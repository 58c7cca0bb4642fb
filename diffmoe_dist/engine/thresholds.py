"""Capacity thresholds for averaged weights.

Training moves the thresholds with the weights it trains; the averaged weights have another capacity predictor, which
those thresholds do not fit exactly. A few batches of training data give the thresholds at which the averaged model has
the capacity that it was trained for.

Shape legend: L mixture-of-experts layers, N experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.noising import noisy_inputs
from diffmoe_dist.engine.sharded_state import EMA_BUFFER, Fragment
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.moe import MoELayer

THRESHOLD = "mlp.router.threshold"  # of a block


@torch.no_grad()
def proposed_thresholds(model: DiT, config: Config, batches: Iterable[Batch]) -> Tensor:
    """The mean of the thresholds that the batches propose, (L, N) fp64 (DiffMoE eq. 17 at these weights).

    Each batch is routed and noised as a micro-step of training; the proposal for an expert is the predicted score that
    as many tokens exceed as it has slots. Collective where the pool is; this rank's mean.

    Args:
        model: in training mode, with a capacity predictor.
    """
    objective = build_objective(config)
    device = model.pos_embed.device
    proposals = []
    for batch in batches:
        z, t, y = noisy_inputs(batch.to(device), objective, config)
        routing = model(z, objective.model_time(t), y).routing
        proposals.append(torch.stack([stats.proposed_threshold for stats in routing]).double())
    return torch.stack(proposals).mean(dim=0)


def thresholds_of_average(model: DiT, thresholds_LN: Tensor) -> list[Fragment]:
    """What a checkpoint keeps of them, beside the thresholds of the weights themselves."""
    blocks = [number for number, block in enumerate(model.blocks) if isinstance(block.mlp, MoELayer)]
    return [
        Fragment(f"{EMA_BUFFER}.blocks.{number}.{THRESHOLD}", 0, len(threshold_N), threshold_N)
        for number, threshold_N in zip(blocks, thresholds_LN.float(), strict=True)
    ]
