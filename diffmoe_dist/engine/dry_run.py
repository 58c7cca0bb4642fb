"""A run that trains nothing: everything is built on the meta device, as the first of any number of ranks, and checked.

The process group is torch's fake one: it has the asked size, and its collectives do nothing. What is not built is
DeepSpeed's engine, which needs memory; its partitions follow from the parameter groups and the process groups here.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffmoe_dist.config import Config, ModelConfig, draw_schedule
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.open import open_data, with_text_encoder
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.data.stream import StreamedData
from diffmoe_dist.engine.fine_tuning import tensors_anew
from diffmoe_dist.engine.progress import Progress, complete_checkpoints
from diffmoe_dist.engine.resume import change_of_ranks, progress_from
from diffmoe_dist.files import format_bytes
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.condition import Condition, TextCondition
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.freezing import frozen_parameters, told
from diffmoe_dist.model.moe import ExpertInput, Experts, MoELayer
from diffmoe_dist.model.routing import Routing
from diffmoe_dist.parallel.expert_parallel import ExpertShard, apply_expert_parallel, create_topology
from diffmoe_dist.parallel.topology import Topology
from diffmoe_dist.planning.memory import persistent_bytes

META = torch.device("meta")


def build_on_meta(config: Config, world_size: int, asked: Mapping[str, int | str] | None = None) -> str:
    """Build what a rank of `world_size` would build, check it, and return a report; config as `for_ranks` returns it.

    Args:
        asked: `wishes` before that, if they were others.

    Raises:
        UserError: something does not fit together, or the data is not whole.
    """
    data = open_data(config)
    config = with_text_encoder(config, data)
    found = complete_checkpoints(Path(config.run_dir) / "checkpoints")
    progress = progress_from(found[-1] if found else None, config, data, world_size, asked)
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        topology = create_topology(
            Launch(0, world_size, 0, "environment"), META, config.parallel.expert, config.parallel.tensor
        )
        with META:
            whole, model = DiT(config), DiT(config)
        apply_expert_parallel(model, config, topology)
        if config.parallel.tensor > 1:
            from diffmoe_dist.parallel.tensor_parallel import apply_tensor_parallel  # imports megatron-core

            apply_tensor_parallel(model, topology)
        _check_experts_cover(whole, config, topology)
        _check_batches(config, progress, world_size)
        _check_forward(model, config)
        lines = _report(config, topology, data, progress, found, whole, model)
        return "".join(f"{name + ':' if name else '':<13}{text}".rstrip() + "\n" for name, text in lines)
    finally:
        dist.destroy_process_group()


def _check_experts_cover(whole: DiT, config: Config, topology: Topology) -> None:
    """The shards of an expert-parallel group's ranks are all experts, each once, in shapes that fit."""
    for rank in range(topology.expert if topology.expert > 1 else 0):
        with META:
            model = DiT(config)
        apply_expert_parallel(model, config, replace(topology, rank=rank))
        for layer, other in zip(whole.moe_layers, model.moe_layers, strict=True):
            shard: Any = other.experts
            assert isinstance(shard, ExpertShard)
            assert shard.first == rank * shard.num_local_experts, "shards follow each other"
            is_last = shard.first + shard.num_local_experts == len(layer.experts.w1)
            assert (rank == topology.expert - 1) == is_last, "the last shard ends with the last expert"
            for name, parameter in layer.experts.named_parameters():
                assert shard.get_parameter(name).shape == (shard.num_local_experts, *parameter.shape[1:]), name


def _check_batches(config: Config, progress: Progress, world_size: int) -> None:
    """The micro-batches of all ranks make up the global batch, each sample once."""
    micro = config.train.micro_batch_size
    positions: list[int] = []
    for rank in range(world_size):
        split = BatchSplit(config.train.global_batch_size, micro, rank, world_size)
        positions += itertools.chain.from_iterable(split.positions(progress.images_seen))
    first = progress.images_seen
    batch = list(range(first, first + config.train.global_batch_size))
    assert sorted(positions) == batch, "each sample of the global batch once"


def _check_forward(model: DiT, config: Config) -> None:
    """A micro-batch goes through; where a token is sent depends on its values, so experts get rows of a free number."""
    micro, settings = config.train.micro_batch_size, config.model
    for block in model.blocks:
        if isinstance(block.mlp, MoELayer):
            block.mlp.forward = _ShapesOfExperts(block.mlp)  # type: ignore
    images = torch.empty(micro, settings.in_channels, settings.input_size, settings.input_size, device=META)
    output = model(images, torch.empty(micro, device=META), _conditions(settings, micro))
    assert output.prediction.shape == images.shape


def _conditions(settings: ModelConfig, images: int) -> Condition:
    if settings.condition == "class":
        return torch.empty(images, dtype=torch.int64, device=META)
    length, width, pooled = settings.text_max_length, settings.text_hidden_size, settings.text_pooled_size
    return TextCondition(
        tokens=torch.empty(images, length, width, device=META),
        mask=torch.empty(images, length, dtype=torch.bool, device=META),
        pooled=torch.empty(images, pooled, device=META) if pooled else None,
        null=torch.empty(images, dtype=torch.bool, device=META),
    )


class _ShapesOfExperts:
    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer

    def __call__(self, x_BSD: Tensor, null_B: Tensor) -> tuple[Tensor, Routing | None]:
        experts: Any = self.layer.experts
        local, rows = len(experts.w1), 8
        x_RD = x_BSD.new_empty(local * rows, x_BSD.shape[-1])
        y_RD = Experts.forward(experts, ExpertInput(x_RD, torch.full((local,), rows, device=META), rows))
        assert y_RD.shape == x_RD.shape
        dense = [part for part in (self.layer.shared, self.layer.unconditional) if part is not None]
        return sum((part(x_BSD) for part in dense), x_BSD.clone()), None


def _report(
    config: Config,
    topology: Topology,
    data: TrainingData | StreamedData,
    progress: Progress,
    found: list[Path],
    whole: DiT,
    model: DiT,
) -> Iterator[tuple[str, str]]:
    ranks, batch = topology.world_size, config.train.global_batch_size
    total = sum(parameter.numel() for parameter in whole.parameters())
    held = sum(parameter.numel() for parameter in model.parameters())
    yield "model", f"{total / 1e6:,.2f} M parameters, {held / 1e6:,.2f} M of them on a rank"
    frozen = frozen_parameters(config)
    if frozen:
        sizes_of = {name: parameter.numel() for name, parameter in whole.named_parameters() if name in frozen}
        yield "frozen", f"{sum(sizes_of.values()) / 1e6:,.2f} M of {total / 1e6:,.2f} M parameters: {told(sizes_of)}"
    if config.experts is not None:
        yield (
            "experts",
            f"{config.experts.num_experts} in {len(config.moe_blocks)} layers; {ranks // topology.expert} groups of "
            f"{topology.expert} ranks hold them, {config.experts.num_experts // topology.expert} a layer and rank",
        )
    if topology.tensor > 1:
        yield (
            "layers",
            f"attention and dense layers are cut over {topology.tensor} ranks, {ranks // topology.tensor} such groups",
        )
    yield (
        "batch",
        f"{batch} = {config.train.micro_batch_size} images x {ranks} ranks x {progress.micro_steps} micro-steps; "
        f"{progress.pool_samples} images or {progress.pool_samples * config.tokens_per_sample} tokens compete together",
    )
    yield "data", _data(data, config)
    sizes = persistent_bytes(config, ranks)
    parts = ", ".join(f"{name} {format_bytes(number)}" for name, number in sizes.items())
    yield "memory", f"{format_bytes(sum(sizes.values()))} a rank, gradients and activations apart: {parts}"
    if isinstance(data, TrainingData) and data.encoders is not None:
        yield (
            "encoders",
            f"{format_bytes(data.encoders.num_bytes)} more on every rank, for what is encoded as it is read",
        )
    still = sum(whole.get_parameter(name).numel() for name in frozen)
    # Weights, and of what trains two moments and averages, fp32.
    written = 4 * (total + (2 + config.ema.count) * (total - still))
    yield (
        "checkpoint",
        f"{format_bytes(written)}, {format_bytes(written // ranks)} of it copied to host memory by a rank; "
        f"{format_bytes(shutil.disk_usage(_existing(Path(config.run_dir))).free)} are free at run_dir",
    )
    for number, line in enumerate(draw_schedule(config)):
        yield "" if number else "lr", line
    if found and (fitted := change_of_ranks(found[-1], config, progress, ranks)):
        yield "ranks", fitted
    yield "start", f"step {progress.step}" + (f", from {found[-1]}" if found else ", there is no checkpoint")
    if config.train.initial_weights and not found:
        yield "weights", f"of {config.train.initial_weights}; from the seed: {told(tensors_anew(config))}"


def _data(data: TrainingData | StreamedData, config: Config) -> str:
    if isinstance(data, StreamedData):
        return "a stream, of which nothing is known before it is read"
    batch = config.train.global_batch_size
    samples = sum(dataset.base.num_samples for dataset in data.datasets)
    shards = sum(len(dataset.base.shards) for dataset in data.datasets)
    return (
        f"{samples} samples in {shards} shards, all there; an epoch is {samples / batch:,.1f} steps, "
        f"the run {config.train.steps * batch / samples:,.1f} epochs"
    )


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
