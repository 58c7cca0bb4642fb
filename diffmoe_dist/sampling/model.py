"""The model of a sampling job: opened, its thresholds found anew where asked for, its experts sharded over ranks."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.stream import StreamedData
from diffmoe_dist.engine.weights import read_model, read_settings
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.precision import check_device, set_weight_type, tf32_products
from diffmoe_dist.sampling.calibration import recalibrate_on_training_data
from diffmoe_dist.sampling.settings import SamplingSettings


def open_model(
    settings: SamplingSettings,
    checkpoint: Path,
    device: torch.device,
    launch: Launch,
    data: TrainingData | StreamedData | None,
) -> tuple[DiT, str]:
    """The model as it is to compute, and the fingerprint of its fp32 weights with the thresholds of the checkpoint.

    Args:
        data: of the run, for --recalibrate.

    Raises:
        UserError: the checkpoint is damaged, --expert or --recalibrate is not for its model, or the GPU has no bf16 and
            is asked for it.
    """
    shard = None
    if settings.expert > 1:
        shard = partial(shard_experts, expert=settings.expert, device=device, launch=launch)
    precision = [] if settings.precision is None else [f"precision={settings.precision}"]
    overrides = [*settings.overrides, *precision]
    check_device(device, read_settings(checkpoint, overrides).precision)
    model, config = read_model(checkpoint, device, overrides, shard, settings.ema_decay, settings.ema_length)
    weights = weights_fingerprint(model, settings.expert > 1)
    set_weight_type(model, config.precision)
    if data is not None:
        with tf32_products(device, uses_tf32(settings, config)):
            recalibrate_on_training_data(model, config, data, settings.recalibrate, settings.batch_size)
    return model, weights


def uses_tf32(settings: SamplingSettings, config: Config) -> bool:
    """Whether products of fp32 matrices use TF32 where CUDA has it: as in the run, unless --precision is given."""
    return config.tf32 and settings.precision is None


def shard_experts(model: DiT, config: Config, *, expert: int, device: torch.device, launch: Launch) -> None:
    """Leave this rank its part of the experts; the images of a rank still compete among themselves only.

    Raises:
        UserError: the experts do not divide over the ranks.
    """
    from diffmoe_dist.parallel.expert_parallel import apply_expert_parallel, create_topology  # imports deepspeed

    experts = config.experts
    if experts is None:
        raise UserError(f"--expert {expert} needs experts, but moe.router=dense has none; leave it out")
    if launch.world_size % expert or experts.num_experts % expert:
        raise UserError(
            f"--expert {expert} must divide the {launch.world_size} ranks and moe.num_experts={experts.num_experts}"
        )
    topology = create_topology(launch, device, expert)
    pools = [getattr(layer.router, "pool", None) for layer in model.moe_layers]
    apply_expert_parallel(model, config, topology)
    for layer, pool in zip(model.moe_layers, pools, strict=True):
        if pool is not None:
            layer.router.pool = pool


def weights_fingerprint(model: DiT, is_sharded: bool) -> str:
    """SHA-256 over all parameters and buffers, whichever ranks hold the experts; collective where they are sharded."""
    digests: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        first = getattr(model.get_submodule(name.rpartition(".")[0]), "first", None)
        parts = {name: tensor}
        if first is not None:
            parts = {f"{name}.{first + local}": part for local, part in enumerate(tensor)}
        digests |= {part_name: _sha256(part) for part_name, part in parts.items()}
    if is_sharded:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, digests)
        digests = {name: digest for of_rank in everyone for name, digest in of_rank.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _sha256(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()
