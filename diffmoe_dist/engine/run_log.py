"""What a run writes about itself: metrics.jsonl, expert_load.jsonl, TensorBoard, a log file for each rank, and lines or
a bar to watch.

The first rank has a `RunLog`; the others have a `NullRunLog`, whose methods do nothing, so no caller asks for its rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from diffmoe_dist.files import write_atomically
from diffmoe_dist.logs import logger


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

    def close(self) -> None: ...


class RunLog:
    def __init__(self, run_dir: Path, first_step: int, steps: int) -> None:
        self.jsonl = _continue_jsonl(run_dir / "metrics.jsonl", first_step)
        self.load_jsonl = _continue_jsonl(run_dir / "expert_load.jsonl", first_step)
        self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self.watched = sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=first_step, unit="step", disable=not self.watched, dynamic_ncols=True)
        self.steps = steps
        self.samples = run_dir / "samples"
        self.samples.mkdir(exist_ok=True)

    def step(self, step: int) -> None:
        self.bar.update(1)

    def metrics(self, values: dict[str, Any]) -> None:
        self.jsonl.write(json.dumps(values) + "\n")
        self.jsonl.flush()
        for name, value in values.items():
            if name != "step" and value is not None:
                self.tensorboard.add_scalar(name, value, values["step"])
        self.bar.set_postfix(loss=f"{values['loss']:.4f}")
        left = (self.steps - values["step"]) * values["step_seconds"]
        logger.info(
            "step %d/%d  loss %.5f  grad norm %.4f  %.0f images/s  %s left",
            values["step"], self.steps, values["loss"], values["grad_norm"], values["images_per_second"],
            tqdm.format_interval(left),
        )  # fmt: skip

    def load(self, values: dict[str, Any]) -> None:
        self.load_jsonl.write(json.dumps(values) + "\n")
        self.load_jsonl.flush()

    def image(self, grid_HWC: np.ndarray, step: int) -> None:
        self.tensorboard.add_image("samples", grid_HWC, step, dataformats="HWC")
        Image.fromarray(grid_HWC.squeeze()).save(self.samples / f"step-{step:08d}.png")

    def figures(self, figures_HWC: dict[str, np.ndarray], step: int) -> None:
        for name, figure_HWC in figures_HWC.items():
            self.tensorboard.add_image(f"experts/{name}", figure_HWC, step, dataformats="HWC")

    def close(self) -> None:
        self.bar.close()
        self.jsonl.close()
        self.load_jsonl.close()
        self.tensorboard.close()


class NullRunLog:
    def step(self, step: int) -> None: ...

    def metrics(self, values: dict[str, Any]) -> None: ...

    def load(self, values: dict[str, Any]) -> None: ...

    def image(self, grid_HWC: np.ndarray, step: int) -> None: ...

    def figures(self, figures_HWC: dict[str, np.ndarray], step: int) -> None: ...

    def close(self) -> None: ...


def open_run_log(run_dir: Path, rank: int, first_step: int, steps: int) -> Log:
    """The log of a rank. Lines of steps after `first_step`, which are about to be taken again, are removed."""
    return RunLog(run_dir, first_step, steps) if rank == 0 else NullRunLog()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps of a metrics.jsonl or expert_load.jsonl, without a line that a kill has torn."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


def _continue_jsonl(path: Path, first_step: int) -> Any:
    """Open for appending, without the lines of steps that a resume is about to take again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= first_step]
        write_atomically(path, "".join(kept))
    return path.open("a")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line torn by a kill
        return float("inf")
