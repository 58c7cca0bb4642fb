"""The mixture-of-experts layer of one device: router, dispatcher, experts, and the sum that brings them together.

Shape legend: B images, S tokens an image, T = B * S local tokens, D width, H hidden width, N experts, A assignments
of a token to an expert, R rows that the experts at hand compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffmoe_dist.model.routing import Router, Routing


@dataclass(frozen=True)
class ExpertInput:
    """The rows for the experts at hand, expert by expert."""

    x_RD: Tensor
    tokens_per_expert: Tensor  # (experts at hand,) int64
    uniform: int | None  # rows of every expert, where they all have the same number and it is known on the host


class Dispatcher(Protocol):
    """Moves tokens to their experts and the results back."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[ExpertInput, Any]:
        """Returns the rows for the experts at hand, and a plan that `combine` needs."""
        ...

    def combine(self, y_RD: Tensor, x_TD: Tensor, routing: Routing, plan: Any) -> Tensor:
        """(T, D): for each token the sum over its experts of gate times result, zero where it has none."""
        ...


class LocalDispatcher:
    """Every expert is on this device: gather the rows, and add the results up."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[ExpertInput, None]:
        uniform = routing.pool.slots_per_expert if routing.pool.pool_ranks == 1 else None
        rows = ExpertInput(x_TD.index_select(0, routing.token_index), routing.stats.tokens_per_expert, uniform)
        return rows, None

    def combine(self, y_RD: Tensor, x_TD: Tensor, routing: Routing, plan: None) -> Tensor:
        return weighted_sum(y_RD, routing, x_TD)


def weighted_sum(y_AD: Tensor, routing: Routing, x_TD: Tensor) -> Tensor:
    """(T, D) in x's type: results times gates, added up by token."""
    weighted_AD = y_AD * routing.gate[:, None].to(y_AD.dtype)
    return torch.zeros_like(x_TD).index_add_(0, routing.token_index, weighted_AD)  # in place: spares a copy


class Experts(nn.Module):
    """N two-layer MLPs with a tanh-approximated GELU, their weights stacked: all of them in one batched matmul.

    `first` is the global id of the first expert at hand; a device that holds a share of them holds consecutive ones.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_hidden_size: int) -> None:
        super().__init__()
        self.first = 0
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_size, expert_hidden_size))
        self.b1 = nn.Parameter(torch.empty(num_experts, expert_hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, expert_hidden_size, hidden_size))
        self.b2 = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, rows: ExpertInput) -> Tensor:
        """The results, (R, D), in the order of the rows."""
        if rows.uniform is not None:
            return _batched_mlp(rows.x_RD, rows.uniform, self.w1, self.b1, self.w2, self.b2)
        return _grouped_mlp(rows.x_RD, rows.tokens_per_expert, self.w1, self.b1, self.w2, self.b2)


def _batched_mlp(x_RD: Tensor, rows_per_expert: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    x = x_RD.view(len(w1), rows_per_expert, x_RD.shape[1])
    h = torch.baddbmm(b1[:, None], x, w1)
    return _GeluLinear.apply(h, w2, b2).view(x_RD.shape)


class _GeluLinear(torch.autograd.Function):
    """gelu(h) @ w + b by the formulas of autograd, which would allocate a second gradient of h's size."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        activated = F.gelu(h, approximate="tanh")
        ctx.save_for_backward(h, activated, w)
        return torch.baddbmm(b[:, None], activated, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        h, activated, w = ctx.saved_tensors
        grad_h = grad @ w.mT
        torch.ops.aten.gelu_backward.grad_input(grad_h, h, approximate="tanh", grad_input=grad_h)  # in place
        return grad_h, activated.mT @ grad, grad.sum(dim=1)


def _grouped_mlp(x_RD: Tensor, tokens_per_expert: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    ends = tokens_per_expert.cumsum(0).to(torch.int32)
    expert_of_row = torch.repeat_interleave(tokens_per_expert, output_size=len(x_RD))
    h = F.gelu(F.grouped_mm(x_RD, w1, offs=ends) + b1[expert_of_row], approximate="tanh")
    return F.grouped_mm(h, w2, offs=ends) + b2[expert_of_row]


class MoELayer(nn.Module):
    """A feed-forward layer whose experts each compute the tokens that the router gives them."""

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD)
        rows, plan = self.dispatcher.dispatch(x_TD, routing)
        y_TD = self.dispatcher.combine(self.experts(rows), x_TD, routing, plan)
        return y_TD.view_as(x_BSD), routing
