"""The training loop.

Shape legend: L mixture-of-experts layers, N experts.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.config import Config, loss_weights
from diffmoe_dist.data.loader import Batch, TrainingLoader
from diffmoe_dist.diffusion.objectives import Objective
from diffmoe_dist.engine.checkpoint import Progress, save_checkpoint
from diffmoe_dist.engine.ema import WeightAverage
from diffmoe_dist.engine.metrics import Log, logger
from diffmoe_dist.engine.sharded_state import ShardedState, buffers
from diffmoe_dist.model.dit import DiT, DiTOutput
from diffmoe_dist.parallel.topology import Topology

DrawSamples = Callable[[DiT], np.ndarray]
DrawFigures = Callable[[DiT], dict[str, np.ndarray]]


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step of the whole job did; global-batch values, the same on every rank."""

    losses: dict[str, float]  # `loss`, then its parts, unweighted
    grad_norm: float  # before clipping
    thresholds_LN: Tensor | None  # proposals, mean over pools, of routers that propose some
    load_LN: Tensor  # assignments a micro-step and rank
    capacity_L: Tensor  # C of DiffMoE eq. 8-9


class Trainer:
    """Takes optimizer steps until `train.steps`; its whole state is `state`, the model's buffers and `progress`."""

    def __init__(
        self,
        *,
        config: Config,
        topology: Topology,
        engine: Any,
        objective: Objective,
        state: ShardedState,
        loader: TrainingLoader,
        progress: Progress,
        log: Log,
        draw_samples: DrawSamples,
        draw_figures: DrawFigures | None = None,
    ) -> None:
        self.config = config
        self.topology = topology
        self.engine = engine
        self.model: DiT = engine.module
        self.objective = objective
        self.state = state
        self.average = WeightAverage(state, config.ema.decay)
        self.loader = loader
        self.batches = iter(loader)
        self.progress = progress
        self.log = log
        self.draw_samples = draw_samples
        self.draw_figures = draw_figures
        self.run_dir = Path(str(config.run_dir))
        self.loss_weights = loss_weights(config)
        self.timer = StepTimer()

    def train(self) -> None:
        config = self.config
        if self.progress.step >= config.train.steps:
            logger.info("already at step %d of train.steps=%d: nothing to do", self.progress.step, config.train.steps)
        while self.progress.step < config.train.steps:
            with self.timer:
                report = self.train_step()
            step = self.progress.step
            self.log.step(step)
            if _due(step, config.log.every) or step == config.train.steps:
                self.log.metrics(self._metrics(report))
                if len(report.load_LN):
                    self.log.load(self._load(report))
            if _due(step, config.sample.every):
                self.sample()
            if _due(step, config.log.figures_every):
                self.figures()
            if _due(step, config.checkpoint.every) or step == config.train.steps:
                self.save()

    def train_step(self) -> StepReport:
        """One optimizer step over the global batch; collective."""
        for layer in self.model.moe_layers:
            layer.router.start_step(self.progress.step)
        micro_steps = []
        for _ in range(self.progress.micro_steps):
            micro_steps.append(self._forward_backward(next(self.batches).to(self.topology.device)))
            self.engine.step()
        report = self._report(micro_steps)
        self._stop_on_non_finite(report)
        if report.thresholds_LN is not None:
            for layer, proposal in zip(self.model.moe_layers, report.thresholds_LN, strict=True):
                layer.router.update_threshold(proposal)
        self.average.update()
        images_seen = self.progress.images_seen + self.config.train.global_batch_size
        self.progress = replace(self.progress, step=self.progress.step + 1, images_seen=images_seen)
        return report

    def save(self) -> None:
        """Write a checkpoint; collective."""
        fragments = list(self.state.fragments())
        if self.topology.rank == 0:  # the same on every rank, so one writes them
            fragments += buffers(self.model)
        folder = self.run_dir / "checkpoints"
        save_checkpoint(folder, fragments, self.progress, self.config, self.topology.rank == 0)
        logger.info("saved %s", folder / f"step-{self.progress.step:08d}")

    def sample(self) -> None:
        """Draw a grid of images with the averaged weights; collective."""
        self.model.eval()
        with self.average.applied():
            grid = self.draw_samples(self.model)
        self.model.train()
        self.log.image(grid, self.progress.step)

    def figures(self) -> None:
        """Draw what the experts do with the averaged weights; collective."""
        assert self.draw_figures is not None, "log.figures_every is set"
        self.model.eval()
        with self.average.applied():
            drawn = self.draw_figures(self.model)
        self.model.train()
        for name, picture in drawn.items():
            self.log.figure(name, picture, self.progress.step)

    def close(self) -> None:
        self.loader.close()
        self.log.close()

    def _forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """One micro-step. Returns what is to be averaged over micro-steps and ranks, detached."""
        z, t, labels = noisy_inputs(batch, self.objective, self.config)
        output: DiTOutput = self.engine(z, self.objective.model_time(t), labels)
        of_images = self.objective.losses(output.prediction, output.variance, batch.images, batch.noise, t)
        losses = {name: of_images[name].mean() for name in self.objective.loss_names}
        loss = torch.stack(list(losses.values())).sum()
        for name, weight in self.loss_weights.items():
            losses[name] = output.losses[name]
            loss = loss + weight * losses[name]
        self.engine.backward(loss)
        stats = output.routing
        proposals = [s.proposed_threshold for s in stats if s.proposed_threshold is not None]
        tables = {"threshold": proposals, "load": [s.tokens_per_expert for s in stats]}
        tables |= {"capacity": [s.capacity for s in stats]}
        values = {"loss": loss, **{f"loss_{name}": value for name, value in losses.items()}}
        values |= {name: torch.stack(layers) for name, layers in tables.items() if layers}
        return {name: value.detach() for name, value in values.items()}

    def _report(self, micro_steps: list[dict[str, Tensor]]) -> StepReport:
        """Average over micro-steps and ranks, in one reduction."""
        shapes = {name: value.shape for name, value in micro_steps[0].items()}
        flat = torch.stack([torch.cat([v.double().flatten() for v in step.values()]) for step in micro_steps])
        parts = self.topology.mean(flat.mean(dim=0)).split([shape.numel() for shape in shapes.values()])
        means = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        nothing = torch.empty(0, 0)
        return StepReport(
            losses={name: float(value) for name, value in means.items() if name.startswith("loss")},
            grad_norm=float(self.engine.get_global_grad_norm()),
            thresholds_LN=means["threshold"].float() if "threshold" in means else None,
            load_LN=means.get("load", nothing),
            capacity_L=means.get("capacity", nothing),
        )

    def _stop_on_non_finite(self, report: StepReport) -> None:
        values = {**report.losses, "grad_norm": report.grad_norm}
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"step {self.progress.step + 1}: {', '.join(broken)} is not finite; the weights of step "
                f"{self.progress.step} are the last sound ones"
            )

    def _metrics(self, report: StepReport) -> dict[str, Any]:
        seconds = self.timer.mean_since_last()
        load_LN = report.load_LN
        capacity = load_max = load_min = None
        if len(load_LN):
            capacity = float(report.capacity_L.mean())
            relative_LN = _relative(load_LN)
            load_max, load_min = float(relative_LN.max()), float(relative_LN.min())
        return {
            "step": self.progress.step,
            "images_seen": self.progress.images_seen,
            **report.losses,
            "grad_norm": report.grad_norm,
            "lr": self.config.optim.lr,
            "images_per_second": self.config.train.global_batch_size / seconds,
            "step_seconds": seconds,
            "capacity": capacity,
            "expert_load_max": load_max,
            "expert_load_min": load_min,
            "peak_memory_bytes": _peak_memory(self.topology.device),
        }

    def _load(self, report: StepReport) -> dict[str, Any]:
        """Of each layer the capacity, and of each of its experts the tokens over the layer's mean."""
        relative = [[round(value, 4) for value in layer] for layer in _relative(report.load_LN).tolist()]
        return {"step": self.progress.step, "capacity": report.capacity_L.tolist(), "load": relative}


def _relative(load_LN: Tensor) -> Tensor:
    return load_LN / load_LN.mean(dim=1, keepdim=True).clamp_min(1e-9)  # no token had a condition


def noisy_inputs(batch: Batch, objective: Objective, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """What a training step shows the model: noisy images (N, C, H, W), the objective's times and the labels, (N,)."""
    t = objective.times(batch.time_uniform)
    dropped = batch.drop_uniform < config.train.label_dropout
    labels = torch.where(dropped, config.model.num_classes, batch.labels)
    return objective.corrupt(batch.images, batch.noise, t), t, labels


class StepTimer:
    """Mean wall-clock seconds of the steps since the last question."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self.begun
        self.steps += 1

    def mean_since_last(self) -> float:
        mean = self.seconds / self.steps
        self.seconds, self.steps = 0.0, 0
        return mean


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's largest resident size otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
