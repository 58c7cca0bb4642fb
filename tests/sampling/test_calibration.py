from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffmoe_dist.config import Config, load_config
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.loader import TrainingLoader
from diffmoe_dist.data.open import open_data
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.noising import noisy_inputs
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.sampling.calibration import recalibrate, recalibrate_on_training_data
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.machine import ROOT


def make(router: str, digits: Path, *overrides: str) -> tuple[DiT, Config]:
    config = load_config(ROOT / f"configs/debug/{router}.yaml", [f"data.shards={digits}", *overrides])
    model = DiT(config)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), config


def thresholds(model: DiT) -> Tensor:
    """(L, N) those of each mixture-of-experts layer."""
    layers: Any = model.moe_layers
    return torch.stack([layer.router.threshold for layer in layers])


def batches(digits: Path, config: Config, number: int, size: int) -> list[Batch]:
    data = TrainingData((DataSet.open(digits),), config.model.input_size)
    loader = TrainingLoader(data, BatchSplit(size, size), seed=config.seed)
    found = [next(loader) for _ in range(number)]
    loader.close()
    return found


def measured_capacity(model: DiT, config: Config, batch: Batch) -> list[float]:
    objective = build_objective(config)
    z, t, labels = noisy_inputs(batch, objective, config)
    with torch.no_grad():
        return [float(stats.capacity) for stats in model(z, objective.model_time(t), labels).routing]


@pytest.mark.parametrize("schedule", [[], ["moe.capacity_schedule=[10,20]"]])
def test_with_the_thresholds_of_a_batch_each_expert_takes_one_token_less_of_it_than_it_has_slots(
    digits: Path, schedule: list[str]
) -> None:
    model, config = make("global_pool", digits, *schedule)
    (batch,) = batches(digits, config, number=1, size=32)
    assert measured_capacity(model, config, batch) == [8.0, 8.0], "thresholds of zero let every token through"

    recalibrate(model, config, [batch])

    # 32 images of 16 tokens and 8 experts: 64 slots each. A score exceeds the 64th largest 63 times.
    first, second = measured_capacity(model, config, batch)
    assert first == 8 * 63 / 512
    assert second == pytest.approx(first, abs=0.05), "its tokens are not quite those it was calibrated on"
    assert not model.training


def test_thresholds_are_the_mean_over_the_batches(digits: Path) -> None:
    found = []
    model, config = make("global_pool", digits)
    two = batches(digits, config, number=2, size=32)
    for chosen in ([two[0]], [two[1]], two):
        recalibrate(model, config, chosen)
        found.append(thresholds(model))
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)
    assert not torch.equal(found[0], found[1])
    recalibrate_on_training_data(model, config, open_data(config), num_batches=2, batch_size=32)
    assert torch.equal(thresholds(model), found[2])


def test_a_model_without_thresholds_refuses_to_be_recalibrated(digits: Path) -> None:
    model, config = make("token_choice", digits)
    with pytest.raises(UserError, match=r"--recalibrate 4: a model with moe\.router=token_choice has no capacity"):
        recalibrate_on_training_data(model, config, open_data(config), num_batches=4, batch_size=8)


def test_sampling_changes_no_other_setting_of_a_run() -> None:
    common: dict[str, Any] = {"checkpoint": "c", "num": 1, "steps": 1, "batch_size": 1}
    SamplingSettings(**common, overrides=("moe.inference=static",)).check()
    with pytest.raises(UserError, match=r"moe\.capacity=2: sampling can change moe\.inference, .*, nothing else"):
        SamplingSettings(**common, overrides=("moe.capacity=2",)).check()
