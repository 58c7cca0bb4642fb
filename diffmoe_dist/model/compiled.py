"""Blocks by torch.compile: a dense one whole, one with experts part by part; equal parts share one compiled code.

Routers, what moves tokens and the weighted sum of results stay as they are. So do experts whose numbers of rows differ,
unless one grouped product computes them, which the compiler knows in bf16 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.expert_products import is_grouped
from diffmoe_dist.model.moe import ExpertInput, MoELayer


def apply_compile(model: DiT, recompute: str) -> None:
    """Edit a model in place; `model.state_dict()` keeps its names. Nothing is compiled before a part is first called.
    Without gradients nothing changes.

    Args:
        recompute: the mode of `apply_recompute`, which is to be called afterwards: what it computes again is a compiled
            part of its own.
    """
    if any(not parameter.requires_grad for parameter in model.parameters()):
        # What differs in its frozen parameters is other code; by default the ninth is an error.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 8 + len(model.blocks))
    for block in model.blocks:
        layer = block.mlp
        if recompute == "none":  # the fewer parts, the fewer calls and the more is fused
            parts = ["enter", "add"] if isinstance(layer, MoELayer) else ["dense"]
        else:
            parts = ["attend", "normalize" if isinstance(layer, MoELayer) else "feed", "add"]
        for part in parts:
            _compile(block, part)
        if isinstance(layer, MoELayer):
            layer.experts.forward = _CompiledExperts(layer.experts)  # type: ignore[method-assign]
            if layer.shared is not None:
                _compile(layer.shared, "forward")
            if layer.unconditional is not None:
                _compile(layer.unconditional, "forward", dynamic=True)  # its rows are another number in each step


def _compile(module: Any, name: str, dynamic: bool = False) -> None:
    # Of this instance; the module stays, and with it the names of its tensors.
    setattr(module, name, _Compiled(getattr(module, name), dynamic))


class _Compiled:
    """A function that is compiled where gradients are asked for: samples and validation have other shapes."""

    def __init__(self, function: Callable[..., Any], dynamic: bool) -> None:
        self.function = function
        self.compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)

    def __call__(self, *inputs: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.function)(*inputs)


class _CompiledExperts:
    """The experts' forward, compiled where all have one number of rows, or where a grouped product computes them."""

    def __init__(self, experts: Any) -> None:
        self.experts, self.eager = experts, experts.forward
        self.even, self.ragged = _Compiled(self.eager, dynamic=False), _Compiled(self.eager, dynamic=True)

    def __call__(self, rows: ExpertInput) -> Tensor:
        if rows.rows_per_expert is not None:
            return self.even(rows)
        if rows.counts != [0] * len(self.experts.w1) and is_grouped(rows.x, self.experts.w1, self.experts.w2):
            return self.ragged(replace(rows, counts=None))  # other counts would be other code
        return self.eager(rows)
