"""The mixture-of-experts layer of one device: router, dispatcher, experts, and the weighted sum of their outputs.

Shape legend: B images, S tokens an image, T = B * S local tokens, D width, H hidden width, N experts, A assignments
of a token to an expert, R rows that the experts of this device compute, E experts of this device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffmoe_dist.model.precision import fp32_products, product_type
from diffmoe_dist.model.routing import Router, Routing


@dataclass(frozen=True)
class ExpertInput:
    """The rows for the experts of this device, ordered by expert."""

    x_RD: Tensor
    tokens_per_expert: Tensor  # (E,) int64
    rows_per_expert: int | None  # the same number for every expert, known on the host; None: see tokens_per_expert


class Dispatcher(Protocol):
    """Moves tokens to their experts and the results back."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[ExpertInput, Any]:
        """The rows for the experts of this device, and a plan that `combine` needs."""
        ...

    def combine(self, y_RD: Tensor, x_TD: Tensor, routing: Routing, plan: Any) -> Tensor:
        """(T, D): for each token the sum over its experts of gate times result, zero where it has none."""
        ...


class LocalDispatcher:
    """All experts are on this device: gathers the rows, and adds the results up."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[ExpertInput, None]:
        slots = routing.pool.slots_per_expert if routing.pool.pool_ranks == 1 else None
        return ExpertInput(x_TD.index_select(0, routing.token_index), routing.stats.tokens_per_expert, slots), None

    def combine(self, y_RD: Tensor, x_TD: Tensor, routing: Routing, plan: None) -> Tensor:
        return weighted_sum(y_RD, routing, x_TD)


def weighted_sum(y_AD: Tensor, routing: Routing, x_TD: Tensor) -> Tensor:
    """(T, D) in x's type: results times gates, added up by token."""
    return _WeightedSum.apply(y_AD, routing.gate.to(x_TD.dtype), routing.token_index, x_TD)


class _WeightedSum(torch.autograd.Function):
    """By the formulas of autograd, which would also keep the products."""

    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, gate_A: Tensor, token_index: Tensor, x_TD: Tensor) -> Tensor:
        ctx.save_for_backward(y_AD, gate_A, token_index)
        return torch.zeros_like(x_TD).index_add_(0, token_index, y_AD * gate_A[:, None])  # in place: spares a copy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_AD, gate_A, token_index = ctx.saved_tensors
        grad_AD = grad_TD.index_select(0, token_index)
        return (grad_AD * gate_A[:, None]).to(y_AD.dtype), (grad_AD * y_AD).sum(dim=1), None, None


class Experts(nn.Module):
    """N two-layer MLPs, their weights stacked: all of them in one batched or one grouped matmul.

    With `gelu` they are tanh-approximated GELU MLPs with biases; with `swiglu` they have no biases, and the columns of
    `w1` are the gate's and then the up-projection's.

    `first` is the global id of the first expert of this device: where experts are sharded, each device holds
    consecutive ones.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_hidden_size: int, activation: str = "gelu") -> None:
        super().__init__()
        self.first = 0
        self.activation = activation
        columns = expert_hidden_size * (2 if activation == "swiglu" else 1)
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_size, columns))
        self.w2 = nn.Parameter(torch.empty(num_experts, expert_hidden_size, hidden_size))
        self.b1, self.b2 = None, None
        if activation == "gelu":
            self.b1 = nn.Parameter(torch.empty(num_experts, expert_hidden_size))
            self.b2 = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, rows: ExpertInput) -> Tensor:
        """The results, (R, D), in the order of the rows and in their type, to which the weights are rounded."""
        kind = rows.x_RD.dtype
        w1, w2 = self.w1.to(kind), self.w2.to(kind)
        if self.b1 is None or self.b2 is None:
            gate_RH, up_RH = _matmul(rows.x_RD, w1, rows).chunk(2, dim=-1)
            return _matmul(F.silu(gate_RH) * up_RH, w2, rows)
        b1, b2 = self.b1.to(kind), self.b2.to(kind)
        if rows.rows_per_expert is not None:
            return _batched_mlp(rows.x_RD, rows.rows_per_expert, w1, b1, w2, b2)
        return _grouped_mlp(rows, w1, b1, w2, b2)


def _matmul(x_R: Tensor, w: Tensor, rows: ExpertInput) -> Tensor:
    """Each row times the matrix of its expert."""
    if rows.rows_per_expert is not None:
        return (x_R.view(len(w), rows.rows_per_expert, -1) @ w).flatten(0, 1)
    return F.grouped_mm(x_R, w, offs=rows.tokens_per_expert.cumsum(0).to(torch.int32))


def _batched_mlp(x_RD: Tensor, rows_per_expert: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    x = x_RD.view(len(w1), rows_per_expert, x_RD.shape[1])
    h = _Gelu.apply(torch.baddbmm(b1[:, None], x, w1))
    return torch.baddbmm(b2[:, None], h, w2).view(x_RD.shape)


class _Gelu(torch.autograd.Function):
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


def _grouped_mlp(rows: ExpertInput, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    expert_of_row = torch.repeat_interleave(rows.tokens_per_expert, output_size=len(rows.x_RD))
    of_expert_ER = (torch.arange(len(b1), device=b1.device)[:, None] == expert_of_row).to(b1.dtype)
    bias_RD = _BiasOfRows.apply(
        b2, expert_of_row, of_expert_ER
    )  # what is kept for backward comes before the last product: see model.recompute
    h = F.gelu(_matmul(rows.x_RD, w1, rows) + _BiasOfRows.apply(b1, expert_of_row, of_expert_ER), approximate="tanh")
    return _matmul(h, w2, rows) + bias_RD


class _BiasOfRows(torch.autograd.Function):
    """b[expert_of_row]; the gradient is a product, which adds up in fp32, where an index would round at each row."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, expert_of_row: Tensor, of_expert_ER: Tensor) -> Tensor:
        ctx.save_for_backward(of_expert_ER)
        return b[expert_of_row]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (of_expert_ER,) = ctx.saved_tensors
        return of_expert_ER @ grad, None, None


class MoELayer(nn.Module):
    """A feed-forward layer whose experts each compute the tokens that the router assigns to them.

    Beside the routed experts there may be a shared expert, for every token, and an unconditional expert, for the tokens
    of unconditional images (ProMoE eq. 5). These two are not sharded: every device holds them whole.
    """

    def __init__(
        self, router: Router, experts: Experts, shared: nn.Module | None = None, unconditional: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.unconditional = unconditional
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BSD: Tensor, null_B: Tensor) -> tuple[Tensor, Routing]:
        """
        Args:
            x_BSD: the tokens.
            null_B: bool, true for unconditional images (null label or null caption).
        """
        x_TD = x_BSD.flatten(0, 1)
        null_T = null_B.repeat_interleave(x_BSD.shape[1])
        with fp32_products(x_TD.device):
            routing = self.router(x_TD, null_T)
        low_TD = x_TD.to(product_type(x_TD))  # rounded once, and so sent to the experts
        rows, plan = self.dispatcher.dispatch(low_TD, routing)
        y_TD = self.dispatcher.combine(self.experts(rows), x_TD, routing, plan)
        if self.shared is not None:
            y_TD = y_TD + self.shared(low_TD)
        if self.unconditional is not None:
            null_index = null_T.nonzero()[:, 0]
            of_null = self.unconditional(low_TD.index_select(0, null_index))
            y_TD = y_TD.index_add(0, null_index, of_null.to(y_TD.dtype))
        return y_TD.view_as(x_BSD), routing
