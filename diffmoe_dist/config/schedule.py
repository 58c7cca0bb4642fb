"""The learning rate of each step: a function of the settings and of the step alone, whatever was resumed when."""

from __future__ import annotations

import math

from diffmoe_dist.config.schema import Config, OptimConfig
from diffmoe_dist.errors import UserError

MILESTONE_FACTOR = 0.1  # without optim.final_lr
_COLUMNS, _ROWS = 60, 6  # of the picture
# The settings of the decay that each schedule knows.
_OF_DECAY = {
    "constant": (),
    "cosine": ("decay_steps", "final_lr"),
    "linear": ("decay_steps", "final_lr"),
    "wsd": ("decay_steps", "final_lr"),
    "milestones": ("milestones", "final_lr"),
}


def learning_rate(config: Config, step: int) -> float:
    """The rate of optimizer step `step`, counted from 1.

    The warm-up is linear, and its last step the first one with the whole rate. What follows is a linear or a cosine
    decay to `final_lr`, which stays; the same from `decay_steps` before the last step on (wsd: warm-up, stable, decay;
    its decay is linear); or equal factors, one after each milestone, down to `final_lr`.
    """
    optim = config.optim
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "milestones":
        passed = sum(step > milestone for milestone in optim.milestones)
        whole = MILESTONE_FACTOR ** len(optim.milestones) if optim.final_lr is None else optim.final_lr / optim.lr
        return optim.lr * whole ** (passed / len(optim.milestones))
    if optim.schedule == "constant":
        return optim.lr
    begin, end = decay_interval(config)
    done = min(max(step - begin, 0) / (end - begin), 1.0)
    if optim.schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return (1 - done) * optim.lr + done * (optim.final_lr or 0.0)


def decay_interval(config: Config) -> tuple[int, int]:
    """The last step with the whole rate, and the first one with `final_lr`."""
    optim, steps = config.optim, config.train.steps
    if optim.schedule == "wsd":
        return steps - optim.decay_steps, steps
    return optim.warmup_steps, optim.warmup_steps + optim.decay_steps if optim.decay_steps else steps


def draw_schedule(config: Config) -> list[str]:
    """Lines of text: what the rate does, and, where it changes, a picture of it over the steps of the run."""
    optim, steps = config.optim, config.train.steps
    if optim.schedule == "constant" and not optim.warmup_steps:
        return [f"{optim.lr:g} in every step"]
    rates = [learning_rate(config, 1 + round(place * (steps - 1) / (_COLUMNS - 1))) for place in range(_COLUMNS)]
    warm_up = [f"{optim.lr:g} from step {optim.warmup_steps} on"] if optim.warmup_steps else [f"{optim.lr:g}"]
    if optim.warmup_steps > steps:
        warm_up[0] += f"; the run ends before, at {learning_rate(config, steps):g}"
    words = [optim.schedule, *warm_up, *_decay_in_words(config)]
    # A column reaches a row if it is nearer to it than to the one below.
    rows = ["".join("#" if rate / optim.lr * _ROWS > row + 0.5 else " " for rate in rates) for row in range(_ROWS)]
    return [", ".join(words), *(row.rstrip() for row in reversed(rows)), f"{'1':<{_COLUMNS - 8}}{steps:>8}"]


def _decay_in_words(config: Config) -> list[str]:
    optim, steps = config.optim, config.train.steps
    if optim.schedule == "constant":
        return []
    if optim.schedule == "milestones":
        return [f"{learning_rate(config, step + 1):g} after step {step}" for step in optim.milestones if step < steps]
    begin, end = decay_interval(config)
    beyond = f"; the run ends before, at {learning_rate(config, steps):g}" if end > steps else ""
    return [f"down from step {begin} to {optim.final_lr or 0.0:g} at step {end}{beyond}"]


def check_schedule(config: Config) -> None:
    """Refuse settings that the schedule does not know, or that leave it no steps.

    Raises:
        UserError: names one.
    """
    optim = config.optim
    for name in ("decay_steps", "final_lr", "milestones"):
        value = getattr(optim, name)
        if name not in _OF_DECAY[optim.schedule] and value != getattr(OptimConfig(), name):
            raise UserError(f"optim.{name}={value} has no effect with optim.schedule={optim.schedule}; remove it")
    if optim.final_lr is not None and optim.final_lr > optim.lr:
        raise UserError(f"optim.final_lr={optim.final_lr} is above optim.lr={optim.lr}, from which it decays; lower it")
    if optim.schedule == "milestones":
        _check_milestones(config)
    elif optim.schedule != "constant":
        _check_decay(config)


def _check_milestones(config: Config) -> None:
    optim = config.optim
    if not optim.milestones:
        raise UserError("optim.milestones is not set; optim.schedule=milestones needs steps, such as [100000, 150000]")
    bounds = [max(optim.warmup_steps, 1), *optim.milestones]
    if bounds != sorted(bounds) or len(set(optim.milestones)) < len(optim.milestones):
        raise UserError(
            f"optim.milestones={optim.milestones} must be growing steps, none before the end of the warm-up "
            f"(optim.warmup_steps={optim.warmup_steps})"
        )
    if optim.final_lr == 0:
        raise UserError("optim.final_lr=0.0 is reached by no factor of optim.schedule=milestones; choose one above 0")


def _check_decay(config: Config) -> None:
    optim, steps = config.optim, config.train.steps
    if optim.schedule == "wsd" and not optim.decay_steps:
        raise UserError("optim.decay_steps is not set; optim.schedule=wsd needs the length of its decay, such as 10000")
    begin, end = decay_interval(config)
    if end <= begin:
        raise UserError(
            f"optim.warmup_steps={optim.warmup_steps} leaves none of train.steps={steps} for "
            f"optim.schedule={optim.schedule} to decay in; lower it or give optim.decay_steps"
        )
    if begin < optim.warmup_steps:
        raise UserError(
            f"optim.decay_steps={optim.decay_steps} and optim.warmup_steps={optim.warmup_steps} are more than "
            f"train.steps={steps}, and optim.schedule=wsd decays to its end; lower one"
        )
