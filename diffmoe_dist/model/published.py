"""The weights of published models: which of their tensors make up each tensor of ours.

Outside the mixture-of-experts layers our names are DiT's. In those layers each code base has its own names, and one
module for each expert, where we stack all experts into one tensor. SwiGLU has one name in all: gate_proj, up_proj and
down_proj.

Shape legend: D width, H hidden width, N experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffmoe_dist.config import Config, RouterSettings
from diffmoe_dist.errors import UserError

# The routers that the published models of a code base have.
LAYOUTS = {
    "dit": ("dense",),
    "diffmoe": ("dense", "token_choice", "expert_choice", "global_pool"),
    "promoe": ("dense", "prototype"),
}


@dataclass(frozen=True)
class Part:
    """A published tensor that is one of our tensors, or one expert of it, or some of its columns."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None  # its row in our stack of experts; None: the whole tensor
    meaning: Literal["weights", "transposed", "decay"] = "weights"  # decay: see `settled_updates`
    columns: tuple[int, int] | None = None  # of our tensor, the first and the one behind the last; None: all

    def of(self, whole: Tensor) -> Tensor:
        """What this part is of our tensor, in our layout."""
        part = whole if self.expert is None else whole[self.expert]
        return part if self.columns is None else part[:, slice(*self.columns)]


@dataclass(frozen=True)
class _Names:
    """The names in a mixture-of-experts layer of a published file."""

    linear: tuple[str, str]  # the two linear layers of a GELU expert
    expert: str  # the module of expert {e}
    shared: str  # of the shared expert
    unconditional: str  # of the unconditional expert; {N} routed experts
    router: Mapping[str, str]  # our name of a router's tensor -> the published one


_PREDICTOR = [f"capacity_predictor.{place}.{kind}" for place in (0, 2) for kind in ("weight", "bias")]
_POOL_CHOICE = {
    "gate_weight": "gate_weight",
    "threshold": "expert_threshold",
    "threshold_updates": "ema_decay",
    **{name: name for name in _PREDICTOR},
}
_DIFFMOE = _Names(("fc1", "fc2"), "experts.{e}.", "shared_experts.", "", _POOL_CHOICE)
_NAMES = {
    "token_choice": _Names(("fc1", "fc2"), "experts.{e}.", "shared_experts.", "", {"gate_weight": "gate.weight"}),
    "expert_choice": _DIFFMOE,
    "global_pool": _DIFFMOE,
    "prototype": _Names(
        ("up_proj", "down_proj"), "experts.{e}.", "shared_expert.", "experts.{N}.", {"prototypes": "cluster_centers"}
    ),
}
# Upcycling: every expert is a copy of the dense layer, which has no router.
_DENSE_LAYER = _Names(("fc1", "fc2"), "", "", "", {})

# For messages: the settings that decide whether a tensor exists and its shape, by a part of its name.
_SETTINGS = (
    ("pos_embed", "model.input_size, model.patch_size and model.hidden_size"),
    ("q_norm", "model.qk_norm, model.head_dim and model.num_heads"),
    ("k_norm", "model.qk_norm, model.head_dim and model.num_heads"),
    (".attn.", "model.hidden_size, model.depth, model.num_heads and model.head_dim"),
    ("x_embedder", "model.in_channels, model.patch_size and model.hidden_size"),
    ("y_embedder", "model.num_classes and model.hidden_size; of captions, model.condition and model.text_hidden_size"),
    ("cross_attn", "model.condition and model.hidden_size"),
    ("t_embedder", "model.hidden_size"),
    ("final_layer.linear", "model.learn_sigma, model.in_channels and model.patch_size"),
    ("shared_expert", "moe.shared_experts, moe.shared_mlp_ratio and moe.shared_activation"),
    (".experts.", "moe.router, moe.num_experts, moe.blocks, moe.activation and moe.expert_mlp_ratio"),
    (".gate.", "moe.router, moe.num_experts and moe.blocks"),
    ("gate_weight", "moe.router, moe.num_experts and moe.blocks"),
    ("cluster_centers", "moe.router, moe.num_experts and moe.blocks"),
    ("capacity_predictor", "moe.router, moe.num_experts and moe.capacity_predictor"),
    (".mlp.", "moe.router, moe.blocks, model.activation and model.mlp_ratio"),
    ("", "model.hidden_size and model.depth"),
)


def correspondence(
    layout: str,
    config: Config,
    shapes: Mapping[str, torch.Size],
    upcycle: bool = False,
    found: Collection[str] = (),
) -> dict[str, list[Part]]:
    """For each tensor of our model, by name, the published tensors that it is made of.

    Args:
        layout: a key of `LAYOUTS`.
        config: the settings of our model.
        shapes: the names and shapes of our model's tensors.
        upcycle: the file holds a dense model. Every expert of a layer becomes a copy of the dense feed-forward layer,
            and the routers' tensors are left out of the result.
        found: the names in the file, where a layout has two for one tensor.

    Raises:
        UserError: the layout has no such model, or an expert of it cannot be a copy of a dense layer.
    """
    _check_layout(layout, config, upcycle)
    parts = {name: [Part(_dense_name(name, found), tuple(shape))] for name, shape in shapes.items()}
    if config.experts is None:
        return parts
    names = _DENSE_LAYER if upcycle else _NAMES[config.experts.router]
    blocks = {f"blocks.{block}" for block in config.moe_blocks}
    for name, shape in shapes.items():
        block, _, inside = name.partition(".mlp.")
        module, _, tensor = inside.partition(".")
        if block not in blocks or not inside:
            continue
        if upcycle and module == "router":
            del parts[name]
        else:
            layer = f"{block}.mlp."
            parts[name] = _layer_parts(layer, module, tensor, tuple(shape), names, config.experts)
    return parts


def check_buildable(layout: str, config: Config) -> None:
    """Refuse a model that the code of a layout cannot build, so that its file would load nowhere.

    Raises:
        UserError: names the first setting that it does not have.
    """
    model, experts = config.model, config.experts
    width, dense_hidden = model.hidden_size, int(model.hidden_size * model.mlp_ratio)
    problems = {
        f"model.condition={model.condition}": model.condition != "class",
        f"moe.router={config.moe.router}": layout not in LAYOUTS or config.moe.router not in LAYOUTS[layout],
        f"model.qk_norm={model.qk_norm}": model.qk_norm == "rms" or (layout == "dit" and model.qk_norm != "none"),
        f"model.head_dim={model.head_dim}": layout == "dit" and model.num_heads * model.head_dim != width,
        f"model.activation={model.activation}": layout != "diffmoe" and model.activation != "gelu",
    }
    if experts is not None:
        named = [list(range(1, model.depth, 2)), list(range(model.depth))]
        shared = experts.shared_hidden_size(width)
        of_pool = experts.router == "global_pool"  # the one router whose shared experts are GELU, and of one width
        published = ("gelu", shared == 8 * width) if of_pool else ("swiglu", shared % width == 0)
        problems |= {
            f"moe.blocks={experts.blocks}": config.moe_blocks not in named,
            f"moe.activation={experts.activation}": experts.activation != model.activation,
            "moe.capacity_predictor=true": experts.has_predictor() and not of_pool,
        }
        if layout == "diffmoe":
            ratio, kind = f"moe.expert_mlp_ratio={experts.expert_mlp_ratio:g}", experts.shared_activation
            problems[ratio] = int(width * experts.expert_mlp_ratio) != dense_hidden
            problems[f"moe.shared_experts of {kind}, {shared} wide,"] = bool(shared) and published != (kind, True)
        else:
            problems[f"moe.shared_activation={experts.shared_activation}"] = experts.shared_activation != "gelu"
            problems[f"moe.shared_experts={experts.shared_experts}"] = experts.shared_experts > 1
    for setting, is_one in problems.items():
        if is_one:
            raise UserError(
                f"--to {layout}: its code has no model with {setting.rstrip(',')}; --to safetensors takes every model"
            )


def check_tensors(parts: Mapping[str, list[Part]], found: Mapping[str, Tensor], file: str) -> None:
    """Check that the file has exactly the tensors that `parts` needs, of the right shapes, in floating point.

    Args:
        parts: from `correspondence`.
        found: the tensors of the file, by name.
        file: its path, for messages.

    Raises:
        UserError: names the first tensor that is wrong, and the settings that decide its shape.
    """
    needed = {part.name: part.shape for pieces in parts.values() for part in pieces}
    problems = [
        (name, f"has shape {list(found[name].shape)}, but these settings need {list(shape)}")
        for name, shape in needed.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    problems += [
        (name, f"is missing, but these settings need it, of shape {list(shape)}")
        for name, shape in needed.items()
        if name not in found
    ]
    problems += [
        (name, f"of shape {list(tensor.shape)} has no place in a model of these settings")
        for name, tensor in found.items()
        if name not in needed
    ]
    problems += [
        (name, f"is of type {found[name].dtype}, no floating-point numbers")
        for name in needed
        if name in found and not found[name].is_floating_point()
    ]
    if problems:
        name, problem = problems[0]
        more = f" (and {len(problems) - 1} more tensors)" if len(problems) > 1 else ""
        settings = next(settings for key, settings in _SETTINGS if key in name)
        raise UserError(
            f"{file}: {name} {problem}{more}; set {settings} as the file's model has them, and --from (--inspect shows "
            "what it has)"
        )


@torch.no_grad()
def fill(model_tensors: Mapping[str, Tensor], parts: Mapping[str, list[Part]], published: Mapping[str, Tensor]) -> None:
    """Copy published tensors, of any floating-point type, into the tensors of our model, in place."""
    for name, pieces in parts.items():
        for part in pieces:
            source = published[part.name]
            target = part.of(model_tensors[name])
            if part.meaning == "decay":
                target.fill_(settled_updates(as_decay(source)))
            else:
                target.copy_(source.mT if part.meaning == "transposed" else source)


@torch.no_grad()
def as_published(
    model_tensors: Mapping[str, Tensor], parts: Mapping[str, list[Part]], decay: float | None
) -> dict[str, Tensor]:
    """The tensors of our model under their published names: what `fill` undoes.

    Args:
        decay: `moe.threshold_decay`, of models that have one.
    """
    published: dict[str, Tensor] = {}
    for name, pieces in parts.items():
        for part in pieces:
            source = part.of(model_tensors[name])
            if part.meaning == "decay":
                assert decay is not None
                source = torch.tensor([decay])
            published[part.name] = (source.mT if part.meaning == "transposed" else source).clone(
                memory_format=torch.contiguous_format
            )
    return published


def threshold_decay(parts: Mapping[str, list[Part]], published: Mapping[str, Tensor], file: str) -> float | None:
    """The decay of the file's moving averages of capacity thresholds, the same in all layers; None: it has none.

    Raises:
        UserError: it is out of range, or differs between layers.
    """
    decays = {
        part.name: as_decay(published[part.name])
        for pieces in parts.values()
        for part in pieces
        if part.meaning == "decay"
    }
    for name, decay in decays.items():
        if not 0 <= decay < 1:
            raise UserError(f"{file}: {name} is {decay}, which is no decay in [0, 1); repair the file")
    if len(set(decays.values())) > 1:
        raise UserError(
            f"{file}: the decays {sorted(set(decays.values()))} differ between layers, but moe.threshold_decay is one "
            "setting; make them equal in the file"
        )
    return next(iter(decays.values()), None)


def as_decay(ema_decay: Tensor) -> float:
    """(1,) to the decimal number that was stored: 0.95, not 0.949999988079071, its nearest fp32 number."""
    return float(f"{ema_decay.item():.7g}")


def settled_updates(decay: float) -> int:
    """The number of updates that a converted threshold is said to have had, so that it continues as the published one.

    After n updates our moving average corrects its bias by 1 / (1 - decay^n); the published one does not. At this n
    the correction is 1 in double precision.
    """
    return math.ceil(54 * math.log(2) / -math.log(decay)) if decay > 0 else 0


def _check_layout(layout: str, config: Config, upcycle: bool) -> None:
    router = config.moe.router
    if layout not in LAYOUTS:
        raise UserError(f"--from {layout}: unknown layout; choose from {', '.join(LAYOUTS)}")
    if upcycle:
        _check_upcycle(layout, config)
    elif router not in LAYOUTS[layout]:
        if layout == "dit":
            raise UserError(
                f"--from dit is a dense model, but moe.router={router}; use moe.router=dense, or --upcycle to make its "
                "feed-forward layers experts"
            )
        others = [name for name, routers in LAYOUTS.items() if router in routers]
        instead = (
            f"such files have the names of --from {others[0]}, whoever trained them; use that"
            if others
            else (f"choose from {', '.join(LAYOUTS[layout])}")
        )
        raise UserError(f"--from {layout} has no model with moe.router={router}; {instead}")


def _check_upcycle(layout: str, config: Config) -> None:
    model, experts = config.model, config.experts
    if layout != "dit":
        raise UserError(f"--upcycle starts from a dense model; use it with --from dit, not --from {layout}")
    if experts is None:
        raise UserError("--upcycle makes experts, but moe.router=dense has none; choose a router or drop --upcycle")
    for kind, one in (("activation", "expert"), ("shared_activation", "shared")):
        if getattr(experts, kind) != model.activation and (one == "expert" or experts.shared_experts):
            raise UserError(
                f"--upcycle: moe.{kind}={getattr(experts, kind)}, but the dense layers have model.activation="
                f"{model.activation}; an expert that is a copy of one is of its kind: make them equal"
            )
        ratio = getattr(experts, f"{one}_mlp_ratio")
        if int(model.hidden_size * ratio) != int(model.hidden_size * model.mlp_ratio):
            raise UserError(
                f"--upcycle: moe.{one}_mlp_ratio={ratio}, but the dense layers have model.mlp_ratio={model.mlp_ratio}; "
                "an expert that is a copy of one is as wide: make them equal"
            )
    if experts.shared_experts > 1:
        raise UserError(
            f"--upcycle: moe.shared_experts={experts.shared_experts} are one layer of that many times the width, which "
            "no dense layer is a copy of; use 0 or 1"
        )


def _layer_parts(
    layer: str, module: str, tensor: str, shape: tuple[int, ...], names: _Names, experts: RouterSettings
) -> list[Part]:
    """The published tensors of our tensor `layer` + `module`.`tensor`, where `layer` is a mixture of experts."""
    if module == "router":
        if tensor == "threshold_updates":  # the published tensor in its place is the decay, one number
            return [Part(layer + names.router[tensor], (1,), meaning="decay")]
        return [Part(layer + names.router[tensor], shape)]
    if module == "experts":
        every = names.linear if experts.activation == "gelu" else ("gate_proj", "up_proj", "down_proj")
        linears = every[:-1] if tensor[1] == "1" else every[-1:]  # of w1, b1; of w2, b2
        return [
            part
            for e in range(shape[0])
            for part in _expert_parts(f"{layer}{names.expert.format(e=e)}", e, linears, shape[1:])
        ]
    owner = names.shared if module == "shared" else names.unconditional.format(N=experts.num_experts)
    place, kind = tensor.split(".")  # fc1 or fc2, weight or bias; of SwiGLU the published names
    linear = dict(zip(("fc1", "fc2"), names.linear, strict=True)).get(place, place)
    return [Part(f"{layer}{owner}{linear}.{kind}", shape)]


def _expert_parts(expert: str, e: int, linears: Sequence[str], shape: tuple[int, ...]) -> list[Part]:
    """Of expert e, whose published names begin with `expert`: those of our w1, b1, w2 or b2, of that shape for each."""
    if len(shape) == 1:
        return [Part(f"{expert}{linear}.bias", shape, e) for linear in linears]
    fan_in, columns = shape  # w1 is (D, H), of SwiGLU (D, 2 H): the gate's columns first; published weights are (H, D)
    width = columns // len(linears)
    return [
        Part(f"{expert}{linear}.weight", (width, fan_in), e, "transposed", (n * width, (n + 1) * width))
        for n, linear in enumerate(linears)
    ]


def _dense_name(name: str, found: Collection[str]) -> str:
    """ProMoE has other names for the GELU layers of blocks without experts where `use_swiglu` was set."""
    block, _, tensor = name.partition(".mlp.")
    other = {"fc1": "up_proj", "fc2": "down_proj"}
    place, _, kind = tensor.partition(".")
    renamed = f"{block}.mlp.{other.get(place, place)}.{kind}"
    return renamed if place in other and name not in found and renamed in found else name
