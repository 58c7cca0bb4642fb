"""Selective recomputation: parts of a block keep their inputs alone, and are computed once more in backward.

No router and no exchange of tokens is ever part of what is computed again: a choice is made once, and the tokens that
have arrived for the experts are kept. Layers that tensor parallelism cuts do gather their input once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.moe import ExpertInput, MoELayer


def apply_recompute(model: DiT, mode: Literal["none", "mlp", "block"]) -> None:
    """Edit a model in place; `model.state_dict()` keeps its names. Without gradients nothing changes.

    Args:
        mode: `mlp` computes again the hidden activations of dense MLPs and of routed, shared and unconditional experts,
            and the norm before them. `block` also the attention of each block, with its norms and modulations.
    """
    if mode == "none":
        return
    for block in model.blocks:
        layer = block.mlp
        if isinstance(layer, MoELayer):
            _replace(layer.experts, "forward", partial(_experts_recomputed, layer.experts.forward))
            for expert in (layer.shared, layer.unconditional):
                if expert is not None:
                    _replace(expert, "forward", partial(_recomputed, expert.forward))
        for half in ["normalize" if isinstance(layer, MoELayer) else "feed", *(["attend"] if mode == "block" else [])]:
            _replace(block, half, partial(_recomputed, getattr(block, half)))


def _replace(module: Any, name: str, function: Callable[..., Any]) -> None:
    setattr(module, name, function)  # of this instance; the module stays, and with it the names of its tensors


def _recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    # No part of a block draws random numbers.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _experts_recomputed(forward: Callable[[ExpertInput], Tensor], rows: ExpertInput) -> Any:
    def experts(x: Tensor) -> Tensor:
        return forward(replace(rows, x=x))

    return _recomputed(experts, rows.x)
