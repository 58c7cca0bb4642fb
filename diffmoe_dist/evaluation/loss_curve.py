"""A picture of a run's training: its losses and gradient norm over the steps."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from diffmoe_dist.engine.metrics import read_metrics
from diffmoe_dist.errors import UserError

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402


def draw_loss_curve(run_dir: Path) -> Path:
    """Draw run_dir/loss.png from run_dir/metrics.jsonl.

    Raises:
        UserError: the run has logged nothing.
    """
    lines = read_metrics(run_dir / "metrics.jsonl")
    if not lines:
        raise UserError(
            f"--run {run_dir}: it has no metrics.jsonl with a logged step; give the folder of a training run"
        )
    steps = [line["step"] for line in lines]
    names = sorted({name for line in lines for name in line if name.startswith("loss_")})
    figure, (losses, norms) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in names:
        of_name = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        losses.plot(*zip(*of_name, strict=True), label=name)
    losses.set(xlabel="step", title="losses", yscale="log")
    losses.legend()
    norms.plot(steps, [line["grad_norm"] for line in lines], color="tab:gray")
    norms.set(xlabel="step", title="gradient norm before clipping", yscale="log")
    for axes in (losses, norms):
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    picture = run_dir / "loss.png"
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture
