"""Scores while training on the simulated device: what ranks add up lies there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.evaluation import training_scores
from diffmoe_dist.evaluation.extractors import Extractor, Features
from diffmoe_dist.evaluation.metrics import Statistics
from diffmoe_dist.evaluation.training_scores import TrainingScores
from tests.accelerator.cases import IMAGES, config
from tests.accelerator.simulator import DEVICE, on_device, simulate

WIDTH = 3


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("non_finite", [None, SimpleNamespace(images=2)])
def test_scoring_samples_while_training_asks_nothing_that_cuda_refuses(
    non_finite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def colours(images: Tensor) -> Features:
        return Features(images.float().mean(dim=(2, 3)))

    def generate(*arguments: Any) -> SimpleNamespace:
        return SimpleNamespace(images=on_device(torch.rand(IMAGES, WIDTH, 8, 8)), non_finite=non_finite)

    monkeypatch.setattr(training_scores, "generate", generate)
    settings = config("dense")
    train, fid = replace(settings.train, micro_batch_size=IMAGES), replace(settings.fid, num=IMAGES)
    settings = replace(settings, train=train, fid=fid)
    reference = Statistics(on_device(torch.zeros(WIDTH).double()), on_device(torch.eye(WIDTH).double()))
    extractor = Extractor("--features", "colours", DEVICE, "frechet_distance", colours)
    scores: Any = TrainingScores(settings, extractor, reference, lambda images: images, None)  # type: ignore[arg-type]

    with simulate() as log:
        (score,) = scores(None).values()

    assert not log.faults, log
    assert (score is None) == (non_finite is not None)
