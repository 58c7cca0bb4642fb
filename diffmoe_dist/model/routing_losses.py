"""The losses that routers are trained with, unweighted; the weights are settings (`moe.NAME_loss_weight`).

Shape legend: T tokens, D width, N experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def capacity_loss(logits_TN: Tensor, chosen_TN: Tensor, layers: int = 1) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of the capacity predictor: does each expert take this token? (DiffMoE eq. 12)

    This is the mean over the tokens and experts of one layer, divided by the number of layers: eq. 12 is also a mean
    over them, and the model adds its layers' losses up. (The published code sums over the layers.)

    Args:
        logits_TN: fp32, the predictor's outputs.
        chosen_TN: bool, the tokens in each expert's top k.

    Returns:
        () fp32, without gradient, and its gradient at the logits, (T, N).
    """
    logits_TN, target_TN = logits_TN.detach(), chosen_TN.float()
    loss = F.binary_cross_entropy_with_logits(logits_TN, target_TN) / layers
    return loss, logits_TN.sigmoid().sub_(target_TN).mul_(1 / (logits_TN.numel() * layers))


def with_gradients_now(loss: Tensor, output: Tensor, gradient: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The loss, with its gradients computed already: nothing but them is kept for backward.

    For a loss that depends on nothing else than these parameters, whose gradients are smaller than what they are
    computed from.

    Args:
        loss: () without gradient.
        output: what the loss is computed from.
        gradient: of the loss, at the output.
    """
    if not output.requires_grad:
        return loss
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return _KnownGradients.apply(loss, torch.autograd.grad(output, parameters, gradient), *parameters)


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.saved_tensors, grad)


def balance_loss(mean_N: Tensor, fraction_N: Tensor) -> Tensor:
    """Load-balance loss of token choice (Switch Transformer, Fedus et al. 2021, eq. 4): N * sum of f_i * P_i.

    It is 1 where the load is even. f_i is the fraction of the whole batch's assignments that go to expert i, P_i the
    mean score of expert i over the tokens; over those of a rank where each rank has as many, for then the mean over the
    ranks is the loss of the whole batch.

    Args:
        mean_N: P, of a softmax over the experts, with gradient.
        fraction_N: f, of the assignments in the whole batch.

    Returns:
        () fp32.
    """
    return len(fraction_N) * torch.sum(fraction_N * mean_N)


def contrastive_loss(prototypes_ND: Tensor, sums_ND: Tensor, counts_N: Tensor, temperature: float) -> Tensor:
    """Routing contrastive loss (ProMoE eq. 6): InfoNCE of each prototype and the mean of its expert's tokens.

    The means of the other experts' tokens are the negatives. Experts without tokens are left out; with fewer than two
    experts left the loss is 0. Gradients reach the prototypes and the tokens. The published code sums over the layers.

    Args:
        prototypes_ND: one for each expert.
        sums_ND: (..., N, D) the sum of each expert's tokens.
        counts_N: (..., N) the number of each expert's tokens.

    Returns:
        (...) fp32.
    """
    counts_N = counts_N.detach()  # no gradient comes of them
    active_N = counts_N > 0
    empty_N = ~active_N
    means_ND = sums_ND / counts_N.clamp_min(1)[..., None]
    cosine_NN = F.normalize(prototypes_ND, dim=-1) @ F.normalize(means_ND, dim=-1).mT
    logits_NN = (cosine_NN / temperature).masked_fill(empty_N[..., None, :], -torch.inf)
    # An inactive expert's row may be -inf throughout, and its softmax NaN. It is left out, so any finite row will do.
    logits_NN = logits_NN.masked_fill(empty_N[..., None], 0.0)
    loss_N = logits_NN.logsumexp(dim=-1) - logits_NN.diagonal(dim1=-2, dim2=-1)
    return loss_N.masked_fill(empty_N, 0.0).sum(dim=-1) / active_N.sum(dim=-1).clamp_min(1)
