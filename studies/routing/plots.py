"""The plots of the study, from its committed results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np

from studies.routing.report import (
    FRECHET,
    LOSS,
    REFERENCE,
    Measure,
    Results,
    difference,
    final_loss,
    is_finished,
    losses_by_level,
    relative_load,
    without_predictor,
)
from studies.routing.results import LEVELS, by_learning_rate
from studies.routing.statistics import mean_of
from studies.routing.systems import (
    EXPERT_NUMBERS,
    LARGER_SYSTEMS,
    POOLS,
    SEEDS,
    SENSITIVE_SYSTEMS,
    SYSTEMS,
    VARIANTS,
    Run,
    Variant,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: Any = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "legend.frameon": False, "legend.fontsize": 9, "savefig.dpi": 110,
}  # fmt: skip
GRAY = "#5b616b"
COLORS = {
    "dense": "#1c1f24", "dense_wide": "#8a8f98", "token_choice": "#c44e52", "load_balanced": "#dd8452",
    "expert_choice": "#2a7f62", "expert_choice_dynamic": "#7fbf9f", "global_pool_static": "#1f5fa8",
    "global_pool_dynamic": "#6fa8dc", "prototype": "#7b4fa3", "prototype_expert_choice": "#b79ad4",
}  # fmt: skip


def draw_all(results: Results, folder: Path) -> list[str]:
    """Write every plot that there are results for; the names of the others come back."""
    folder.mkdir(parents=True, exist_ok=True)
    undrawn = []
    with plt.rc_context(STYLE):
        for name, draw in PLOTS.items():
            figure = draw(results)
            if figure is None:
                undrawn.append(name)
            else:
                figure.savefig(folder / f"{name}.png", bbox_inches="tight", metadata={"Software": ""})
            plt.close("all")
    return undrawn


def differences_plot(results: Results) -> Figure | None:
    """Of each variant, a point for each seed, and the mean with both intervals."""
    names = [name for name in VARIANTS if name != REFERENCE and results.of(VARIANTS[name].system)]
    if not names or not results.of(REFERENCE):
        return None
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 0.42 * len(names) + 1.4), sharey=True)
    for axes, measure in zip(panels, (LOSS, FRECHET), strict=True):
        for row, name in enumerate(names):
            _draw_difference(axes, results, name, measure, row)
        axes.axvline(0, color=GRAY, linewidth=1)
        axes.set(xlabel=f"{measure.title}, minus dense")
        axes.locator_params(axis="x", nbins=6)
        axes.set_yticks(range(len(names)), [VARIANTS[name].title for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
    panels[0].set_title("lower is better; dots: seeds", loc="left", fontsize=9, color=GRAY)
    panels[1].set_title("line: own 95 %; band: common 95 %", loc="left", fontsize=9, color=GRAY)
    return figure


def _draw_difference(axes: Axes, results: Results, name: str, measure: Measure, row: int) -> None:
    variant, dense = VARIANTS[name], VARIANTS[REFERENCE]
    own, common = difference(results, variant, dense, measure)
    if own is None:
        return
    values, of_dense = results.values(variant, measure), results.values(dense, measure)
    points = [values[seed] - of_dense[seed] for seed in values if seed in of_dense]
    color = COLORS[name]
    if common is not None:
        axes.errorbar(own.mean, row, xerr=common.half_width, color=color, linewidth=5, alpha=0.35)
    axes.errorbar(own.mean, row, xerr=own.half_width, color=color, marker="|", markersize=12, linewidth=1.2, capsize=3)
    axes.plot(points, [row] * len(points), "o", color=color, markersize=4)


def noise_levels_plot(results: Results) -> Figure | None:
    """The difference to dense at each noise level, the mean over seeds."""
    dense = {seed: losses_by_level(run, REFERENCE) for seed, run in results.of(REFERENCE).items()}
    _, axes = plt.subplots(figsize=(7.5, 4))
    drawn = False
    for name, variant in VARIANTS.items():
        runs = {seed: run for seed, run in results.of(variant.system).items() if seed in dense}
        if name == REFERENCE or not runs:
            continue
        rows = np.array([np.array(losses_by_level(run, name)) / dense[seed] - 1 for seed, run in runs.items()]) * 100
        estimates = [mean_of(list(column)) for column in rows.T]
        level = np.arange(len(estimates)) + 1
        axes.plot(level, [one.mean for one in estimates], "o-", color=COLORS[name], label=variant.title, markersize=3)
        drawn = True
    axes.axhline(0, color=GRAY, linewidth=1)
    axes.set_xticks(range(1, LEVELS + 1))
    axes.set(xlabel="noise level: tenths of the training times, least noise first", ylabel="loss against dense, %")
    return _with_legend(axes) if drawn else None


def curves_plot(results: Results) -> Figure | None:
    """Losses while training, of the weights themselves, against those of dense on the same batches."""
    dense = {seed: run["curve"]["training"] for seed, run in results.of(REFERENCE).items()}
    _, axes = plt.subplots(figsize=(7.5, 4))
    drawn = False
    for name, variant in VARIANTS.items():
        runs = {seed: run["curve"]["training"] for seed, run in results.of(variant.system).items() if seed in dense}
        if name in (REFERENCE, "global_pool_dynamic") or not runs:
            continue
        steps = sorted(map(int, next(iter(runs.values()))))
        means = [fmean(curve[str(step)] / dense[seed][str(step)] - 1 for seed, curve in runs.items()) for step in steps]
        title = SYSTEMS[variant.system].title
        axes.plot(steps, 100 * np.array(means), color=COLORS[name], label=title)
        drawn = True
    axes.axhline(0, color=GRAY, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss against dense, %,\nmeans of 50 steps")
    return _with_legend(axes) if drawn else None


def learning_rate_plot(results: Results) -> Figure | None:
    """Losses over the rates; and, of each rate, how far DiffMoE is from dense while training."""
    losses = {system: by_learning_rate(results.runs, system) for system in ("dense", *SENSITIVE_SYSTEMS)}
    return _rates_figure(losses, results.runs, limit=6)  # the loss of one run jumps, by more than all else


def larger_plot(results: Results) -> Figure | None:
    """The same of the larger model."""
    finished = {name: run for name, run in results.larger.items() if is_finished(run)}
    losses = {
        system: {run["lr"]: final_loss(run) for run in finished.values() if run["system"] == system}
        for system in LARGER_SYSTEMS
    }
    return _rates_figure(losses, finished, limit=12)


def _rates_figure(
    losses_by_rate: Mapping[str, Mapping[float, Any]], runs: Mapping[str, Any], limit: float
) -> Figure | None:
    """Left: the losses of each system. Right: the curves of dense and DiffMoE, in percent, within the limit."""
    figure, (axes, while_training) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    colors = COLORS | {"global_pool": COLORS["global_pool_static"]}
    drawn = False
    for system, losses in losses_by_rate.items():
        if len(losses) > 1:
            axes.plot(
                *zip(*sorted(losses.items()), strict=True), "o-", color=colors[system], label=SYSTEMS[system].title
            )
            drawn = True
    if not drawn:
        return None
    axes.set_xscale("log")
    ticks = sorted({run["lr"] for run in runs.values()})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45)
    axes.minorticks_off()
    axes.set(xlabel="learning rate", ylabel="loss on held-out images, seed 0")
    for number, lr in enumerate(ticks):
        dense, ours = (runs.get(Run(system, SEEDS[0], lr).name) for system in LARGER_SYSTEMS)
        if dense is not None and ours is not None:
            of_dense, curve = dense["curve"]["training"], ours["curve"]["training"]
            differences = [100 * (curve[step] / of_dense[step] - 1) for step in of_dense]
            shade = plt.get_cmap("Blues")((number + 1) / len(ticks))
            while_training.plot([int(step) for step in of_dense], differences, color=shade, label=f"{lr:g}")
    while_training.axhline(0, color=GRAY, linewidth=1)
    while_training.set_ylim(-limit, limit)
    while_training.set(xlabel="step", ylabel="DiffMoE's training loss\nagainst dense, %, seed 0")
    axes.legend()
    while_training.legend(title="learning rate", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def load_plot(results: Results) -> Figure | None:
    """Shares of the tokens, the busiest expert of each layer first."""
    loads = {
        name: [layer for run in results.of(variant.system).values() for layer in relative_load(run, variant.rule)]
        for name, variant in VARIANTS.items()
    }
    loads = {name: layers for name, layers in loads.items() if layers}
    if not loads:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    for name, layers in loads.items():
        mean = np.mean([sorted(layer, reverse=True) for layer in layers], axis=0)
        axes.plot(np.arange(len(mean)) + 1, mean, "o-", color=COLORS[name], label=VARIANTS[name].title, markersize=3)
    axes.axhline(1, color=GRAY, linewidth=1)
    axes.set(xlabel="expert of a layer, the busiest first", ylabel="tokens over an equal share", ylim=(0, None))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def ablations_plot(results: Results) -> Figure | None:
    """Loss and distance over the size of the pool, and over the number of experts."""
    parts = {"images in a pool": POOLS, "experts": EXPERT_NUMBERS}
    if any(sum(bool(results.of(system)) for system in systems.values()) < 2 for systems in parts.values()):
        return None
    figure, panels = plt.subplots(2, 2, figsize=(8, 5.6), sharey="row")
    for column, (label, systems) in enumerate(parts.items()):
        for row, measure in enumerate((LOSS, FRECHET)):
            axes = panels[row, column]
            for number, system in systems.items():
                values = list(results.values(Variant("", system, without_predictor(system)), measure).values())
                if values:
                    axes.plot([number] * len(values), values, "o", color="#6fa8dc", markersize=4)
                    axes.plot(number, fmean(values), "_", color="#1f5fa8", markersize=16, markeredgewidth=2)
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(systems), [str(number) for number in systems])
            axes.set(xlabel=label, ylabel=measure.title if column == 0 else "")
    figure.tight_layout()
    return figure


def _with_legend(axes: Axes) -> Figure:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


PLOTS: dict[str, Callable[[Results], Figure | None]] = {
    "differences": differences_plot,
    "noise-levels": noise_levels_plot,
    "curves": curves_plot,
    "learning-rate": learning_rate_plot,
    "larger": larger_plot,
    "load": load_plot,
    "ablations": ablations_plot,
}
