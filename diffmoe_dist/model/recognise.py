"""Which model a published file holds, as far as the names and shapes of its tensors tell.

Shape legend: D width, H hidden width, N experts, p patch size, C channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Size

from diffmoe_dist.errors import UserError

# Heads of the published models of a width (DiffMoE Table 1; ProMoE's configurations).
_HEADS = {384: 6, 768: 12, 960: 16, 1024: 16, 1152: 16}
# What decides the layout and the router: a tensor in a mixture-of-experts layer, in this order.
_ROUTERS = {
    "cluster_centers": ("promoe", "prototype"),
    "gate.weight": ("diffmoe", "token_choice"),
    "expert_threshold": ("diffmoe", "global_pool"),
    "gate_weight": ("diffmoe", "expert_choice"),
}


@dataclass
class Recognised:
    """Settings by section and name, and of some what they stand on, where no tensor says it."""

    layout: str
    settings: dict[str, dict[str, Any]]
    guesses: dict[str, str] = field(default_factory=dict)  # by `section.name`; of one without a value, what to give


def recognise(shapes: Mapping[str, Size], file: str) -> Recognised:
    """The model of a state dict with published names; settings that are the defaults are left out.

    Raises:
        UserError: the file has not the names of DiT, DiffMoE or ProMoE.
    """
    tensors = _Tensors(shapes, file)
    block = "blocks.0.attn"
    patch = tensors.shape("x_embedder.proj.weight", 4)  # (D, C, p, p)
    width, channels, patch_size = patch[0], patch[1], patch[2]
    depth = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name)))
    model: dict[str, Any] = {"depth": depth, "hidden_size": width}
    recognised = Recognised("dit", {"model": model})
    _heads(tensors, recognised, width, tensors.shape(f"{block}.qkv.weight", 2)[0] // 3)
    tokens = tensors.shape("pos_embed", 3)[1]
    model |= {"patch_size": patch_size, "input_size": math.isqrt(tokens) * patch_size, "in_channels": channels}
    model["num_classes"] = tensors.shape("y_embedder.embedding_table.weight", 2)[0] - 1
    model["learn_sigma"] = tensors.shape("final_layer.linear.weight", 2)[0] == 2 * channels * patch_size**2
    moe_blocks = [n for n in range(depth) if tensors.any(f"blocks.{n}.mlp.experts.")]
    dense = [n for n in range(depth) if n not in moe_blocks]
    if dense:
        hidden, activation = _mlp(tensors, f"blocks.{dense[0]}.mlp.")
        model |= {"mlp_ratio": _ratio(hidden, width), "activation": activation}
    if moe_blocks:
        _experts(tensors, recognised, moe_blocks, depth)
    _objective(recognised)
    return recognised


class _Tensors:
    def __init__(self, shapes: Mapping[str, Size], file: str) -> None:
        self.shapes, self.file = shapes, file

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        shape = tuple(self.shapes.get(name, ()))
        if len(shape) != dimensions or 0 in shape:
            found = f"has shape {list(shape)}" if name in self.shapes else "is missing"
            raise UserError(
                f"{self.file}: {name} {found}, so it is no file of DiT, DiffMoE or ProMoE; give one of them"
            )
        return shape

    def any(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)


def _heads(tensors: _Tensors, recognised: Recognised, width: int, inner: int) -> None:
    """Heads, their width and norm. `inner`: heads times their width."""
    model, norm = recognised.settings["model"], "blocks.0.attn.q_norm."
    heads, of_width = _HEADS.get(width), f"published models of width {width} have as many"
    if f"{norm}weight" in tensors.shapes:
        head_dim = tensors.shape(f"{norm}weight", 1)[0]
        model |= {"num_heads": inner // head_dim, "qk_norm": "layer" if f"{norm}bias" in tensors.shapes else "rms"}
        if inner != width:
            model["head_dim"] = head_dim
    elif heads is not None and inner % heads == 0:
        model["num_heads"] = heads
        recognised.guesses["model.num_heads"] = of_width + (
            "; those of DiffMoE's 128-pixel configuration 16" if width == 384 else ""
        )
        if inner != width:
            model["head_dim"] = inner // heads
            recognised.guesses["model.head_dim"] = f"heads times their width are {inner}"
    else:
        what = "" if inner == width else f" and model.head_dim, whose product is {inner}"
        recognised.guesses["model.num_heads"] = f"no tensor tells; give model.num_heads{what}"


def _mlp(tensors: _Tensors, name: str) -> tuple[int, str]:
    """Hidden width and activation."""
    if f"{name}gate_proj.weight" in tensors.shapes:
        return tensors.shape(f"{name}gate_proj.weight", 2)[0], "swiglu"
    linear = "up_proj" if f"{name}up_proj.weight" in tensors.shapes else "fc1"
    return tensors.shape(f"{name}{linear}.weight", 2)[0], "gelu"


def _ratio(hidden: int, width: int) -> float:
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _experts(tensors: _Tensors, recognised: Recognised, blocks: list[int], depth: int) -> None:
    width, layer = recognised.settings["model"]["hidden_size"], f"blocks.{blocks[0]}.mlp."
    for tensor, of_tensor in _ROUTERS.items():
        if f"{layer}{tensor}" in tensors.shapes:
            recognised.layout, router = of_tensor
            break
    else:
        raise UserError(
            f"{tensors.file}: {layer}experts have no router of DiffMoE or ProMoE beside them; if this is a file of "
            "this project, config.json beside it has its settings"
        )
    router_shape = tensors.shape(f"{layer}{tensor}", 1 if tensor == "expert_threshold" else 2)
    hidden, activation = _mlp(tensors, f"{layer}experts.0.")
    named = {tuple(range(1, depth, 2)): "odd", tuple(range(depth)): "all"}
    moe: dict[str, Any] = {
        "router": router,
        "num_experts": router_shape[0],
        "blocks": named.get(tuple(blocks), blocks),
        "expert_mlp_ratio": _ratio(hidden, width),
        "activation": activation,
    }
    if "activation" not in recognised.settings["model"]:  # no dense layer
        recognised.settings["model"]["activation"] = activation
    moe |= _shared(tensors, layer, width, hidden)
    recognised.settings["moe"] = moe
    _of_router(tensors, recognised, layer)


def _shared(tensors: _Tensors, layer: str, width: int, expert_hidden: int) -> dict[str, Any]:
    for name in (f"{layer}shared_experts.", f"{layer}shared_expert."):
        if tensors.any(name):
            hidden, activation = _mlp(tensors, name)
            unit = width if activation == "swiglu" else expert_hidden  # as TC-DiT and EC-DiT count them
            several = hidden // unit if hidden % unit == 0 else 1
            return {
                "shared_experts": several,
                "shared_mlp_ratio": _ratio(hidden // several, width),
                "shared_activation": activation,
            }
    return {"shared_experts": 0}


def _of_router(tensors: _Tensors, recognised: Recognised, layer: str) -> None:
    """Settings of one router alone, as published where no tensor tells."""
    moe, guesses, published = recognised.settings["moe"], recognised.guesses, "as published"
    if moe["router"] == "prototype":
        extra = f"{layer}experts.{moe['num_experts']}."
        moe |= {"unconditional_expert": tensors.any(extra), "variant": "token_choice", "top_k": 1, "scores": "identity"}
        guesses |= dict.fromkeys(("moe.variant", "moe.top_k", "moe.scores"), published)
    elif moe["router"] == "token_choice":
        moe["top_k"], guesses["moe.top_k"] = 1, published
    else:
        moe["capacity"], guesses["moe.capacity"] = 1.0, published
        predicts = tensors.any(f"{layer}capacity_predictor.")
        if moe["router"] == "expert_choice" and predicts:
            moe["capacity_predictor"] = True
        elif predicts:
            moe["inference"], guesses["moe.inference"] = "count", "the rule of the published code"


def _objective(recognised: Recognised) -> None:
    """Of the code base. No tensor tells it but a learned variance, which flows have too."""
    flow: dict[str, Any] = {"name": "flow", "direction": "data_at_one", "time_scale": 1.0}
    choices: dict[str, tuple[dict[str, Any], str]] = {
        "diffmoe": (flow, "DiffMoE's flow; its DDPM models have name: ddpm alone"),
        "promoe": (
            {**flow, "time_distribution": "logit_normal", "direction": "noise_at_one", "time_scale": 1000.0},
            "ProMoE's flow",
        ),
        "dit": ({"name": "ddpm"}, "DiT's; for SiT and DiffMoE's dense models flow, data_at_one, time_scale 1"),
    }
    objective, source = choices[recognised.layout]
    if objective["name"] == "ddpm" and not recognised.settings["model"]["learn_sigma"]:
        objective, source = flow, "a guess: DiT's DDPM has a learned variance"
    recognised.settings["objective"] = objective
    recognised.guesses["objective.name"] = source
