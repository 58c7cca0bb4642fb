"""One constant threshold for all experts: what capacity it gives, and what the images are worth (DiffMoE eq. 16)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

from diffmoe_dist.engine.weights import read_settings
from diffmoe_dist.files import make_writable, write_json
from diffmoe_dist.launch import Launch
from diffmoe_dist.logs import logger
from diffmoe_dist.sampling.job import open_source, run_job
from diffmoe_dist.sampling.settings import SamplingSettings

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LOWEST_SHOWN = 1e-10  # on an axis that has no zero
Score = Callable[[np.ndarray], float]  # (N, H, W, C) uint8 images to a number, lower is better


@dataclass(frozen=True)
class Point:
    threshold: float
    capacity: float  # measured C
    score: float | None


def search_thresholds(
    settings: SamplingSettings,
    thresholds: list[float],
    out: Path,
    device: torch.device,
    launch: Launch,
) -> list[Point]:
    """Sample the same images at each threshold; collective. What `out` has already is not sampled again.

    Returns:
        On the first rank a point without a score for each threshold, in the order given; on the others nothing.

    Raises:
        UserError: the model has no capacity predictor, or as in `sample_to_folder`.
    """
    points = []
    source = open_source(_at(thresholds[0], settings), device, launch)
    for threshold in thresholds:
        folder = _folder(out, threshold)
        logger.info("constant threshold %g", threshold)
        here = _at(threshold, settings)
        config = read_settings(source.checkpoint, here.overrides)
        for layer in source.model.moe_layers:
            layer.router.settings = config.moe  # type: ignore[assignment]
        make_writable(folder, f"--out {out}")
        run_job(here, replace(source, config=config), folder, launch)
        if launch.rank == 0:
            capacity = json.loads((folder / "sampling.json").read_text())["capacity"]
            points.append(Point(threshold, capacity, None))
    return points


def _at(threshold: float, settings: SamplingSettings) -> SamplingSettings:
    rule = ("moe.inference=constant", f"moe.constant_threshold={threshold!r}")
    return replace(settings, overrides=(*settings.overrides, *rule))


def with_scores(points: list[Point], out: Path, score: Score) -> list[Point]:
    """What the images in `out` are worth. It may take long: for one process, when no other one waits."""

    def judged(point: Point) -> Point:
        with np.load(_folder(out, point.threshold) / "samples.npz") as file:
            return replace(point, score=score(file["arr_0"]))

    return [judged(point) for point in points]


def _folder(out: Path, threshold: float) -> Path:
    return out / f"threshold-{threshold!r}"


def best_point(points: list[Point], most_capacity: float = 1.0) -> Point | None:
    """The best score at C <= 1 (eq. 16), or without scores the largest such C; None: no threshold is high enough."""
    allowed = [point for point in points if point.capacity <= most_capacity]
    return min(allowed, key=lambda point: -point.capacity if point.score is None else point.score, default=None)


def format_table(points: list[Point]) -> str:
    """A line for each threshold: threshold, C, score."""
    rows = [f"{'threshold':>12} {'C':>8} {'score':>12}"]
    for point in points:
        score = "-" if point.score is None else f"{point.score:.4f}"
        rows.append(f"{point.threshold:>12g} {point.capacity:>8.4f} {score:>12}")
    return "\n".join(rows) + "\n"


def write_points(points: list[Point], out: Path) -> Path:
    """Write interval_search.json and interval_search.png; returns the path of the figure."""
    write_json(out / "interval_search.json", [asdict(point) for point in points])
    ordered = sorted(points, key=lambda point: point.threshold)
    scored = ordered[0].score is not None
    figure, panels = plt.subplots(1, 2 if scored else 1, figsize=(9.5 if scored else 5, 3.8), squeeze=False)
    capacities = [point.capacity for point in ordered]
    thresholds = [max(point.threshold, LOWEST_SHOWN) for point in ordered]
    by_threshold = panels[0, 0]
    by_threshold.plot(thresholds, capacities, "o-", color="#2a5d9f")
    by_threshold.axhline(1, color="#8a8f98", linestyle=":", linewidth=1)
    by_threshold.set(xlabel="constant threshold", ylabel="measured capacity C", xscale="logit")
    by_threshold.set_xticks(thresholds, [f"{point.threshold:g}" for point in ordered], rotation=45)
    by_threshold.minorticks_off()
    if scored:
        panels[0, 1].plot(capacities, [point.score for point in ordered], "o-", color="#2a5d9f")
        for point in ordered:
            panels[0, 1].annotate(
                f"{point.threshold:g}",
                (point.capacity, point.score),
                textcoords="offset points",
                xytext=(5, 5),
                fontsize=8,
            )
        panels[0, 1].axvline(1, color="#8a8f98", linestyle=":", linewidth=1)
        panels[0, 1].set(xlabel="measured capacity C", ylabel="score (lower is better)")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.tight_layout()
    path = out / "interval_search.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
