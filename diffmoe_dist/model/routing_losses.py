"""Losses that routers are trained with, as plain functions; their weights live in the configuration.

Shape legend: T tokens, N experts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def capacity_loss(logits_TN: Tensor, chosen_TN: Tensor) -> Tensor:
    """How well the capacity predictor knows which tokens each expert takes (DiffMoE eq. 12).

    Binary cross-entropy, the mean over tokens and experts; the model takes the mean over its layers, as the paper
    prints it (the published code sums over the layers).

    Args:
        logits_TN: the predictor's outputs.
        chosen_TN: bool, the tokens in the experts' top k.

    Returns:
        () fp32.
    """
    return F.binary_cross_entropy_with_logits(logits_TN.float(), chosen_TN.float())
