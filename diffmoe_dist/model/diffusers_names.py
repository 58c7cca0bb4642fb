"""diffusers' `DiTTransformer2DModel`: its tensors and settings, and the published DiT's, which are ours.

diffusers keeps the embedders of time and label in every block, the same ones, and queries, keys and values apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.embeddings import position_table

NULL_LABEL = 1000  # of its pipeline, whatever the classes
_EMBEDDERS = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2"}
_KINDS = ("weight", "bias")
_TABLE = "y_embedder.embedding_table.weight"
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
# Of its config.json: what the model must be to be ours. What is not there has diffusers' default, which is this.
_ONLY = {
    "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True,
    "norm_elementwise_affine": False, "upcast_attention": False, "cross_attention_dim": None, "num_vector_embeds": None,
}  # fmt: skip


def not_of_dit(config: Config) -> str | None:
    """The first setting of a model that diffusers' DiT does not have; None: it is one."""
    model = config.model
    problems = {
        f"moe.router={config.moe.router}": config.experts is not None,
        f"objective.name={config.objective.name}": config.objective.name != "ddpm",
        f"model.condition={model.condition}": model.condition != "class",
        f"model.num_classes={model.num_classes}": not 1 <= model.num_classes <= NULL_LABEL,
        f"model.qk_norm={model.qk_norm}": model.qk_norm != "none",
        f"model.activation={model.activation}": model.activation != "gelu",
        f"model.mlp_ratio={model.mlp_ratio:g}": int(model.hidden_size * model.mlp_ratio) != 4 * model.hidden_size,
        f"model.head_dim={model.head_dim}": model.num_heads * model.head_dim != model.hidden_size,
    }
    return next((setting for setting, is_one in problems.items() if is_one), None)


def to_diffusers(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The tensors of a dense model under diffusers' names; the null label has the row that its pipeline takes."""
    named: dict[str, Tensor] = {}
    table, blocks = tensors[_TABLE], range(config.model.depth)
    filled = torch.cat([table[:-1], table[-1:].expand(NULL_LABEL + 1 - len(table[:-1]), -1)])
    for ours, theirs in _OUTSIDE.items():
        named |= {f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for kind in _KINDS}
    for n in blocks:
        block = f"transformer_blocks.{n}."
        for kind in _KINDS:
            for ours, theirs in _EMBEDDERS.items():
                named[f"{block}norm1.emb.{theirs}.{kind}"] = tensors[f"{ours}.{kind}"]
            for ours, theirs in _IN_BLOCK.items():
                named[f"{block}{theirs}.{kind}"] = tensors[f"blocks.{n}.{ours}.{kind}"]
            parts = tensors[f"blocks.{n}.attn.qkv.{kind}"].chunk(3)
            named |= {f"{block}attn1.to_{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        named[f"{block}norm1.emb.class_embedder.embedding_table.weight"] = filled
    return {name: tensor.clone() for name, tensor in named.items()}


def from_diffusers(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], num_classes: int | None, named: str
) -> dict[str, Tensor]:
    """The tensors of a `DiTTransformer2DModel` under the published names.

    Args:
        settings: its config.json.
        num_classes: where its pipeline says fewer than its table has rows for.
        named: its folder, for messages.

    Raises:
        UserError: a tensor is missing or unknown, or embedders of the blocks differ.
    """
    left = dict(tensors)

    def take(name: str) -> Tensor:
        if name not in left:
            raise UserError(f"{named}: {name} is missing; give the folder of a DiTTransformer2DModel, and all of it")
        return left.pop(name)

    depth = settings.get("num_layers", 28)
    found = {f"{ours}.{kind}": take(f"{theirs}.{kind}") for ours, theirs in _OUTSIDE.items() for kind in _KINDS}
    for n in range(depth):
        block = f"transformer_blocks.{n}."
        shared = {
            f"{ours}.{kind}": take(f"{block}norm1.emb.{theirs}.{kind}")
            for ours, theirs in _EMBEDDERS.items()
            for kind in _KINDS
        }
        shared[_TABLE] = take(f"{block}norm1.emb.class_embedder.embedding_table.weight")
        for name, tensor in shared.items():
            if not torch.equal(found.setdefault(name, tensor), tensor):
                raise UserError(f"{named}: {name} of block {n} is not that of block 0; a DiT has one for all blocks")
        for kind in _KINDS:
            for ours, theirs in _IN_BLOCK.items():
                found[f"blocks.{n}.{ours}.{kind}"] = take(f"{block}{theirs}.{kind}")
            found[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat([take(f"{block}attn1.to_{name}.{kind}") for name in "qkv"])
    left.pop("pos_embed.pos_embed", None)  # of older versions; it is computed
    if left:
        raise UserError(
            f"{named}: {next(iter(left))} has no place in a DiT; give the folder of a DiTTransformer2DModel"
        )
    if num_classes is not None:
        found[_TABLE] = torch.cat([found[_TABLE][:num_classes], found[_TABLE][-1:]])
    grid = settings.get("sample_size", 32) // settings.get("patch_size", 2)
    return {**found, "pos_embed": position_table(found["x_embedder.proj.weight"].shape[0], grid)}


def settings_of(settings: Mapping[str, Any], num_classes: int | None, named: str) -> dict[str, dict[str, Any]]:
    """Our settings of the model that diffusers' config.json describes.

    Raises:
        UserError: it is another kind of model.
    """
    kind = settings.get("_class_name")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel"):  # its name in older versions
        raise UserError(f"{named}: holds a {kind}; of diffusers DiTTransformer2DModel is read")
    if kind == "Transformer2DModel" and settings.get("norm_type") != "ada_norm_zero":
        raise UserError(f"{named}: norm_type={settings.get('norm_type')}: that is no DiT; give one")
    for name, value in _ONLY.items():
        if settings.get(name, value) != value:
            raise UserError(f"{named}: {name}={settings[name]}: our models have {value}; it cannot be read")
    heads, channels = settings.get("num_attention_heads", 16), settings.get("in_channels", 4)
    out_channels = settings.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise UserError(f"{named}: out_channels={out_channels} is neither {channels} nor twice that; it cannot be read")
    model = {
        "depth": settings.get("num_layers", 28), "hidden_size": heads * settings.get("attention_head_dim", 72),
        "num_heads": heads, "patch_size": settings.get("patch_size", 2), "input_size": settings.get("sample_size", 32),
        "in_channels": channels, "num_classes": num_classes or settings.get("num_embeds_ada_norm", 1000),
        "learn_sigma": out_channels == 2 * channels,
    }  # fmt: skip
    return {"model": model, "moe": {"router": "dense"}, "objective": {"name": "ddpm"}}


def diffusers_settings(config: Config) -> dict[str, Any]:
    """The arguments of `DiTTransformer2DModel` for a dense model of ours."""
    model = config.model
    return {
        "num_attention_heads": model.num_heads, "attention_head_dim": model.head_dim, "num_layers": model.depth,
        "in_channels": model.in_channels, "out_channels": model.in_channels * (2 if model.learn_sigma else 1),
        "sample_size": model.input_size, "patch_size": model.patch_size, "num_embeds_ada_norm": NULL_LABEL,
        "norm_eps": 1e-6,
    }  # fmt: skip
