"""Validation losses on several ranks, against one device without any of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.digits import DigitsSource
from data_tools.pack import PackSettings, pack
from diffmoe_dist.config import Config
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.loader import TrainingDataset
from diffmoe_dist.data.open import open_held_out
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.sharded_state import EMA
from diffmoe_dist.errors import UserError
from tests.distributed import run_ranks
from tests.engine.runs import empty_model, metrics, tiny_config, train_all, whole_state

IMAGES = 40  # no multiple of the 16 of a step


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in another order: other shards, which is what counts here."""
    folder = tmp_path_factory.mktemp("held-out") / "digits"
    pack(DigitsSource(), folder, PackSettings(seed=1))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path, held_out: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "train": {"steps": 4},
        "log": {"every": 3},
        "validation": {"shards": str(held_out), "every": 2, "images": IMAGES},
    }
    ddpm = {
        "objective": {"name": "ddpm", "time_distribution": None, "time_scale": None},
        "model": {"learn_sigma": True},
    }
    unvalidated = {"train": {"steps": 4}}
    alone = [("alone", settings), ("ddpm1", {**settings, **ddpm}), ("without", unvalidated)]
    run_ranks(1, train_all, digits, [(folder / name, layer) for name, layer in alone])
    spread = {**settings, "parallel": {"expert": 2}}
    run_ranks(2, train_all, digits, [(folder / "two", spread), (folder / "ddpm2", {**spread, **ddpm})])
    return folder


NAMES = ["loss_val", "loss_val_t0", "loss_val_t1", "loss_val_t2", "loss_val_t3"]


def test_validation_losses_stand_in_the_lines_of_their_steps(runs: Path) -> None:
    lines = metrics(runs / "alone")
    assert {line["step"]: [name for name in line if name.startswith("loss_val")] for line in lines} == {
        2: NAMES, 3: [], 4: NAMES,
    }  # fmt: skip
    assert all("loss_diffusion" in line for line in lines)


@pytest.mark.parametrize(("one", "two"), [("alone", "two"), ("ddpm1", "ddpm2")])
def test_validation_losses_are_the_same_on_one_rank_and_on_two_with_the_experts_sharded(
    runs: Path, one: str, two: str
) -> None:
    for ours, theirs in zip(metrics(runs / one), metrics(runs / two), strict=True):
        for name in NAMES:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-6)
    assert metrics(runs / one)[-1]["loss_val"] != metrics(runs / one)[0]["loss_val"]


def test_validation_does_not_change_the_training(runs: Path) -> None:
    last = metrics(runs / "without")[-1]
    assert last["step"] == 4 and metrics(runs / "alone")[-1]["loss"] == last["loss"]


def test_the_losses_are_those_of_the_averaged_weights_by_quarters_of_time(
    runs: Path, digits: Path, held_out: Path
) -> None:
    config = tiny_config(runs / "alone", digits)
    model = empty_model(runs / "alone", digits).train()
    weights = whole_state(runs / "alone", digits, EMA, 4)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in weights:
                tensor.copy_(weights[name].view(tensor.shape))
    objective = build_objective(config)
    dataset = TrainingDataset(TrainingData((DataSet.open(held_out),), 8), seed=0, flip=False)
    losses, times = [], []
    for start in (0, 16, 32):  # the pools of a step; the last one reaches beyond the 40 images
        batch = dataset[range(start, start + 16)]
        t = objective.times(batch.time_uniform)
        labels = torch.where(batch.drop_uniform < 0.1, 10, batch.labels)
        z = t[:, None, None, None] * batch.images + (1 - t[:, None, None, None]) * batch.noise
        with torch.no_grad():
            prediction = model(z, 1000 * t, labels).prediction
        losses.append((prediction - (batch.images - batch.noise)).square().mean(dim=(1, 2, 3)))
        times.append(t)
    loss, time = torch.cat(losses)[:IMAGES], torch.cat(times)[:IMAGES]
    line = metrics(runs / "alone")[-1]
    assert line["loss_val"] == pytest.approx(float(loss.mean()), abs=1e-6)
    for quarter in range(4):
        inside = (quarter / 4 <= time) & (time < (quarter + 1) / 4)
        assert inside.sum() > 2
        assert line[f"loss_val_t{quarter}"] == pytest.approx(float(loss[inside].mean()), abs=1e-6)


def test_settings_of_validation_that_do_not_fit_are_refused(digits: Path, held_out: Path) -> None:
    def config(**validation: Any) -> Config:
        return tiny_config(Path("r"), digits, {"validation": validation})

    for wrong, message in (
        ({"every": 5}, r"validation\.every=5 needs validation\.shards; give it"),
        ({"shards": "s"}, r"validation\.shards=s has no effect with validation\.every=0"),
        ({"every": 5, "shards": "s", "images": 0}, r"validation\.images=0"),
    ):
        with pytest.raises(UserError, match=message):
            config(**wrong)
    data = TrainingData((DataSet.open(digits),), 8)
    assert open_held_out(config(), data) is None
    with pytest.raises(UserError, match="holds the images that are trained on; pack others"):
        open_held_out(config(every=5, shards=str(digits)), data)
    with pytest.raises(UserError, match="^validation.shards=/nowhere: no such folder"):
        open_held_out(config(every=5, shards="/nowhere"), data)
