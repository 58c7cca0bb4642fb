"""Training runs inside spawned ranks: several in a row in one set of processes, since starting them costs most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffmoe_dist.config import Config, build_config, for_ranks, wishes
from diffmoe_dist.engine.fragment_io import load_fragments
from diffmoe_dist.engine.sharded_state import Fragment, buffers
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.dit import DiT, initialize

if TYPE_CHECKING:
    from diffmoe_dist.engine.trainer import Trainer

TINY = {
    "model": {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "input_size": 8, "in_channels": 1,
        "num_classes": 10,
    },
    "moe": {"router": "global_pool", "num_experts": 4},
    "objective": {"time_distribution": "logit_normal", "time_scale": 1000.0},
    "train": {"steps": 100, "global_batch_size": 16},
    "optim": {"lr": 1e-3, "clip_grad_norm": 1.0},
    "ema": {"decay": 0.9},
    "checkpoint": {"every": 1000, "keep": 2},
    "log": {"every": 1},
}  # fmt: skip


def tiny_config(run_dir: Path, shards: Path, *layers: dict[str, Any]) -> Config:
    paths = {"run_dir": str(run_dir), "data": {"shards": str(shards)}}
    return build_config(TINY, paths, *layers)


def train_all(rank: int, world_size: int, shards: Path, jobs: list[tuple[Path, dict[str, Any]]]) -> None:
    """Each job is a run folder and settings; a folder that has a checkpoint is resumed."""
    for run_dir, settings in jobs:
        train_one(rank, world_size, tiny_config(run_dir, shards, settings))


def train_one(rank: int, world_size: int, config: Config) -> None:
    trainer = make_trainer(rank, world_size, config)
    trainer.train()
    trainer.close()


def make_trainer(rank: int, world_size: int, config: Config) -> Trainer:
    from diffmoe_dist.data.open import open_data, with_text_encoder
    from diffmoe_dist.engine.build import build_trainer
    from diffmoe_dist.engine.progress import earlier_ranks
    from diffmoe_dist.engine.resume import find_start
    from diffmoe_dist.parallel.expert_parallel import create_topology
    from diffmoe_dist.train import open_periodic_jobs

    asked, config = wishes(config), for_ranks(config, world_size, earlier_ranks(Path(config.run_dir)))
    cpu = torch.device("cpu")
    topology = create_topology(
        Launch(rank, world_size, rank, "environment"), cpu, config.parallel.expert, config.parallel.tensor
    )
    data = open_data(config)
    config = with_text_encoder(config, data)
    start = find_start(config, data, world_size, asked)
    return build_trainer(config, topology, data, start, open_periodic_jobs(config, data, cpu))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in metrics(run_dir)]


def whole_state(run_dir: Path, digits: Path, kind: str, step: int, *layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One kind of state of a checkpoint, by parameter, and the buffers."""
    model = empty_model(run_dir, digits, *layers)
    tensors = {name: torch.empty(parameter.shape) for name, parameter in model.named_parameters()}
    wanted = [Fragment(f"{kind}.{name}", 0, value.numel(), value.view(-1)) for name, value in tensors.items()]
    checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
    load_fragments(checkpoint, [*wanted, *buffers(model)])
    return {**tensors, **{fragment.name: fragment.data.clone() for fragment in buffers(model)}}


def empty_model(run_dir: Path, digits: Path, *layers: dict[str, Any]) -> DiT:
    model = DiT(tiny_config(run_dir, digits, *layers))
    initialize(model, 0)
    return model
