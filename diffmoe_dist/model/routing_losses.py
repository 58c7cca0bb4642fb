"""Losses that routers are trained with, as plain functions; their weights live in the configuration.

Shape legend: T tokens, N experts.
"""

from __future__ import annotations

import torch
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


def balance_loss(scores_TN: Tensor, picks_N: Tensor) -> Tensor:
    """How unevenly tokens choose experts (the load-balance loss of TC-DiT): N * sum of f_i * P_i, 1 where even.

    f_i, the fraction of all picks that fall on expert i, is of the whole batch; P_i, the mean score of i, of the local
    tokens. As each rank has the same number of tokens, the mean over ranks is the loss of the whole batch.

    Args:
        scores_TN: softmax over the experts, with gradient.
        picks_N: how often each expert was picked in the whole batch.

    Returns:
        () fp32.
    """
    fraction_N = picks_N.to(scores_TN.dtype) / picks_N.sum()
    return len(picks_N) * torch.sum(fraction_N * scores_TN.mean(dim=0))
