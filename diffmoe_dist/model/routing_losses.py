"""Losses that routers are trained with, as plain functions; their weights live in the configuration.

Shape legend: T tokens, D width, N experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def capacity_loss(logits_TN: Tensor, chosen_TN: Tensor) -> Tensor:
    """How well the capacity predictor knows which tokens each expert takes (DiffMoE eq. 12).

    Binary cross-entropy, the mean over tokens and experts of one layer. The paper prints the mean over layers too, and
    so the routers have it (the published code adds the layers up).

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


def contrastive_loss(prototypes_ND: Tensor, sums_ND: Tensor, counts_N: Tensor, temperature: float) -> Tensor:
    """How well each prototype tells the mean of its own tokens from the others' means (ProMoE eq. 6).

    Experts without tokens take no part; with fewer than two experts left the loss is 0. Gradients reach the prototypes
    and the tokens. The published code adds it up over the layers.

    Args:
        prototypes_ND: one for each expert.
        sums_ND: (..., N, D) the sum of each expert's tokens.
        counts_N: (..., N) their number.

    Returns:
        (...) fp32.
    """
    means_ND = sums_ND / counts_N.clamp_min(1)[..., None]
    cosine_NN = F.normalize(prototypes_ND, dim=-1) @ F.normalize(means_ND, dim=-1).mT
    active_N = counts_N > 0
    logits_NN = (cosine_NN / temperature).masked_fill(~active_N[..., None, :], -torch.inf)
    # A row of nothing but -inf has no softmax; its expert is not active and takes no part.
    logits_NN = torch.where(active_N[..., None], logits_NN, 0.0)
    loss_N = logits_NN.logsumexp(dim=-1) - logits_NN.diagonal(dim1=-2, dim2=-1)
    return torch.where(active_N, loss_N, 0.0).sum(dim=-1) / active_N.sum(dim=-1).clamp_min(1)
