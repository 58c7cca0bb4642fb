"""A figure of a run's training: its losses and gradient norm over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from diffmoe_dist.engine.run_log import read_metrics
from diffmoe_dist.errors import UserError

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator


def draw_loss_curve(run_dir: Path) -> Path:
    """Draw run_dir/loss.png from run_dir/metrics.jsonl.

    Raises:
        UserError: the run has logged nothing.
    """
    lines = read_run_metrics(run_dir)
    figure, (losses, norms) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    plot_losses(losses, lines)
    plot_grad_norm(norms, lines)
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def read_run_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, one or more.

    Raises:
        UserError: there is none.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    if not lines:
        raise UserError(
            f"--run {run_dir}: it has no metrics.jsonl with a logged step; give the folder of a training run"
        )
    return lines


def plot_losses(axes: Axes, lines: list[dict[str, Any]]) -> None:
    for name in sorted({name for line in lines for name in line if name.startswith("loss_")}):
        of_name = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axes.plot(*zip(*of_name, strict=True), label=name)
    axes.set(xlabel="step", title="losses", yscale="log")
    axes.legend()
    _readable(axes)


def plot_grad_norm(axes: Axes, lines: list[dict[str, Any]]) -> None:
    axes.plot([line["step"] for line in lines], [line["grad_norm"] for line in lines], color="tab:gray")
    axes.set(xlabel="step", title="gradient norm before clipping", yscale="log")
    _readable(axes)


def _readable(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
