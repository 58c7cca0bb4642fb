"""One update by AdamW, and the squares of gradients, by torch; `adamw_kernels` does both faster on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROW = 1024


@dataclass(frozen=True)
class AdamW:
    """The numbers of one update (Loshchilov and Hutter 2019, Algorithm 2)."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_scale: float  # gradients are divided by it

    def update(
        self,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        step: Tensor,
    ) -> None:
        """In place; fp32, but for gradients, which torch takes in fp32 alone. `step`: () on the device, from 1."""
        torch._fused_adamw_(
            list(weights),
            [gradient.float() for gradient in gradients],
            list(exp_avgs),
            list(exp_avg_sqs),
            [],
            [step] * len(weights),
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            # It divides the gradients by this as it reads them.
            grad_scale=torch.full((), self.grad_scale, device=step.device) if self.grad_scale != 1 else None,
        )


def squares(flat: Tensor) -> Tensor:
    """(rows,) fp64: of short rows, since a sum of a million fp32 squares would be off by 1e-4; these are by 1e-9."""
    whole = flat.numel() // _ROW * _ROW
    norms = [torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=torch.float32)]
    if whole < flat.numel():
        norms.append(torch.linalg.vector_norm(flat[whole:], dtype=torch.float32).view(1))
    return torch.cat(norms).double().square()
