"""Small models that several ranks hold in parts: their settings, and their weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from diffmoe_dist.config import Config, build_config
from diffmoe_dist.model.dit import DiT, initialize


def small_config(model: dict[str, Any], moe: dict[str, Any], parallel: dict[str, Any]) -> Config:
    common = {"num_heads": 2, "mlp_ratio": 2.0, "in_channels": 3, "num_classes": 5}
    places = {"run_dir": "unused", "data": {"shards": "unused"}}
    return build_config({**places, "model": {**common, **model}, "moe": moe, "parallel": parallel})


@torch.no_grad()
def fill_by_name(model: DiT, num_experts: int) -> None:
    """Initialise, then give every parameter noise that is a function of its name and its experts alone."""
    initialize(model, seed=3)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
        if ".experts." in name:
            experts: Any = model.get_submodule(name.rpartition(".")[0])
            first = experts.first
            noise = torch.randn(num_experts, *parameter.shape[1:], generator=generator)[first : first + len(parameter)]
        else:
            noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * 0.3)
