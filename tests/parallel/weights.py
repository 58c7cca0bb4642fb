"""Weights for models that several ranks hold in parts."""

from __future__ import annotations

import hashlib

import torch

from diffmoe_dist.model.dit import DiT, initialize


@torch.no_grad()
def fill_by_name(model: DiT, num_experts: int) -> None:
    """Initialise, then give every parameter noise that is a function of its name and its experts alone."""
    initialize(model, seed=3)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
        if ".experts." in name:
            first = model.get_submodule(name.rpartition(".")[0]).first
            noise = torch.randn(num_experts, *parameter.shape[1:], generator=generator)[first : first + len(parameter)]
        else:
            noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * 0.3)
