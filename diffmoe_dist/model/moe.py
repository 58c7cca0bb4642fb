"""The mixture-of-experts layer of one device: router, dispatcher, experts, and the weighted sum of their outputs.

Shape legend: B images, S tokens an image, T = B * S local tokens, D width, H hidden width, N experts, A assignments
of a token to an expert, R rows that the experts of this device compute, E experts of this device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from diffmoe_dist.model.expert_products import Gelu, SwiGLU, expert_linear, is_grouped
from diffmoe_dist.model.precision import fp32_products, product_type
from diffmoe_dist.model.routing import Router, Routing


@dataclass(frozen=True)
class ExpertInput:
    """The rows for the experts of this device, ordered by expert."""

    x: Tensor  # the rows (R, D), or with a token_index the tokens (T, D) that it picks them from
    tokens_per_expert: Tensor  # (E,) int64
    rows_per_expert: int | None  # the same number for every expert, known on the host; None: see tokens_per_expert
    counts: Sequence[int] | None = None  # tokens_per_expert on the host, where it has them
    token_index: Tensor | None = None  # (R,)


@dataclass(frozen=True)
class LocalDispatch:
    """Where the rows of a layer come from, and where the results go."""

    x_TD: Tensor
    token_index: Tensor  # (A,)
    gate: Tensor  # (A,)
    routing: Routing
    counts: Sequence[int] | None  # of the tokens of each expert, where the host knows them


class Dispatcher(Protocol):
    """Moves tokens to their experts and the results back."""

    def counts(self, routing: Routing, by_expert: bool) -> Tensor | None:
        """What the host has to read before `start`, (n,) int64; None where it knows all that it needs.

        Args:
            by_expert: whether it needs the number of rows of each expert, also where rows can move without it.
        """
        ...

    def start(self, x_TD: Tensor, routing: Routing, counts: Tensor | None, on_host: Sequence[int] | None) -> Any:
        """Send the tokens on their way. `on_host`: the counts, as the host has read them."""
        ...

    def rows(self, dispatch: Any) -> ExpertInput:
        """Wait for the rows for the experts of this device."""
        ...

    def combine(self, y_RD: Tensor, dispatch: Any, dtype: torch.dtype) -> Tensor:
        """(T, D) of this type: for each token the sum over its experts of gate times result, zero where it has none."""
        ...


class LocalDispatcher:
    """All experts are on this device: rows are picked where they are multiplied, and the results added up."""

    def counts(self, routing: Routing, by_expert: bool) -> Tensor | None:
        pool = routing.pool
        known = pool.slots_here is not None or (pool.token_index is not None and not by_expert)
        return None if known else routing.stats.tokens_per_expert

    def start(
        self, x_TD: Tensor, routing: Routing, counts: Tensor | None, on_host: Sequence[int] | None
    ) -> LocalDispatch:
        token_index, gate = routing.assignments(None if on_host is None else sum(on_host))
        return LocalDispatch(x_TD, token_index, gate, routing, on_host)

    def rows(self, dispatch: LocalDispatch) -> ExpertInput:
        tokens_per_expert, slots = dispatch.routing.stats.tokens_per_expert, dispatch.routing.pool.slots_here
        return ExpertInput(dispatch.x_TD, tokens_per_expert, slots, dispatch.counts, dispatch.token_index)

    def combine(self, y_RD: Tensor, dispatch: LocalDispatch, dtype: torch.dtype) -> Tensor:
        return weighted_sum(y_RD, dispatch.gate, dispatch.token_index, len(dispatch.x_TD), dtype)


def weighted_sum(y_AD: Tensor, gate_A: Tensor, token_index: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """(T, D) of type `dtype`: results times gates, added up by token."""
    return _WeightedSum.apply(y_AD, gate_A, token_index, tokens, dtype)


def made_again(h: Tensor) -> AbstractContextManager[object]:
    """Within it nobody keeps `h` for backward, which a layer returned: backward adds it up once more.

    What it is made of, the experts' results and gates, is kept for the gradients of the layer. A result that has more
    in it, a shared or an unconditional expert's, is kept; so is one of gates without a gradient.
    """
    source: Any = None if h._base is None else h._base.grad_fn
    is_sum = isinstance(source, _WeightedSum._backward_cls)
    if not is_sum or not source.keeps_results:
        return nullcontext()
    place, shape = h.data_ptr(), h.shape

    def pack(tensor: Tensor) -> Tensor | None:
        return None if tensor.data_ptr() == place and tensor.shape == shape else tensor

    def unpack(kept: Tensor | None) -> Tensor:
        return _add_up(*source.saved_tensors, *source.sizes).view(shape) if kept is None else kept

    return saved_tensors_hooks(pack, unpack)


class _WeightedSum(torch.autograd.Function):
    """By the formulas of autograd, which would also keep the products. Gates stay in fp32."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, token_index: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        ctx.keeps_results = ctx.needs_input_grad[1]
        ctx.save_for_backward(y if ctx.keeps_results else None, gate, token_index)
        ctx.sizes, ctx.dtype = (tokens, dtype), y.dtype
        return _add_up(y, gate, token_index, tokens, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        y, gate, token_index = ctx.saved_tensors
        grad = grad_TD.index_select(0, token_index)
        grad_gate = None if y is None else (grad * y).sum(dim=1, dtype=gate.dtype)
        grad_y = grad if grad.dtype == ctx.dtype else torch.empty_like(grad, dtype=ctx.dtype)
        torch.mul(grad, gate[:, None], out=grad_y)
        return grad_y, grad_gate, None, None, None


@torch.no_grad()
def _add_up(y: Tensor, gate: Tensor, token_index: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    weighted = torch.empty_like(y, dtype=dtype)
    torch.mul(y, gate[:, None], out=weighted)
    return weighted.new_zeros(tokens, y.shape[1]).index_add_(0, token_index, weighted)  # in place: spares a copy


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
        groups: tuple[int | Sequence[int] | None, Tensor | None] = (rows.rows_per_expert, None)
        if rows.rows_per_expert is None:
            # A grouped product of no rows at all has no kernel.
            picked = rows.x if rows.token_index is None else rows.token_index
            nothing = not torch.compiler.is_compiling() and len(picked) == 0
            if is_grouped(rows.x, self.w1, self.w2) and not nothing:
                groups = (None, rows.tokens_per_expert.cumsum(0, dtype=torch.int32))
            else:
                groups = (rows.tokens_per_expert.tolist() if rows.counts is None else rows.counts, None)
        w1, b1, w2, b2 = (None if w is None else w.to(rows.x.dtype) for w in (self.w1, self.b1, self.w2, self.b2))
        assert w1 is not None and w2 is not None
        h = expert_linear(rows.x, rows.token_index, w1, b1, *groups)
        h = Gelu.apply(h) if self.activation == "gelu" else SwiGLU.apply(h)
        return expert_linear(h, None, w2, b2, *groups)


def read_counts(*counts: Tensor | None) -> list[list[int] | None]:
    """Integers that the host needs to go on, all in one copy: the one place where a layer waits for its device."""
    asked = [count for count in counts if count is not None]
    values = iter(
        torch.cat(asked).tolist() if len(asked) > 1 else [value for count in asked for value in count.tolist()]
    )
    return [None if count is None else [next(values) for _ in range(len(count))] for count in counts]


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
        counts = self.dispatcher.counts(routing, by_expert=not is_grouped(low_TD, self.experts.w1, self.experts.w2))
        nulls = None if self.unconditional is None else null_T.sum(dim=0, keepdim=True)
        on_host, nulls_on_host = read_counts(counts, nulls)
        dispatch = self.dispatcher.start(low_TD, routing, counts, on_host)
        # While the tokens travel:
        shared_TD = None if self.shared is None else self.shared(low_TD)
        of_null = self._unconditional(low_TD, null_T, nulls_on_host)
        y_TD = self.dispatcher.combine(self.experts(self.dispatcher.rows(dispatch)), dispatch, x_TD.dtype)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        if of_null is not None:
            null_index, own_RD = of_null
            y_TD = y_TD.index_add_(0, null_index, own_RD.to(y_TD.dtype))
        return y_TD.view_as(x_BSD), routing

    def _unconditional(self, x_TD: Tensor, null_T: Tensor, nulls: Sequence[int] | None) -> tuple[Tensor, Tensor] | None:
        """The tokens of the unconditional expert, (R,), and what it makes of them, (R, D)."""
        if self.unconditional is None or nulls is None:
            return None
        null_index = null_T.nonzero_static(size=nulls[0])[:, 0]
        return null_index, self.unconditional(x_TD.index_select(0, null_index))
