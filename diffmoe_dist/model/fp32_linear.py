"""Linear layers whose results are in fp32 whatever the precision of the model: those of scores that decide.

At the resolution of bf16 scores would tie in crowds. Copies of the operands in fp32 live for one product: what is kept
for backward is the operands as they are, and x too where an activation comes before; the products of backward are
computed in the type that they have.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def fp32_linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """(T, D) to (T, C) in fp32: x @ weight.T + bias, of silu(x) with `activation="silu"`."""
    return _Fp32Linear.apply(x_TD, weight, bias, activation)


class _Fp32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        activated = x if activation is None else F.silu(x)
        ctx.save_for_backward(x, weight, None if activation is None else activated)
        ctx.bias_type = None if bias is None else bias.dtype
        return F.linear(activated.float(), weight.float(), None if bias is None else bias.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, activated = ctx.saved_tensors
        kind = torch.promote_types(x.dtype, weight.dtype)
        grad = grad.to(kind)
        grad_weight, grad_bias, grad_x = None, None, None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.T @ (x if activated is None else activated).to(kind)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=0, dtype=kind).to(ctx.bias_type)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(kind)).to(x.dtype)
            if activated is not None:
                torch.ops.aten.silu_backward.grad_input(grad_x, x, grad_input=grad_x)  # in place
        return grad_x, grad_weight, grad_bias, None
