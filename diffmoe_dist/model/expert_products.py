"""Products of rows with the matrices of their experts: in one batched, in one grouped product, or expert by expert.

Where every expert has as many rows it is one batched product. Where not, it is torch's grouped product, which reads the
counts on the device, if its kernel takes the operands; torch would else copy the counts to the host at every product,
twice in a forward pass and four times in a backward pass. So then each expert has a product of its own, by counts that
the caller has on the host.

Legend: R rows, ordered by expert, E experts, D columns in, C columns out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_ALIGNMENT = 16  # bytes, of a grouped product's operands
_GROUPED_KERNELS = (9, 10)  # compute capabilities, the major number


def is_grouped(x: Tensor, *weights_EDC: Tensor) -> bool:
    """Whether a grouped product of such rows with these matrices has a kernel, which never asks the host.

    It is in bf16, on Hopper and datacentre Blackwell GPUs (torch 2.13, aten/src/ATen/native/cuda/GroupedBlas.cpp). On
    other devices, the CPU, there is nobody to wait for.
    """
    if x.dtype != torch.bfloat16:
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] not in _GROUPED_KERNELS:
        return False
    multiple = _ALIGNMENT // x.element_size()
    sizes: list[Any] = [size for w in weights_EDC for size in w.shape[1:]]
    if not torch.compiler.is_compiling():  # which knows no offsets: of a weight in a flat buffer of all weights
        sizes += [w.storage_offset() for w in weights_EDC]
    return all(size % multiple == 0 for size in sizes)


def expert_linear(
    x: Tensor,
    token_index: Tensor | None,
    w_EDC: Tensor,
    b_EC: Tensor | None,
    rows: int | Sequence[int] | None,
    ends_E: Tensor | None = None,
) -> Tensor:
    """(R, C): each row times the matrix of its expert, plus the bias.

    Args:
        x: the rows (R, D), or where there is a `token_index` (R,) the tokens (T, D) that it picks them from: once more
            in backward, so that nobody keeps the rows.
        rows: of every expert, or of each; None: see ends_E, for a grouped product.
        ends_E: int32, where the rows of each expert end.
    """
    if token_index is None and isinstance(rows, int):
        return _products(x, w_EDC, b_EC, rows, None)
    return _ExpertLinear.apply(x, token_index, w_EDC, b_EC, rows, ends_E)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token_index: Tensor | None,
        w: Tensor,
        b: Tensor | None,
        rows: int | Sequence[int] | None,
        ends: Tensor | None,
    ) -> Tensor:
        # What a frozen weight needs not is not kept, nor computed.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, token_index, w, ends)
        ctx.rows, ctx.tokens = rows, x.shape
        return _products(_picked(x, token_index), w, b, rows, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]:
        x, token_index, w, ends = ctx.saved_tensors
        grad, grad_x, grad_w, grad_b = grad.contiguous(), None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = _products(grad, w.mT, None, ctx.rows, ends)
            if token_index is not None:
                grad_x = grad_x.new_zeros(ctx.tokens).index_add_(0, token_index, grad_x)
        if ctx.needs_input_grad[2]:
            grad_w = _outer_products(_picked(x, token_index), grad, len(w), ctx.rows, ends)
        if ctx.needs_input_grad[3]:
            grad_b = _column_sums(grad, len(w), ctx.rows, ends)
        return grad_x, None, grad_w, grad_b, None, None


def _picked(x: Tensor, token_index: Tensor | None) -> Tensor:
    return x if token_index is None else x.index_select(0, token_index)


def _products(
    x_RD: Tensor, w_EDC: Tensor, b_EC: Tensor | None, rows: int | Sequence[int] | None, ends: Tensor | None
) -> Tensor:
    """(R, C)."""
    if isinstance(rows, int):
        x_ERD = x_RD.view(len(w_EDC), rows, w_EDC.shape[1])
        y = torch.bmm(x_ERD, w_EDC) if b_EC is None else torch.baddbmm(b_EC[:, None], x_ERD, w_EDC)
        return y.flatten(0, 1)
    if rows is None:
        assert ends is not None
        y_RC = F.grouped_mm(x_RD, w_EDC, offs=ends)
        return y_RC if b_EC is None else y_RC.add_(b_EC.index_select(0, _expert_of_row(ends, len(x_RD))))
    y_RC = x_RD.new_empty(len(x_RD), w_EDC.shape[2])
    for expert, (x, y) in _of_each_expert(rows, x_RD, y_RC):
        if b_EC is None:
            torch.mm(x, w_EDC[expert], out=y)
        else:
            torch.addmm(b_EC[expert], x, w_EDC[expert], out=y)
    return y_RC


def _outer_products(
    x_RD: Tensor, grad_RC: Tensor, experts: int, rows: int | Sequence[int] | None, ends: Tensor | None
) -> Tensor:
    """(E, D, C): the gradient of the matrices."""
    if isinstance(rows, int):
        return torch.bmm(x_RD.view(experts, rows, x_RD.shape[1]).mT, grad_RC.view(experts, rows, grad_RC.shape[1]))
    if rows is None:
        return F.grouped_mm(x_RD.T, grad_RC, offs=ends)
    grad_w = x_RD.new_empty(experts, x_RD.shape[1], grad_RC.shape[1])
    for expert, (x, grad) in _of_each_expert(rows, x_RD, grad_RC):
        torch.mm(x.T, grad, out=grad_w[expert])
    return grad_w


def _column_sums(grad_RC: Tensor, experts: int, rows: int | Sequence[int] | None, ends: Tensor | None) -> Tensor:
    """(E, C): the gradient of the biases, added up in fp32."""
    if isinstance(rows, int):
        return grad_RC.view(experts, rows, grad_RC.shape[1]).sum(dim=1)
    if rows is None and torch.compiler.is_compiling():  # it would lay the ones out as the kernel does not take them
        assert ends is not None
        expert_E1 = torch.arange(experts, device=ends.device)[:, None]
        return (expert_E1 == _expert_of_row(ends, len(grad_RC))).to(grad_RC.dtype) @ grad_RC
    if rows is None:  # as a product with ones, in as many columns as the kernel asks for
        ones = torch.ones(
            len(grad_RC), _ALIGNMENT // grad_RC.element_size(), dtype=grad_RC.dtype, device=grad_RC.device
        )
        return F.grouped_mm(ones.T, grad_RC, offs=ends)[:, 0]
    sums = grad_RC.new_empty(experts, grad_RC.shape[1])
    for expert, (grad,) in _of_each_expert(rows, grad_RC):
        torch.sum(grad, dim=0, out=sums[expert])
    return sums


def _expert_of_row(ends_E: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(ends_E, torch.arange(rows, dtype=torch.int32, device=ends_E.device), right=True)


def _of_each_expert(rows: Sequence[int], *values_R: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each expert with its part of the values, which may be empty: products over no rows are zero."""
    return enumerate(zip(*(torch.split(values, list(rows)) for values in values_R), strict=True))


class Gelu(torch.autograd.Function):
    """Tanh-approximated, of a value whose one use is a product: its gradient is written over that of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)


class SwiGLU(torch.autograd.Function):
    """silu(left half of the columns) * right half; keeps its argument alone, and its result has one use, a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_up = F.silu(gate).mul_(grad)
        return torch.cat([torch.ops.aten.silu_backward(grad.mul_(up), gate), grad_up], dim=-1)
