"""What a run writes about itself: metrics.jsonl, expert_load.jsonl, TensorBoard, a log file for each rank, and lines or
a bar to watch.

The first rank has a `RunLog`; the others have a `NullRunLog`, whose methods do nothing, so no caller asks for its rank.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from tqdm import tqdm

from diffmoe_dist.config import Config
from diffmoe_dist.engine.charts import Charts
from diffmoe_dist.engine.event_file import EventFile, Histogram
from diffmoe_dist.engine.wandb_run import WandbRun
from diffmoe_dist.files import AppendedFile, atomic_file, write_atomically
from diffmoe_dist.logs import failed_log_lines, logger

WELL = 10  # steps in a row must write a file before its next failure is news
METRICS, LOAD = "metrics.jsonl", "expert_load.jsonl"


class Log(Protocol):
    def step(self, step: int) -> None:
        """An optimizer step is done; moves the bar."""
        ...

    def metrics(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; `values` has a `step`."""
        ...

    def load(self, values: dict[str, Any]) -> None:
        """One line of expert_load.jsonl; `values` has a `step`."""
        ...

    def image(self, grid_HWC: np.ndarray, step: int) -> None: ...

    def figures(self, figures_HWC: dict[str, np.ndarray], step: int) -> None: ...

    def histograms(self, found: dict[str, Histogram], step: int) -> None:
        """By `what/layer`."""
        ...

    def close(self) -> None: ...


class Tracker(Protocol):
    """What charts a run: TensorBoard's file of events, or Weights & Biases. Its methods raise OSError."""

    def add_scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def add_images(self, images_HWC: Mapping[str, np.ndarray], step: int) -> None: ...

    def add_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """A line, event or picture that cannot be written is counted and left out: training goes on."""

    def __init__(self, config: Config, first_step: int) -> None:
        self.run_dir = run_dir = Path(config.run_dir)
        self.charts = Charts(config)
        self.jsonl = {name: _continue_jsonl(run_dir / name, first_step) for name in (METRICS, LOAD)}
        event_file = EventFile(run_dir / "tensorboard", purge_step=first_step + 1)
        self.trackers: dict[str, Tracker] = {"tensorboard": event_file}
        command = shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])
        event_file.add_texts(_about(config, command), first_step)
        if config.log.wandb:
            self.trackers["wandb"] = WandbRun(config, command)
        self.failed = 0  # writes
        self.failing: dict[str, int] = {}  # what could not be written, and the steps until a failure is news again
        self.outcomes: dict[str, set[bool]] = {}  # of the writes of a step: a small one may find room beside others
        self.watched = sys.stderr.isatty()
        self.steps = steps = config.train.steps
        self.bar = tqdm(total=steps, initial=first_step, unit="step", disable=not self.watched, dynamic_ncols=True)
        self.samples = run_dir / "samples"
        self.samples.mkdir(exist_ok=True)

    def step(self, step: int) -> None:
        self.bar.update(1)
        for name in [name for name, outcomes in self.outcomes.items() if name in self.failing and all(outcomes)]:
            self.failing[name] -= 1
            if not self.failing[name]:
                del self.failing[name]
        self.outcomes.clear()

    def metrics(self, values: dict[str, Any]) -> None:
        values = {**values, "failed_log_writes": self.failed + failed_log_lines()}
        self._append(METRICS, values)
        scalars = self.charts.of(values)
        self._track(lambda tracker: tracker.add_scalars(scalars, values["step"]))
        self.bar.set_postfix(loss=f"{values['loss']:.4f}")
        left = (self.steps - values["step"]) * values["step_seconds"]
        logger.info(
            "step %d/%d  loss %.5f  grad norm %.4f  %.0f images/s  %s left",
            values["step"], self.steps, values["loss"], values["grad_norm"], values["images_per_second"],
            tqdm.format_interval(left),
        )  # fmt: skip

    def load(self, values: dict[str, Any]) -> None:
        self._append(LOAD, values)

    def image(self, grid_HWC: np.ndarray, step: int) -> None:
        self._track(lambda tracker: tracker.add_images({"samples": grid_HWC}, step))
        with self._counted("samples"), atomic_file(self.samples / f"step-{step:08d}.png") as file:
            Image.fromarray(grid_HWC.squeeze()).save(file, "PNG")

    def figures(self, figures_HWC: dict[str, np.ndarray], step: int) -> None:
        figures = {f"moe/{name}": figure for name, figure in figures_HWC.items()}
        self._track(lambda tracker: tracker.add_images(figures, step))

    def histograms(self, found: dict[str, Histogram], step: int) -> None:
        hidden = "load/" if self.charts.load_is_constant() else ()
        shown = {f"moe/{name}": histogram for name, histogram in found.items() if not name.startswith(hidden)}
        self._track(lambda tracker: tracker.add_histograms(shown, step))

    def close(self) -> None:
        self.bar.close()
        files: dict[str, AppendedFile | Tracker] = {**self.jsonl, **self.trackers}
        for name, file in files.items():
            with self._counted(name):
                file.close()
        failed = self.failed + failed_log_lines()
        if failed:
            logger.warning("%d writes of metrics, pictures and log lines failed; what they held is lost", failed)

    def _track(self, add: Callable[[Tracker], None]) -> None:
        for name, tracker in self.trackers.items():
            with self._counted(name):
                add(tracker)

    def _append(self, name: str, values: dict[str, Any]) -> None:
        with self._counted(name):
            self.jsonl[name].append((json.dumps(values) + "\n").encode())

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed += 1
            if name not in self.failing:
                logger.warning(
                    "%s cannot be written (%s): training goes on, what is written there meanwhile is lost and counted "
                    "(failed_log_writes)", self.run_dir / name, error.strerror,
                )  # fmt: skip
            self.failing[name] = WELL
            self.outcomes.setdefault(name, set()).add(False)
        else:
            self.outcomes.setdefault(name, set()).add(True)


class NullRunLog:
    def step(self, step: int) -> None: ...

    def metrics(self, values: dict[str, Any]) -> None: ...

    def load(self, values: dict[str, Any]) -> None: ...

    def image(self, grid_HWC: np.ndarray, step: int) -> None: ...

    def figures(self, figures_HWC: dict[str, np.ndarray], step: int) -> None: ...

    def histograms(self, found: dict[str, Histogram], step: int) -> None: ...

    def close(self) -> None: ...


def open_run_log(config: Config, rank: int, first_step: int) -> Log:
    """The log of a rank. Lines of steps after `first_step`, which are about to be taken again, are removed."""
    return RunLog(config, first_step) if rank == 0 else NullRunLog()


def _about(config: Config, command: str) -> dict[str, str]:
    """The settings and the command, in Markdown."""
    settings = OmegaConf.to_yaml(OmegaConf.structured(config))
    return {name: f"```\n{text.strip()}\n```" for name, text in {"config": settings, "command": command}.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps of a metrics.jsonl or expert_load.jsonl, without a line that a kill has torn."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


def _continue_jsonl(path: Path, first_step: int) -> AppendedFile:
    """Open for appending, without the lines of steps that a resume is about to take again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= first_step]
        write_atomically(path, "".join(kept))
    return AppendedFile(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):  # a line torn by a kill, or edited
        return float("inf")
