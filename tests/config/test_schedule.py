from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR

from diffmoe_dist.config import Config, build_config, draw_schedule, learning_rate
from diffmoe_dist.errors import UserError


def config(steps: int = 100, **optim: Any) -> Config:
    return build_config(
        {"model": {"size": "S"}, "train": {"steps": steps}, "optim": {"lr": 0.02, **optim}}, training=False
    )


def rates(steps: int, count: int, **optim: Any) -> list[float]:
    settings = config(steps, **optim)
    return [learning_rate(settings, step) for step in range(1, count + 1)]


def by_torch(count: int, scheduler: type[LRScheduler], **settings: Any) -> list[float]:
    """The rates of a scheduler of torch, which has the whole one first."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    follows: Any = scheduler(optimizer, **settings)
    found = []
    for _ in range(count):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        follows.step()
    return found


def test_without_a_schedule_the_rate_is_the_same_in_every_step() -> None:
    assert rates(5, 8) == [0.02] * 8


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd", "milestones"])
def test_a_warm_up_grows_linearly_and_its_last_step_has_the_whole_rate(schedule: str) -> None:
    needed: dict[str, dict[str, Any]] = {"wsd": {"decay_steps": 10}, "milestones": {"milestones": [60]}}
    found = rates(100, 40, schedule=schedule, warmup_steps=40, **needed.get(schedule, {}))
    assert found == pytest.approx([0.02 * step / 40 for step in range(1, 41)], rel=1e-12)


def test_cosine_and_linear_decays_are_those_of_torch_from_the_last_step_of_the_warm_up_on() -> None:
    cosine = rates(100, 100, schedule="cosine", warmup_steps=20, final_lr=0.002)
    linear = rates(100, 100, schedule="linear", warmup_steps=20, final_lr=0.002)
    assert cosine[19:] == pytest.approx(by_torch(81, CosineAnnealingLR, T_max=80, eta_min=0.002), rel=1e-9)
    assert linear[19:] == pytest.approx(
        by_torch(81, LinearLR, start_factor=1.0, end_factor=0.1, total_iters=80), rel=1e-9
    )
    assert cosine[-1] == linear[-1] == 0.002


def test_a_decay_of_given_length_is_over_before_the_run_and_does_not_know_its_length() -> None:
    short = rates(100, 100, schedule="cosine", warmup_steps=10, decay_steps=40)
    assert short[49:] == [0.0] * 51 and short[48] > 0
    assert rates(1000, 100, schedule="cosine", warmup_steps=10, decay_steps=40) == short


def test_wsd_is_stable_and_then_decays_linearly_to_the_last_step() -> None:
    found = rates(100, 100, schedule="wsd", warmup_steps=5, decay_steps=20, final_lr=0.01)
    assert found[4:80] == [0.02] * 76
    assert found[80:] == pytest.approx([0.02 - 0.01 * step / 20 for step in range(1, 21)], rel=1e-12)


def test_milestones_are_those_of_torch_a_tenth_each_or_down_to_the_final_rate() -> None:
    tenths = rates(100, 100, schedule="milestones", milestones=[30, 60, 61])
    assert tenths == pytest.approx(by_torch(100, MultiStepLR, milestones=[30, 60, 61]), rel=1e-9)
    halves = rates(100, 100, schedule="milestones", milestones=[30, 60], final_lr=0.005, warmup_steps=3)
    assert halves[2:] == pytest.approx(by_torch(100, MultiStepLR, milestones=[30, 60], gamma=0.5)[2:], rel=1e-9)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"decay_steps": 5}, "optim.decay_steps=5 has no effect with optim.schedule=constant; remove it"),
        ({"final_lr": 0.0}, "optim.final_lr=0.0 has no effect with optim.schedule=constant"),
        ({"milestones": [5]}, "optim.milestones=[5] has no effect with optim.schedule=constant"),
        ({"schedule": "wsd", "milestones": [5]}, "optim.milestones=[5] has no effect with optim.schedule=wsd"),
        ({"schedule": "milestones", "milestones": [5], "decay_steps": 5}, "optim.decay_steps=5 has no effect with"),
        ({"schedule": "step"}, "optim.schedule=step is none of the choices"),
        ({"schedule": "wsd"}, "optim.decay_steps is not set; optim.schedule=wsd needs"),
        ({"schedule": "milestones"}, "optim.milestones is not set; optim.schedule=milestones needs steps"),
        ({"schedule": "milestones", "milestones": [5, 5]}, "optim.milestones=[5, 5] must be growing steps"),
        ({"schedule": "milestones", "milestones": [9, 5]}, "optim.milestones=[9, 5] must be growing steps"),
        ({"schedule": "milestones", "milestones": [0, 5]}, "optim.milestones=[0, 5] must be growing steps"),
        ({"schedule": "milestones", "milestones": [5], "warmup_steps": 6}, "none before the end of the warm-up"),
        ({"schedule": "milestones", "milestones": [5], "final_lr": 0.0}, "optim.final_lr=0.0 is reached by no factor"),
        ({"schedule": "cosine", "final_lr": 0.03}, "optim.final_lr=0.03 is above optim.lr=0.02"),
        ({"schedule": "cosine", "final_lr": -1.0}, "optim.final_lr=-1.0 must be 0 or more"),
        ({"schedule": "cosine", "final_lr": math.inf}, "optim.final_lr=inf must be 0 or more, and finite"),
        ({"schedule": "linear", "warmup_steps": 100}, "optim.warmup_steps=100 leaves none of train.steps=100"),
        ({"schedule": "linear", "decay_steps": -1}, "optim.decay_steps=-1 must be at least 1, or 0"),
        ({"schedule": "wsd", "warmup_steps": 60, "decay_steps": 50}, "are more than train.steps=100"),
        ({"warmup_steps": -3}, "optim.warmup_steps=-3 must be 0 (none) or more"),
    ],
)
def test_what_a_schedule_does_not_know_or_leaves_it_no_steps_is_refused(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config(**optim)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_picture_of_a_schedule_has_its_shape() -> None:
    words, *rows, axis = draw_schedule(config(60, schedule="linear", warmup_steps=30, final_lr=0.01))
    assert words == "linear, 0.02 from step 30 on, down from step 30 to 0.01 at step 60"
    assert axis.split() == ["1", "60"] and len(axis) == 60
    heights = [sum(row.ljust(60)[step - 1] == "#" for row in rows) for step in range(1, 61)]
    assert heights[29] == 6 and heights[14] == 3 and heights[0] == 0 and heights[59] == 3
    assert heights[:30] == sorted(heights[:30]) and heights[30:] == sorted(heights[30:], reverse=True)
    assert draw_schedule(config()) == ["0.02 in every step"]
    assert draw_schedule(config(100, schedule="milestones", milestones=[50, 200]))[0] == (
        "milestones, 0.02, 0.002 after step 50"
    )
    assert draw_schedule(config(100, schedule="cosine", decay_steps=200))[0] == (
        "cosine, 0.02, down from step 0 to 0 at step 200; the run ends before, at 0.01"
    )
    assert draw_schedule(config(100, warmup_steps=1000))[0] == (
        "constant, 0.02 from step 1000 on; the run ends before, at 0.002"
    )
