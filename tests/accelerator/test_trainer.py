"""An optimizer step of the trainer on the simulated device, from a batch to the line of metrics, without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.config import loss_weights
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.profiling import Timings
from diffmoe_dist.engine.progress import Progress
from diffmoe_dist.engine.run_folder import NoClaim
from diffmoe_dist.engine.trainer import StepTimer, Trainer
from diffmoe_dist.model.accounting import account
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.parallel.topology import Topology
from tests.accelerator.cases import CLASSES, IMAGES, config, model
from tests.accelerator.simulator import DEVICE, Log, on_device, simulate

WORLD: Any = None  # the group of all ranks


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """In the place of DeepSpeed's."""

    def __init__(self, module: DiT) -> None:
        self.module = module

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.module.zero_grad()


class State:
    """In the place of the state that ZeRO shards."""

    def __init__(self, module: DiT) -> None:
        self.module = module
        self.told: list[tuple[float, bool]] = []
        self.rates: list[float] = []

    def gradient_squares(self) -> Tensor:
        squares = [p.grad.double().square().sum() for p in self.module.parameters() if p.grad is not None]
        return torch.stack(squares).sum()

    def set_norm(self, norm: float, skip: bool) -> None:
        self.told.append((norm, skip))

    def set_learning_rate(self, rate: float) -> None:
        self.rates.append(rate)


def make_batch(value: float = 1.0) -> Batch:
    def images() -> Tensor:
        return on_device(torch.randn(IMAGES, 4, 16, 16) * value)

    def uniform() -> Tensor:
        return on_device(torch.rand(IMAGES, dtype=torch.float64))

    def whole_numbers(below: int) -> Tensor:
        return on_device(torch.randint(below, (IMAGES,)))

    return Batch(
        images=images(),
        labels=whole_numbers(CLASSES),
        noise=images(),
        time_uniform=uniform(),
        drop_uniform=uniform(),
        sample_ids=whole_numbers(9),
        epochs=whole_numbers(9),
        bad=whole_numbers(2),
    )


def make_trainer(moe: str, dtype: torch.dtype, micro_steps: int, batch: Batch) -> Any:
    settings = config(moe)
    trainer: Any = Trainer.__new__(Trainer)
    made = model(settings, dtype)
    trainer.config, trainer.model, trainer.engine, trainer.state = settings, made, Engine(made), State(made)
    trainer.objective, trainer.loss_weights = build_objective(settings), loss_weights(settings)
    trainer.topology = Topology(0, 1, DEVICE, 1, WORLD, WORLD, WORLD, 1, WORLD)
    trainer.batches = iter([batch] * 10)
    trainer.timings, trainer.timer = Timings(torch.device("cpu")), StepTimer()
    trainer.progress = Progress(0, 0, 0, "", IMAGES, micro_steps)
    trainer.guards = SimpleNamespace(stop_asked=lambda: True, claim=NoClaim())
    trainer.checkpointer = MagicMock(failed=0)
    trainer.averages, trainer.bad_samples, trainer.device_peak = MagicMock(), 0, None
    trainer.accounting = account(settings)
    return trainer


def step_and_log(trainer: Any) -> tuple[Log, dict[str, Any]]:
    with simulate() as log:
        with trainer.timer:
            report = trainer.train_step()
        metrics = trainer._metrics(report)
        if len(report.load_LN):
            trainer._load(report)
    assert report.stop_asked
    return log, metrics


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("moe", ["dense", "global_pool", "expert_choice"])
def test_a_step_and_its_line_of_metrics_wait_once_and_copy_nothing_from_the_host(moe: str, micro_steps: int) -> None:
    trainer = make_trainer(moe, torch.bfloat16, micro_steps, make_batch())
    log, metrics = step_and_log(trainer)
    assert (len(log.waits), log.copies, log.faults) == (1, [], []), log
    assert "copy to the host at engine/trainer.py" in log.waits[0]
    assert log.collectives == 1
    [(norm, skip)] = trainer.state.told
    assert trainer.state.rates == [trainer.config.optim.lr]
    assert norm == metrics["grad_norm"] > 0 and not skip
    trainer.averages.update.assert_called_once()


def test_a_step_that_is_not_finite_is_known_from_the_same_copy_and_changes_nothing() -> None:
    trainer = make_trainer("global_pool", torch.bfloat16, 1, make_batch(math.inf))
    before = [layer.router.threshold.values_here.clone() for layer in trainer.model.moe_layers]
    trainer.config = replace(trainer.config, train=replace(trainer.config.train, skip_non_finite=True))
    trainer._handle_non_finite = MagicMock()
    with simulate() as log:
        report = trainer.train_step()
    assert len(log.waits) == 1, log
    assert report.non_finite and trainer.state.told[0][1], "the optimizer is told to skip"
    trainer._handle_non_finite.assert_called_once()
    trainer.averages.update.assert_not_called()
    after = [layer.router.threshold.values_here for layer in trainer.model.moe_layers]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
