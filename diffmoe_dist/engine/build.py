"""From settings to a trainer that is ready to step: fresh, or where the newest checkpoint left off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffmoe_dist.config import Config, pool_samples, save_config
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.loader import TrainingLoader
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.checkpoint import (
    Progress,
    check_same_model,
    check_same_run,
    complete_checkpoints,
    load_fragments,
    read_progress,
)
from diffmoe_dist.engine.metrics import NullRunLog, RunLog, logger, make_writable, set_up_logging
from diffmoe_dist.engine.sharded_state import ShardedState, buffers
from diffmoe_dist.engine.trainer import DrawFigures, DrawSamples, Trainer
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.parallel.expert_parallel import apply_expert_parallel, deepspeed, parameter_groups
from diffmoe_dist.parallel.topology import Topology


def open_data(config: Config) -> ShardIndex:
    """Open the shards and check that they fit the model.

    Raises:
        UserError: the index is missing or damaged, or holds other images or classes than the model is made for.
    """
    index = ShardIndex.open(str(config.data.shards))
    model = config.model
    expected = {
        "input_size": (model.input_size, index.image_size),
        "in_channels": (model.in_channels, index.channels),
        "num_classes": (model.num_classes, index.num_classes),
    }
    for name, (setting, found) in expected.items():
        if found != setting:
            raise UserError(
                f"model.{name}={setting}, but data.shards={config.data.shards} has {found}; set it to {found}"
            )
    return index


def prepare_run_dir(config: Config) -> None:
    """Make the run folder, before anything is computed for it.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        make_writable(Path(str(config.run_dir)))
    except OSError as error:
        raise UserError(f"run_dir={config.run_dir}: cannot be written ({error.strerror}); choose another") from None


@dataclass(frozen=True)
class Start:
    """Where a run begins: at its newest complete checkpoint, or at step 0."""

    checkpoint: Path | None
    progress: Progress


def find_start(config: Config, index: ShardIndex, world_size: int) -> Start:
    """Look for a checkpoint in `run_dir` and check that this run continues it.

    Raises:
        UserError: the checkpoint is of another model, seed, data set or pool size.
    """
    micro_batch_size = config.train.micro_batch_size
    assert micro_batch_size is not None, "check_world fills it in"
    fresh = Progress(
        step=0,
        images_seen=0,
        seed=config.seed,
        data_fingerprint=index.fingerprint,
        pool_samples=pool_samples(config, world_size),
        micro_steps=config.train.global_batch_size // (micro_batch_size * world_size),
    )
    found = complete_checkpoints(Path(str(config.run_dir)) / "checkpoints")
    if not found:
        return Start(None, fresh)
    saved = read_progress(found[-1])
    check_same_model(found[-1], config)
    check_same_run(found[-1], saved, fresh, config.checkpoint.allow_pool_change)
    return Start(found[-1], replace(fresh, step=saved.step, images_seen=saved.images_seen))


def build_trainer(
    config: Config,
    topology: Topology,
    index: ShardIndex,
    start: Start,
    draw_samples: DrawSamples,
    draw_figures: DrawFigures | None = None,
) -> Trainer:
    """Build everything a run needs and load the checkpoint it starts from; collective."""
    run_dir = Path(str(config.run_dir))
    checkpoint, progress = start.checkpoint, start.progress
    engine = _build_engine(config, topology)
    state = ShardedState(engine.module, engine.optimizer)
    set_up_logging(run_dir, topology.rank)
    if checkpoint is not None:
        load_fragments(checkpoint, [*state.fragments(), *buffers(engine.module)])
        state.after_load(progress.step)
        logger.info("resumed from %s", checkpoint)
    if topology.rank == 0:
        save_config(config, run_dir / "config.yaml")
        log: Any = RunLog(run_dir, progress.step, config.train.steps)
    else:
        log = NullRunLog()
    logger.info(_summary(config, topology, engine.module, progress))
    micro_batch_size = config.train.micro_batch_size
    assert micro_batch_size is not None
    loader = TrainingLoader(
        index,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=topology.rank,
        world_size=topology.world_size,
        images_seen=progress.images_seen,
        flip=config.data.flip,
        num_workers=config.data.workers,
        pin_memory=topology.device.type == "cuda",
    )
    return Trainer(
        config=config,
        topology=topology,
        engine=engine,
        objective=build_objective(config.objective),
        state=state,
        loader=loader,
        progress=progress,
        log=log,
        draw_samples=draw_samples,
        draw_figures=draw_figures,
    )


def _build_engine(config: Config, topology: Topology) -> Any:
    with torch.device("meta"):  # a rank never holds the experts of others, not even for a moment
        model = DiT(config)
        apply_expert_parallel(model, config, topology)
    model.to_empty(device=topology.device)
    initialize(model, config.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(model),
        lr=config.optim.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        fused=True,
    )
    exact_buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_settings(config, topology, model), dist_init_required=False
    )
    for name, buffer in exact_buffers.items():  # DeepSpeed's bf16 rounds them too
        owner, _, key = name.rpartition(".")
        setattr(engine.module.get_submodule(owner), key, buffer)
    engine.train()
    return engine


def deepspeed_settings(config: Config, topology: Topology, model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's configuration, which follows from ours alone."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_clipping": config.optim.clip_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        # Gradients of a bf16 model are summed over the ranks in fp32: more ranks should not mean more rounding.
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": topology.device.type == "cuda",
            "reduce_bucket_size": min(parameters, 200_000_000),
            "allgather_bucket_size": 200_000_000,
        },
        "steps_per_print": 2**62,
    }


def _summary(config: Config, topology: Topology, model: nn.Module, progress: Progress) -> str:
    held = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    where = f"{topology.world_size} x {topology.device.type}, {config.precision}, ZeRO {config.parallel.zero_stage}"
    experts = config.experts
    if experts is None:
        return f"dense model, {held:.2f} M parameters; {where}"
    return (
        f"{experts.num_experts} experts over {topology.expert} ranks, {held:.2f} M parameters on this one; {where}; "
        f"{progress.pool_samples} samples ({progress.pool_samples * config.tokens_per_sample} tokens) are routed "
        f"together (moe.router={experts.router}), {progress.micro_steps} micro-steps a step"
    )
