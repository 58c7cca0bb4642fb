"""What a run has done so far, as its folder says it: settings, logged steps, and what these have cost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe_dist.config import Config, flat_settings, load_config
from diffmoe_dist.engine.progress import complete_checkpoints, read_progress
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import refuse_irregular
from diffmoe_dist.model.accounting import account

AXES = ("step", "images_seen", "training_flops", "device_hours")
_NEEDED = ("images_seen", "loss", "images_per_second", "step_seconds")


@dataclass(frozen=True)
class Curve:
    """Values of one quantity at some steps, both (N,), in their order."""

    steps_N: np.ndarray
    values_N: np.ndarray

    def __len__(self) -> int:
        return len(self.steps_N)

    def at(self, step: float) -> float | None:
        """The newest value up to a step."""
        found = int(np.searchsorted(self.steps_N, step, side="right"))
        return float(self.values_N[found - 1]) if found else None

    def smoothed(self, window: float) -> Curve:
        """Each value replaced by the mean over the values of the last `window` steps."""
        sums = np.concatenate([[0.0], np.cumsum(self.values_N)])
        first = np.searchsorted(self.steps_N, self.steps_N - window, side="right")
        last = np.arange(1, len(self) + 1)
        first = np.minimum(first, last - 1)
        return Curve(self.steps_N, (sums[last] - sums[first]) / (last - first))


@dataclass(frozen=True)
class RunHistory:
    folder: Path
    config: Config  # of its last start
    earlier: dict[int, Config]  # by the step until which they held: settings that a resume has changed
    lines: list[dict[str, Any]]  # of metrics.jsonl, by rising step
    ranks_N: np.ndarray | None  # at each line; None: nothing says it
    ranks_are_guessed: bool  # from the log files: the run is of a version that does not write them down
    checkpoints: list[Path]  # complete ones, oldest first
    is_done: bool  # train.steps was reached
    data_fingerprint: str | None  # None: no checkpoint yet

    @property
    def last_step(self) -> int:
        return int(self.lines[-1]["step"])

    def names(self) -> list[str]:
        """Of everything numeric that was logged, in the order of its first line."""
        return [
            name
            for name in dict.fromkeys(name for line in self.lines for name in line)
            if any(_is_number(line.get(name)) for line in self.lines)
        ]

    def curve(self, name: str) -> Curve:
        """A quantity of metrics.jsonl where it was logged and is finite; perhaps of no step."""
        found = [(line["step"], line[name]) for line in self.lines if _is_number(line.get(name))]
        return Curve(np.array([step for step, _ in found], float), np.array([value for _, value in found], float))

    @cached_property
    def axes(self) -> dict[str, np.ndarray | None]:
        """Where each line stands, by name in `AXES`; (N,) each. None: it is not known."""
        steps_N, images_N = (np.array([line[name] for line in self.lines], float) for name in AXES[:2])
        seconds_N = np.array([line["step_seconds"] for line in self.lines], float)
        counts = account(self.config)
        flops_N = [counts.training_flops(float(line.get("capacity") or 0.0)) for line in self.lines]
        hours_N = None
        if self.ranks_N is not None:
            hours_N = np.cumsum(np.diff(steps_N, prepend=0.0) * seconds_N * self.ranks_N / 3600)
        return {
            "step": steps_N,
            "images_seen": images_N,
            "training_flops": np.cumsum(np.diff(images_N, prepend=0.0) * np.array(flops_N)),
            "device_hours": hours_N,
        }

    def place(self, steps_N: np.ndarray, axis: str) -> np.ndarray | None:
        """Where these steps stand on an axis, between the lines by interpolation. None: it is not known."""
        places_N, own_N = self.axes[axis], self.axes["step"]
        assert own_N is not None
        if places_N is None:
            return None
        return np.interp(steps_N, np.concatenate([[0.0], own_N]), np.concatenate([[0.0], places_N]))


def read_history(folder: Path) -> RunHistory:
    """Read a run's folder, which another process may be writing to.

    Raises:
        UserError: a file is missing or damaged; it is named.
    """
    lines = _read_lines(folder / "metrics.jsonl")
    config = _read_config(folder / "config.yaml")
    earlier = {}
    for path in folder.glob("config-until-step-*.yaml"):
        if (step := path.stem.rpartition("-")[2]).isdecimal():
            earlier[int(step)] = _read_config(path)
    checkpoints = complete_checkpoints(folder / "checkpoints")
    logs = len(list(folder.glob("logs/rank-*.log")))
    is_guessed = not all("ranks" in line for line in lines)
    ranks = [line.get("ranks", logs) for line in lines]
    return RunHistory(
        folder=folder,
        config=config,
        earlier=dict(sorted(earlier.items())),
        lines=lines,
        ranks_N=np.array(ranks, float) if all(ranks) else None,
        ranks_are_guessed=is_guessed and logs > 0,
        checkpoints=checkpoints,
        is_done=(folder / "DONE").is_file(),
        data_fingerprint=read_progress(checkpoints[-1]).data_fingerprint if checkpoints else None,
    )


def value_over_time(run: RunHistory, name: str) -> list[tuple[int | None, Any]]:
    """A setting and the steps until which it had each value, None for the last one."""
    found: list[tuple[int | None, Any]] = []
    for step, config in [*run.earlier.items(), (None, run.config)]:
        value = flat_settings(config).get(name)
        if found and found[-1][1] == value:
            found.pop()
        found.append((step, value))
    return found


def _read_config(path: Path) -> Config:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a training run")
    try:
        return load_config(path, stored=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        texts = refuse_irregular(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder of a training run") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts[:-1], start=1):  # what follows the last newline is being written, or torn
        line = _parsed(text)
        if line is None:
            raise UserError(f"{path}: line {number} is damaged: it is no logged step; remove that line")
        while lines and lines[-1]["step"] >= line["step"]:  # taken again by a later attempt
            lines.pop()
        lines.append(line)
    if not lines:
        raise UserError(f"{path}: no step is logged yet; wait for the first one, or leave this run out")
    return lines


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 1:
        return None
    ranks = line.get("ranks", 1)
    is_whole = all(_is_number(line.get(name)) for name in _NEEDED) and type(ranks) is int and ranks > 0
    return line if is_whole else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
