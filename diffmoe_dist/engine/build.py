"""From settings to a trainer that is ready to step: fresh, or where the newest checkpoint left off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from diffmoe_dist.config import Config, save_config
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.loader import BatchLoader, TrainingLoader
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.data.stream import StreamedData, StreamLoader
from diffmoe_dist.engine.ema import averages
from diffmoe_dist.engine.fine_tuning import tensors_anew
from diffmoe_dist.engine.fragment_io import load_fragments
from diffmoe_dist.engine.progress import Progress
from diffmoe_dist.engine.resume import SET_FOR_RANKS, Start, change_of_ranks, changed_rate, changed_settings
from diffmoe_dist.engine.run_folder import NoClaim
from diffmoe_dist.engine.sharded_state import FrozenState, ShardedState, buffers
from diffmoe_dist.engine.trainer import Periodic, RunGuards, Trainer
from diffmoe_dist.engine.watchdog import Watchdog
from diffmoe_dist.engine.weights import fill_fragments
from diffmoe_dist.engine.zero import ReducingZero
from diffmoe_dist.files import write_atomically
from diffmoe_dist.logs import logger, set_up_logging
from diffmoe_dist.model.accounting import account
from diffmoe_dist.model.compiled import apply_compile
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.freezing import freeze, frozen_parameters, told
from diffmoe_dist.model.recompute import apply_recompute
from diffmoe_dist.parallel.expert_parallel import apply_expert_parallel, parameter_groups
from diffmoe_dist.parallel.topology import Topology, device_memory
from diffmoe_dist.planning.fit import fit_to_memory
from diffmoe_dist.planning.memory import REDUCTION_CHUNK

UNGUARDED = RunGuards(NoClaim(), stop_asked=lambda: False, watchdog=Watchdog.off())


def fit_device(
    config: Config, data: TrainingData | StreamedData, ranks: int, device: torch.device, ordered: Sequence[str]
) -> Config:
    """The settings of a run that goes on with other ranks, with less memory where they would not fit a GPU.

    Args:
        ordered: settings that stay as they are.

    Raises:
        UserError: it fits in no way.
    """
    memory = device_memory(device)
    if memory is None:
        return config
    if isinstance(data, TrainingData) and data.encoders is not None:
        memory -= data.encoders.num_bytes
    return fit_to_memory(config, ranks, memory, ordered)


def build_trainer(
    config: Config,
    topology: Topology,
    data: TrainingData | StreamedData,
    start: Start,
    periodic: Sequence[Periodic] = (),
    guards: RunGuards = UNGUARDED,
) -> Trainer:
    """Build everything a run needs and load the checkpoint it starts from; collective."""
    run_dir = Path(config.run_dir)
    engine, frozen = _build_engine(config, topology)
    state = ShardedState(engine.module, engine.optimizer, frozen, averages(config.ema))
    set_up_logging(run_dir, topology.rank)
    _load(start, config, state)
    if topology.rank == 0:
        if start.checkpoint is not None:
            _keep_changed_settings(start, config, topology.world_size)
        save_config(config, run_dir / "config.yaml")
    logger.info(_summary(config, topology, engine.module, start.progress))
    loader = _open_loader(config, topology, data, start.progress)
    return Trainer(config, topology, engine, state, loader, start.progress, periodic, guards)


def _load(start: Start, config: Config, state: ShardedState) -> None:
    """Fill the state from the checkpoint that the run starts from, or from initial weights."""
    progress, initial_weights = start.progress, config.train.initial_weights
    fragments = [*state.fragments(), *buffers(state.model)]
    for complaint in start.damaged:
        logger.warning("%s; going back to the one before", complaint)
    if start.checkpoint is not None:
        load_fragments(start.checkpoint, fragments)
        state.after_load(progress.updates)
        logger.info("resumed from %s", start.checkpoint)
        if initial_weights is not None:
            logger.info("train.initial_weights=%s were where this run began; its checkpoint wins", initial_weights)
    elif initial_weights is not None:
        anew = tensors_anew(config)
        fill_fragments(Path(initial_weights), fragments, anew)
        state.after_load(progress.step)
        logger.info("started from the weights in %s; from the seed: %s", initial_weights, told(anew))


def _keep_changed_settings(start: Start, config: Config, ranks: int) -> None:
    """Say which settings a resume changes, and keep those until here as config-until-step-N.yaml."""
    checkpoint = start.checkpoint
    assert checkpoint is not None
    changed = changed_settings(checkpoint, config)
    kept = Path(config.run_dir) / f"config-until-{checkpoint.name}.yaml"
    if changed:
        write_atomically(kept, (checkpoint / "config.yaml").read_bytes())
    if of_ranks := change_of_ranks(checkpoint, config, start.progress, ranks):
        old = f"; the old settings stay in {kept}" if changed else ""
        logger.warning("the run goes on after %s %s%s", checkpoint.name, of_ranks, old)
        changed = {name: change for name, change in changed.items() if name not in SET_FOR_RANKS}
    if changed:
        names = ", ".join(f"{name} {change}" for name, change in changed.items())
        logger.warning("settings change after %s: %s; the old ones stay in %s", checkpoint.name, names, kept)
        if rate := changed_rate(checkpoint, start.progress.step + 1, config):
            logger.warning("%s", rate)


def _open_loader(
    config: Config, topology: Topology, data: TrainingData | StreamedData, progress: Progress
) -> BatchLoader:
    split = BatchSplit(
        config.train.global_batch_size, config.train.micro_batch_size, topology.rank, topology.world_size
    )
    settings: dict[str, Any] = {
        "seed": config.seed,
        "images_seen": progress.images_seen,
        "flip": config.data.flip,
        "num_workers": config.data.workers,
        "pin_memory": topology.device.type == "cuda",
    }
    return (
        StreamLoader(data, split, **settings)
        if isinstance(data, StreamedData)
        else TrainingLoader(data, split, **settings)
    )


def _build_engine(config: Config, topology: Topology) -> tuple[Any, FrozenState]:
    """DeepSpeed's engine around the model, and what of the model it does not train."""
    names = frozen_parameters(config)
    with torch.device("meta"):  # a rank never holds the experts of others, not even for a moment
        model = DiT(config)
        apply_expert_parallel(model, config, topology)
    model.to_empty(device=topology.device)
    initialize(model, config.seed)
    freeze(model, names)
    if config.train.compile:
        apply_compile(model, config.train.recompute)
    apply_recompute(model, config.train.recompute)
    if config.parallel.tensor > 1:
        from diffmoe_dist.parallel.tensor_parallel import apply_tensor_parallel  # imports megatron-core

        apply_tensor_parallel(model, topology)
    optimizer = torch.optim.AdamW(
        parameter_groups(model),
        lr=config.optim.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        fused=True,
    )
    frozen = FrozenState(model, names, topology, rounded=config.precision == "bf16")
    exact_buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_settings(config), dist_init_required=False
    )
    wire = torch.bfloat16 if config.parallel.gradient_dtype == "bf16" else torch.float32
    ReducingZero.take_over(engine, wire, REDUCTION_CHUNK)
    for name, buffer in exact_buffers.items():  # DeepSpeed's bf16 rounds them too
        owner, _, key = name.rpartition(".")
        setattr(engine.module.get_submodule(owner), key, buffer)
    engine.train()
    return engine, frozen


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's configuration, which follows from ours alone."""
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_clipping": config.optim.clip_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            # Calls hooks for each gradient; what they do is in `engine.zero`.
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            # Grouped products on CUDA need experts that begin at 16 bytes.
            "parameter_alignment": True,
        },
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},  # it synchronises the device twice a step
    }


def _summary(config: Config, topology: Topology, model: nn.Module, progress: Progress) -> str:
    held = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    still = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad) / 1e6
    counts = account(config)
    work = f"{sum(counts.macs().values()) / 1e9:.4g} GMAC an image forward"
    where = f"{topology.world_size} x {topology.device.type}, {config.precision}, ZeRO {config.parallel.zero_stage}"
    if still:
        where += f", {still:.2f} M parameters of this rank frozen by train.freeze={config.train.freeze}"
    if topology.tensor > 1:
        where += f", layers cut over {topology.tensor} ranks"
    experts = config.experts
    if experts is None:
        return f"dense model, {held:.2f} M parameters, {work}; {where}"
    return (
        f"{counts.total / 1e6:.2f} M parameters, {counts.activated() / 1e6:.2f} M activated and {work} at "
        f"C={counts.nominal_capacity:g}; "
        f"{experts.num_experts} experts over {topology.expert} ranks, {held:.2f} M parameters on this one; {where}; "
        f"{progress.pool_samples} samples ({progress.pool_samples * config.tokens_per_sample} tokens) are routed "
        f"together (moe.router={experts.router}), {progress.micro_steps} micro-steps a step"
    )
