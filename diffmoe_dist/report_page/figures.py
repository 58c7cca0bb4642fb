"""The figures of a run's report, for an HTML page or for TensorBoard.

Shape legend as in `routing_trace`: P passes, L layers, N images, S tokens an image, E experts.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from textwrap import shorten, wrap
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from diffmoe_dist.report_page.loss_curve import plot_grad_norm, plot_losses
from diffmoe_dist.sampling.conditions import ClassLabels, Conditions
from diffmoe_dist.sampling.routing_trace import Passes, RoutingTrace

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

SIZE = (4.8, 3.3)  # inches; small, so that letters are legible where a telephone shrinks the figure
STYLE: Any = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3b4048", "xtick.color": "#5b616b", "ytick.color": "#5b616b", "axes.titlesize": 11,
    "axes.titlecolor": "#3b4048", "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.8,
    "svg.hashsalt": "diffmoe_dist",
}  # fmt: skip
MOST_LINES = 8  # of layers in a legend; more are distinguished by a colour bar
MOST_CLASSES = 24  # bars of a figure
MOST_COLUMNS = 40  # of a heat map over passes
MOST_IMAGES, MOST_STEPS = 5, 5  # rows and columns of token maps
NOISE_TO_IMAGE = "from noise (0) to image (1)"


def loss_figure(lines: list[dict[str, Any]]) -> Figure:
    def draw(axes: Axes) -> None:
        plot_losses(axes, lines)
        axes.set_title("")  # the page has one

    return one_panel(draw)


def grad_norm_figure(lines: list[dict[str, Any]]) -> Figure:
    def draw(axes: Axes) -> None:
        plot_grad_norm(axes, lines)
        axes.set_title("")

    return one_panel(draw)


def speed_figure(lines: list[dict[str, Any]]) -> Figure:
    def draw(axes: Axes) -> None:
        axes.plot(
            [line["step"] for line in lines], [line["images_per_second"] for line in lines], color="#2a7f62", alpha=0.9
        )
        axes.set(xlabel="step", ylabel="images per second", ylim=(0, None))
        axes.grid(alpha=0.3)

    return one_panel(draw)


def load_in_training_figure(loads: list[dict[str, Any]], blocks: list[int]) -> Figure:
    """A row for each expert, a column for each logged step."""
    columns = _spread(len(loads), MOST_COLUMNS)
    values_LEX = np.stack([np.array(loads[column]["load"]) for column in columns], axis=2)
    labels = [str(loads[column]["step"]) for column in columns]
    return _expert_rows(values_LEX, blocks, labels, "training step")


def capacity_figure(trace: RoutingTrace, blocks: list[int], trained_for: float | None) -> Figure:
    """C over the progress from noise to image, a line for each layer and one for all."""
    passes = trace.conditional

    def draw(axes: Axes) -> None:
        if trained_for is not None:
            axes.axhline(trained_for, color="#8a8f98", linewidth=1, linestyle=":")
        _layer_lines(axes, passes.progress_P, passes.capacity_by_layer, blocks)
        axes.plot(passes.progress_P, passes.capacity_by_layer.mean(axis=1), color="#1c1f24", linewidth=2.6, label="all")
        if trace.null is not None:
            mean_P = trace.null.capacity_by_layer.mean(axis=1)
            axes.plot(
                trace.null.progress_P,
                mean_P,
                color="#1c1f24",
                linewidth=1.4,
                linestyle="--",
                label="all, unconditional",
            )
        low, high = axes.get_ylim()
        axes.set(
            xlabel=NOISE_TO_IMAGE, ylabel="experts per token", ylim=(max(low - 0.02, 0), high + 0.3 * (high - low))
        )
        axes.grid(alpha=0.25)
        axes.legend(ncols=2)

    return one_panel(draw)


def capacity_map_figure(passes: Passes, blocks: list[int]) -> Figure:
    """C as a map: a row for each layer, a column for each pass."""
    columns = _spread(len(passes.progress_P), MOST_COLUMNS)

    def draw(axes: Axes) -> None:
        shown = axes.imshow(passes.capacity_by_layer[columns].T, aspect="auto", cmap="viridis", interpolation="nearest")
        _progress_ticks(axes, passes.progress_P[columns])
        axes.set_yticks(*_thinned(range(len(blocks)), [f"block {block}" for block in blocks]))
        axes.set(xlabel=NOISE_TO_IMAGE)
        _plain(axes)
        axes.figure.colorbar(shown, ax=axes, label="experts per token")

    return one_panel(draw)


def experts_over_images_figure(
    passes: Passes, images_NHWC: np.ndarray, labels: Sequence[int], name: Callable[[int], str]
) -> Figure:
    """Experts per token at several steps, mean over the layers, laid over the finished image."""
    chosen = _first_of_each(labels)[:MOST_IMAGES]
    steps = _spread(len(passes.progress_P), MOST_STEPS)
    maps_PNS = passes.experts_PLNS[steps].mean(axis=1)[:, chosen]
    grid = int(maps_PNS.shape[2] ** 0.5)
    low, high = float(maps_PNS.min()), max(float(maps_PNS.max()), 1e-6)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(chosen), 1 + len(steps), squeeze=False)
        shown = None
        for row, number in enumerate(chosen):
            image = images_NHWC[number].squeeze()
            underlay = image if image.ndim == 2 else image.mean(axis=2)
            _image_axes(axes[row, 0]).imshow(image, cmap="gray", vmin=0, vmax=255)
            condition = name(labels[number])
            axes[row, 0].set_ylabel(_plain_text(_wrapped(condition)), fontsize=10 if len(condition) <= 16 else 7)
            for column in range(len(steps)):
                panel = _image_axes(axes[row, column + 1])
                extent = (-0.5, underlay.shape[1] - 0.5, underlay.shape[0] - 0.5, -0.5)
                panel.imshow(underlay, cmap="gray", vmin=-255, vmax=255)  # light, so that colours stay what they are
                shown = panel.imshow(
                    maps_PNS[column, row].reshape(grid, grid), cmap="inferno", alpha=0.62, vmin=low, vmax=high,
                    extent=extent, interpolation="nearest",
                )  # fmt: skip
        axes[0, 0].set_title("image")
        for column, step in enumerate(steps):
            axes[0, column + 1].set_title(f"at {passes.progress_P[step]:.2f}")
        assert shown is not None
        figure.colorbar(shown, ax=axes, label="experts per token", shrink=0.7, pad=0.02)

    return _figure(draw, (9.2, 0.6 + 1.3 * len(chosen)))


def class_figure(passes: Passes, labels: Sequence[int], name: Callable[[int], str]) -> Figure:
    """C of each class or caption, a dot for each image; of many classes the lowest and the highest ones."""
    of_class = {label: passes.capacity_by_image[np.array(labels) == label] for label in sorted(set(labels))}
    ordered = sorted(of_class, key=lambda label: of_class[label].mean())
    if len(ordered) > MOST_CLASSES:
        ordered = ordered[: MOST_CLASSES // 2] + ordered[-MOST_CLASSES // 2 :]

    def draw(axes: Axes) -> None:
        means = [of_class[label].mean() for label in ordered]
        axes.barh(range(len(ordered)), means, color="#7fa7d6", height=0.72)
        for place, label in enumerate(ordered):
            axes.plot(of_class[label], [place] * len(of_class[label]), ".", color="#1f3b63", markersize=4, alpha=0.7)
        names = [_plain_text(shorten(name(label), 40, placeholder=" ...")) for label in ordered]
        axes.set_yticks(range(len(ordered)), names)
        everything = np.concatenate(list(of_class.values()))
        margin = max(0.15 * float(np.ptp(everything)), 0.01)
        axes.set(xlabel="experts per token", xlim=(max(everything.min() - margin, 0), everything.max() + margin))
        axes.grid(alpha=0.25, axis="x")

    return one_panel(draw, size=(SIZE[0], max(SIZE[1], 0.27 * len(ordered) + 0.8)))


def load_in_sampling_figure(passes: Passes, blocks: list[int]) -> Figure:
    """Tokens of each expert over the mean of its layer; a row for each layer."""
    load_LE = passes.assignments_PLNE.sum(axis=(0, 2), dtype=np.float64)
    relative_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)

    def draw(axes: Axes) -> None:
        shown = _relative_map(axes, relative_LE)
        axes.set_yticks(*_thinned(range(len(blocks)), [f"block {block}" for block in blocks]))
        axes.set_xticks(*_thinned(range(load_LE.shape[1]), [str(expert) for expert in range(load_LE.shape[1])]))
        axes.set(xlabel="expert")
        if relative_LE.size <= 64:
            for (layer, expert), value in np.ndenumerate(relative_LE):
                axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=9.5)
        _relative_bar(axes, shown, "load over the layer's mean")

    return one_panel(draw, size=(SIZE[0], max(2.6, 0.32 * len(blocks) + 1.4)))


def expert_times_figure(passes: Passes, blocks: list[int]) -> Figure:
    """Tokens of each expert by the progress from noise to image, over the expert's own mean."""
    columns = _spread(len(passes.progress_P), MOST_COLUMNS)
    values_LEP = passes.assignments_PLNE.sum(axis=2, dtype=np.float64).transpose(1, 2, 0)
    labels = [f"{progress:.1f}" for progress in passes.progress_P[columns]]
    return _expert_rows(_over_own_mean(values_LEP)[..., columns], blocks, labels, NOISE_TO_IMAGE)


def expert_classes_figure(passes: Passes, blocks: list[int], labels: Sequence[int], conditions: Conditions) -> Figure:
    """Tokens of each expert by class or caption, over the expert's own mean."""
    classes = sorted(set(labels))[:MOST_COLUMNS]
    values_LNE = passes.assignments_PLNE.sum(axis=0, dtype=np.float64)
    values_LEC = np.stack([values_LNE[:, np.array(labels) == label].mean(axis=1) for label in classes], axis=2)
    names = [_heading(conditions, label) for label in classes]
    return _expert_rows(_over_own_mean(values_LEC), blocks, names, conditions.kind)


def overlap_figure(overlap_PL: np.ndarray, progress_P: np.ndarray, blocks: list[int]) -> Figure:
    """How far the rules count and threshold agree over the progress from noise to image."""

    def draw(axes: Axes) -> None:
        _layer_lines(axes, progress_P, overlap_PL, blocks)
        axes.plot(progress_P, overlap_PL.mean(axis=1), color="#1c1f24", linewidth=2.6, label="all")
        axes.set(xlabel=NOISE_TO_IMAGE, ylabel="Jaccard index", ylim=(0, 1))
        axes.grid(alpha=0.25)
        axes.legend(ncols=2)

    return one_panel(draw)


def image_uri(image_HWC: np.ndarray) -> str:
    """An image, uint8, as the data URI of a PNG."""
    stream = io.BytesIO()
    plt.imsave(stream, image_HWC.squeeze(), cmap="gray", vmin=0, vmax=255)
    return _data_uri(stream.getvalue(), "png")


def _over_own_mean(values_LEX: np.ndarray) -> np.ndarray:
    return values_LEX / np.maximum(values_LEX.mean(axis=2, keepdims=True), 1e-9)


def _expert_rows(values_LEX: np.ndarray, blocks: list[int], labels: list[str], xlabel: str) -> Figure:
    """A map of ratios with a row for each expert of each layer; white lines part the layers."""
    layers, experts, width = values_LEX.shape

    def draw(axes: Axes) -> None:
        shown = _relative_map(axes, values_LEX.reshape(layers * experts, width))
        for layer in range(1, layers):
            axes.axhline(layer * experts - 0.5, color="white", linewidth=3)
        axes.set_yticks(
            [layer * experts + (experts - 1) / 2 for layer in range(layers)], [f"block {block}" for block in blocks]
        )
        axes.tick_params(axis="y", length=0)
        longest = max(map(len, labels))
        axes.set_xticks(*_thinned(range(width), labels, most=24 if longest > 4 else 30 // longest))
        if longest > 4:
            axes.tick_params(axis="x", rotation=90, labelsize=8)
        axes.set(xlabel=xlabel)
        _relative_bar(axes, shown, "over the mean")

    height = min(max(SIZE[1], 0.045 * layers * experts + 1.2, 0.36 * layers + 1.2), 12)
    return one_panel(draw, size=(SIZE[0], height))


def _relative_map(axes: Axes, values: np.ndarray) -> Any:
    logs = np.log2(np.maximum(values, 2**-10))
    far = min(max(float(np.abs(logs).max()), 0.2), 2.0)
    _plain(axes)
    norm = TwoSlopeNorm(0, -far, far)
    return axes.imshow(logs, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")


def _relative_bar(axes: Axes, shown: Any, label: str) -> None:
    ticks = np.linspace(-shown.norm.vmax, shown.norm.vmax, 5)
    bar = axes.figure.colorbar(shown, ax=axes, label=label)
    bar.set_ticks(list(ticks), labels=[f"{2**tick:.2f}" for tick in ticks])


def _layer_lines(axes: Axes, progress_P: np.ndarray, values_PL: np.ndarray, blocks: list[int]) -> None:
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(blocks)))
    for layer, block in enumerate(blocks):
        label = f"block {block}" if len(blocks) <= MOST_LINES else None
        axes.plot(progress_P, values_PL[:, layer], color=colours[layer], label=label)
    if len(blocks) > MOST_LINES:
        bar = plt.cm.ScalarMappable(plt.Normalize(blocks[0], blocks[-1]), plt.get_cmap("viridis"))
        axes.figure.colorbar(bar, ax=axes, label="block")


def _progress_ticks(axes: Axes, progress: np.ndarray) -> None:
    axes.set_xticks(*_thinned(range(len(progress)), [f"{value:.1f}" for value in progress]))


def _thinned(places: Sequence[int], labels: Sequence[str], most: int = 10) -> tuple[list[int], list[str]]:
    """At most so many ticks, the first among them."""
    stride = -(-len(places) // most)
    return list(places[::stride]), list(labels[::stride])


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers 0 to count - 1, evenly, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def _first_of_each(labels: Sequence[int]) -> list[int]:
    """The first image of every class, and then the rest."""
    first = {label: place for place, label in reversed(list(enumerate(labels)))}
    begin = sorted(first.values())
    return begin + [place for place in range(len(labels)) if place not in begin]


def _heading(conditions: Conditions, label: int) -> str:
    """A class by its name, shortened; captions are too long, and go by their numbers."""
    if not isinstance(conditions, ClassLabels):
        return str(label)
    return _plain_text(shorten(conditions.heading(label), 18, placeholder="..."))


def _plain_text(text: str) -> str:
    """Text for matplotlib, which would set what stands between two dollars as a formula."""
    return text.replace("$", r"\$")


def _wrapped(text: str) -> str:
    return "\n".join(wrap(text, 18, max_lines=4, placeholder=" ..."))


def _plain(axes: Axes) -> None:
    axes.spines[:].set_visible(False)


def _image_axes(axes: Axes) -> Axes:
    axes.set(xticks=[], yticks=[])
    _plain(axes)
    return axes


def one_panel(draw: Callable[[Axes], None], size: tuple[float, float] = SIZE) -> Figure:
    return _figure(lambda figure: draw(figure.subplots()), size)


def _figure(draw: Callable[[Figure], None], size: tuple[float, float]) -> Figure:
    with plt.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        return figure


def embedded(figure: Figure) -> str:
    """The figure as a data URI: SVG if it is lines and letters only, PNG if it has pixels."""
    form = "png" if any(axes.images for axes in figure.axes) else "svg"
    return _data_uri(_saved(figure, form), "svg+xml" if form == "svg" else form)


def as_pixels(figure: Figure) -> np.ndarray:
    """The figure as (H, W, C) uint8."""
    return np.asarray(Image.open(io.BytesIO(_saved(figure, "png", dpi=110))).convert("RGB"))


def _saved(figure: Figure, form: str, dpi: int = 170) -> bytes:
    stream = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(stream, format=form, dpi=dpi, metadata={"Date": None} if form == "svg" else {})
    return stream.getvalue()


def _data_uri(data: bytes, subtype: str) -> str:
    return f"data:image/{subtype};base64,{base64.b64encode(data).decode()}"
