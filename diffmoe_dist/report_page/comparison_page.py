"""One page about several runs, complete in itself, and its numbers as CSV files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch

from diffmoe_dist.files import write_atomically
from diffmoe_dist.report_page import figures
from diffmoe_dist.report_page.comparison import (
    CAPACITY,
    TRAINING_LOSS,
    VALIDATION_LOSS,
    Comparison,
    Result,
    Run,
    comparable,
    compare,
    curves_csv,
    differing_settings,
    made_otherwise,
    over_seeds,
    results,
    table_csv,
    varying_capacities,
    why_not_comparable,
)
from diffmoe_dist.report_page.comparison_charts import Line, line_chart, swatch
from diffmoe_dist.report_page.comparison_images import images_section
from diffmoe_dist.report_page.html import document, note, section
from diffmoe_dist.report_page.run_history import AXES, Curve, RunHistory
from diffmoe_dist.report_page.scored_samples import ScoredSamples, found_scores, higher_is_better
from diffmoe_dist.sampling.settings import SamplingSettings

PAGE, CURVES, RESULTS, SETTINGS = "comparison.html", "curves.csv", "results.csv", "settings.csv"
_PAIRED = ("step", "images_seen")  # at one place of these, runs of a seed have seen the same
_MOST_NAMES = 8  # in the legend of a chart
_APART = 4  # times the window of smoothing, for the other axes
Row = tuple[str, str, list[str]]  # what it is about, its name, its cells
_AXIS_NAMES = {"step": "steps", "images_seen": "images", "training_flops": "FLOPs", "device_hours": "device-hours"}
CSS = (
    """
.runs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:10px;margin:20px 0 8px}
.run{background:#fff;border:1px solid var(--line);border-radius:10px;padding:10px 14px;overflow-wrap:anywhere}
.run b{font-size:1.05rem}
.run span{display:block;color:var(--soft);font-size:.88rem}
.letter{font-weight:700;margin:0 4px 0 5px}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:8px 0 0;padding:0;list-style:none;font-size:.88rem}
.legend li{overflow-wrap:anywhere}
svg{vertical-align:-1px;flex:none}
.axes{position:sticky;top:0;z-index:2;display:flex;flex-wrap:wrap;align-items:center;gap:2px 14px;background:#f6f7f9;
padding:8px 0;border-bottom:1px solid var(--line);font-size:.95rem}
.axes label{display:inline-flex;align-items:center;gap:5px;padding:4px 0;cursor:pointer}
.axes input{accent-color:var(--accent);width:17px;height:17px;margin:0}
.on{display:none}
.on-step{display:block}
.table{overflow-x:auto;margin:0 -2px}
.table table{min-width:100%}
.table th{text-align:left;font-weight:600;padding:3px 18px 6px 0;vertical-align:bottom;white-space:nowrap}
.table td{white-space:nowrap;overflow-wrap:normal;font-variant-numeric:tabular-nums;border-top:1px solid var(--line)}
.table td:first-child,.table th:first-child{position:sticky;left:0;background:#fff;white-space:normal;min-width:96px;
max-width:230px;z-index:1;padding-right:14px;color:var(--ink)}
.table .about th{padding:12px 0 3px;position:static;max-width:none}
.table .about span{position:sticky;left:0}
.settings td{white-space:normal;overflow-wrap:anywhere;min-width:64px;max-width:260px}
.settings td:first-child{min-width:112px}
.best{font-weight:700;color:#00563f}
.same{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--wide)),1fr));gap:12px;margin:14px 0}
.same figure{padding:10px}
.same h3{font-size:.92rem;overflow-wrap:anywhere}
.row{display:flex;flex-wrap:wrap;gap:8px}
.row div{flex:0 1 var(--side);min-width:52px;text-align:center;font-size:.85rem;font-weight:700}
.row img{width:100%;border-radius:4px;image-rendering:var(--rendering)}
@media(max-width:560px){.axes{font-size:.88rem;gap:2px 10px}.axes span{display:none}.table{font-size:.92rem}
.table th,.table td{padding-right:8px}.table td{white-space:normal}.table td:first-child{max-width:112px}
.same figure{display:flex;gap:10px;align-items:center}
.same h3{flex:0 0 68px;margin:0}.row{flex:1}.table th svg{display:block}}
"""
    + "".join(f".curves:has(#by-{axis}:checked) .on{{display:none}}\n" for axis in AXES[1:])
    + "".join(f".curves:has(#by-{axis}:checked) .on-{axis}{{display:block}}\n" for axis in AXES)
)


def write_comparison(
    histories: Sequence[RunHistory],
    out: Path,
    asked: SamplingSettings | None,
    finished: Sequence[ScoredSamples],
    device: torch.device,
) -> Path:
    """Write the page and its CSV files into a folder that is there; returns the page's path.

    Args:
        asked: which images to sample of each run; None: none.
        finished: folders of samples, shown in their place, and scores.

    Raises:
        UserError: a checkpoint or samples are damaged, two of them are of one step and way, or a setting is not for a
            run's model.
    """
    comparison = compare(histories, found_scores(finished))
    runs, rows = comparison.runs, results(comparison)
    images, capacities = images_section(runs, asked, finished, device)
    rows += capacities
    settings = differing_settings(runs)
    body = [
        f'<p class="soft">{escape(_subtitle(runs))}</p>',
        f'<div class="runs">{"".join(map(_run_card, runs))}</div>',
        section("Results", "", [_result_table(runs, rows), *_seeds_table(comparison, rows)], "wide"),
        _curves_section(comparison),
        images,
        section("Settings that differ", _settings_text(runs), [_settings_table(runs, settings)], "wide"),
        _data_section(),
    ]
    write_atomically(out / CURVES, curves_csv(comparison))
    write_atomically(
        out / RESULTS, table_csv(comparison, "quantity", {f"{row.about}: {row.quantity}": row.values for row in rows})
    )
    write_atomically(out / SETTINGS, table_csv(comparison, "setting", dict(settings)))
    page = out / PAGE
    write_atomically(page, document(f"{len(runs)} runs compared", "".join(body), CSS))
    return page


def _subtitle(runs: Sequence[Run]) -> str:
    open_runs = [run.letter for run in runs if not run.history.is_done]
    return f"Not at their last step yet: {', '.join(open_runs)}." if open_runs else "All have reached their last step."


def _run_card(run: Run) -> str:
    experts, model = run.config.experts, run.config.model
    kind = "dense" if experts is None else f"{experts.router}, {experts.num_experts} experts"
    about = (
        f"{kind}; depth {model.depth}, width {model.hidden_size}; {run.config.objective.name}; seed {run.config.seed}"
    )
    return (
        f'<div class="run">{_key(run)}<b>{escape(run.name)}</b><span>{escape(about)}</span>'
        f"<span>{_breakable(str(run.history.folder))}</span></div>"
    )


def _key(run: Run) -> str:
    return f'{swatch(run.group)}<span class="letter" style="display:inline;color:var(--ink)">{run.letter}</span>'


def _legend(runs: Sequence[Run]) -> str:
    has_names = (
        len(runs) <= _MOST_NAMES
    )  # else they would take more room than the chart, and the top of the page has them
    items = "".join(f"<li>{_key(run)}{escape(run.name) if has_names else ''}</li>" for run in runs)
    return f'<ul class="legend">{items}</ul>'


def _result_table(runs: Sequence[Run], rows: Sequence[Result]) -> str:
    cells: list[Row] = []
    for row in rows:
        there = [value for value in row.values if value is not None]
        best = (min(there) if row.best == "min" else max(there)) if row.best and len(there) > 1 else None
        shown = [
            f'<span class="best">{escape(text)}&nbsp;*</span>' if best is not None and value == best else escape(text)
            for value, text in zip(row.values, row.shown, strict=True)
        ]
        cells.append((row.about, row.quantity, shown))
    text = (
        "* the best of a row where all runs compare, losses only with one seed. The training loss is smoothed. "
        "Training FLOPs: forward and backward of all images seen, at the capacity C that was measured. Device-hours: "
        "training steps alone, times ranks; a rank is a GPU, or a process on CPUs."
    )
    return _table("", _heads(runs), cells, text)


def _seeds_table(comparison: Comparison, rows: Sequence[Result]) -> list[str]:
    found = over_seeds(comparison, rows)
    if not found:
        return []
    heads = []
    for group in comparison.groups():
        letters = " ".join(run.letter for run in group)
        heads.append(f"{swatch(group[0].group)}<br>{letters}")
    cells: list[Row] = [(row.about, row.quantity, [escape(value) for value in values]) for row, values in found]
    text = "Runs whose settings differ in the seed alone: mean ± standard deviation (number of runs)."
    return [_table("Over seeds", heads, cells, text)]


def _settings_text(runs: Sequence[Run]) -> str:
    alike = [
        f"{first.letter} and {second.letter}"
        for place, first in enumerate(runs)
        for second in runs[place + 1 :]
        if first.group == second.group and first.config.seed == second.config.seed
    ]
    return f"Equal in every setting, the seed too: {', '.join(alike)}." if alike else ""


def _settings_table(runs: Sequence[Run], settings: dict[str, list[str]]) -> str:
    if not settings:
        return note("None", "Every run has the same settings and seed.")
    cells: list[Row] = [("", name, [_breakable(value) for value in values]) for name, values in settings.items()]
    caption = (
        "Named as in config.yaml; -: the router of this run does not have it. What only some routers have is left out "
        "where it is at its default."
    )
    return _table("", _heads(runs), cells, caption, "settings")


def _heads(runs: Sequence[Run]) -> list[str]:
    return [f'{swatch(run.group)}<span class="letter">{run.letter}</span>' for run in runs]


def _table(title: str, heads: Sequence[str], rows: Sequence[Row], caption: str, kind: str = "") -> str:
    """`heads` and the cells of rows are HTML."""
    head = "".join(f"<th>{text}</th>" for text in ("", *heads))
    body, before = "", ""
    for about, name, cells in rows:
        if about != before:
            body += f'<tr class="about"><th colspan="{len(heads) + 1}"><span>{escape(about)}</span></th></tr>'
            before = about
        body += f"<tr><td>{_breakable(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    above = f"<h3>{escape(title)}</h3>" if title else ""
    return (
        f'<figure style="margin:14px 0">{above}<div class="table {kind}" tabindex="0"><table><tr>{head}</tr>{body}'
        f"</table></div><figcaption>{escape(caption)}</figcaption></figure>"
    )


def _breakable(text: str) -> str:
    """HTML that a narrow column breaks at the dots and low lines of names."""
    return re.sub(r"([._/])(?=\w)", r"\1<wbr>", escape(text))


def _curves_section(comparison: Comparison) -> str:
    charts = [*_loss_charts(comparison), *_score_charts(comparison), *_capacity_charts(comparison)]
    choices = "".join(
        f'<label><input type="radio" name="axis" id="by-{axis}"{" checked" if axis == AXES[0] else ""}>{name}</label>'
        for axis, name in _AXIS_NAMES.items()
    )
    return (
        f'<section class="curves"><h2>Curves</h2><div class="axes"><span>against</span>{choices}</div>'
        f'<div class="figures">{"".join(charts)}</div></section>'
    )


def _loss_charts(comparison: Comparison) -> list[str]:
    found = []
    runs = comparison.runs
    of_kinds = comparable(runs, TRAINING_LOSS)
    if len(of_kinds) > 1:
        apart = " | ".join(" ".join(run.letter for run in kind) for kind in of_kinds)
        text = f"They stand in charts apart: {apart}. What differs: {why_not_comparable(runs) or 'their data'}. "
        text += "Scores and images compare."
        found.append(note("The losses of these runs do not compare", text))
    smooth = (
        f"loss_diffusion. Strong: mean of the last {comparison.window:,} steps; thin: each logged step. The first "
        "steps may lie above."
    )
    for kind in of_kinds:
        found.append(_chart(comparison, "Training loss", kind, TRAINING_LOSS, smooth, smoothed=True))
        found += _against_first(comparison, kind)
    for kind in comparable(runs, VALIDATION_LOSS):
        text = "loss_val: of the averaged weights on held-out images."
        if len({run.config.seed for run in kind}) > 1:
            text += " Each seed has its own noise and times."
        found.append(_chart(comparison, "Validation loss", kind, VALIDATION_LOSS, text))
    return [chart for chart in found if chart]


def _score_charts(comparison: Comparison) -> list[str]:
    found = []
    for name in comparison.measured():
        text = f"{'Higher' if higher_is_better(name) else 'Lower'} is better."
        if other := made_otherwise(comparison.runs, name):
            text = f"These do not compare: they were made with other settings. {other}."
        found.append(_chart(comparison, name, comparison.runs, name, text))
    return [chart for chart in found if chart]


def _capacity_charts(comparison: Comparison) -> list[str]:
    varying = varying_capacities(comparison.runs)
    charts = [
        _chart(comparison, title, comparison.runs, name, f"{name}: experts per token.", smoothed=True)
        for name, title in varying.items()
    ]
    if CAPACITY in varying:
        return charts
    constant = {run.letter: run.history.curve(CAPACITY).at(np.inf) for run in comparison.runs}
    told = ", ".join(f"{letter} {'dense' if value is None else f'{value:.3g}'}" for letter, value in constant.items())
    return [*charts, note("C in training", f"Constant, experts per token: {told}.")]


def _chart(
    comparison: Comparison, title: str, runs: Sequence[Run], name: str, caption: str, *, smoothed: bool = False
) -> str:
    """A quantity of several runs; nothing where none has it."""
    curves = [(run, comparison.curve(run, name)) for run in runs]
    shown = [(run, curve) for run, curve in curves if len(curve)]
    by_axis = {}
    for axis in AXES:
        lines = []
        for run, curve in shown:
            places_N = run.history.place(curve.steps_N, axis)
            if places_N is not None:
                strong = curve.smoothed(comparison.window) if smoothed else curve
                raw_N = curve.values_N if smoothed else None
                lines.append(Line(run.letter, run.group, places_N, strong.values_N, raw_N))
        by_axis[axis] = lines
    without = [run.letter for run, curve in curves if not len(curve)]
    caption += f" Not measured: {', '.join(without)}." if without else ""
    return _figure(title, [run for run, _ in shown], by_axis, "", caption, every_point=not smoothed)


def _against_first(comparison: Comparison, runs: Sequence[Run]) -> list[str]:
    """Smoothed losses over that of the first run, at the same place of each axis."""
    by_axis, letters = {}, set()
    for axis in AXES:
        lines = []
        for run in runs:
            base = _reference(run, runs)
            is_paired = axis in _PAIRED and base.config.seed == run.config.seed
            window = comparison.window * (1 if is_paired else _APART)
            own, other = (comparison.curve(each, TRAINING_LOSS).smoothed(window) for each in (run, base))
            if base is not run and (line := _relative(run, own, base, other, axis)):
                lines.append(line)
                letters.add(run.letter)
        by_axis[axis] = lines
    shown = [run for run in runs if run.letter in letters]
    first = " or ".join(dict.fromkeys(_reference(run, runs).letter for run in shown))
    caption = (
        f"Smoothed loss over that of {first}, at the same place on the axis; below 0 is better. Where seed and data "
        "are one, both have seen the same images, noise and times by a step, so little of the difference is chance; "
        f"of two seeds, and against FLOPs and device-hours, means are over {_APART * comparison.window:,} steps."
    )
    chart = _figure(f"Training loss against {first}", shown, by_axis, "percent", caption, zero=True)
    return [chart] if chart else []


def _reference(run: Run, runs: Sequence[Run]) -> Run:
    """The run of the first one's group that has this run's seed, else the first."""
    return next((r for r in runs if r.group == runs[0].group and r.config.seed == run.config.seed), runs[0])


def _relative(run: Run, own: Curve, base: Run, other: Curve, axis: str) -> Line | None:
    x_N, base_x_N = run.history.place(own.steps_N, axis), base.history.place(other.steps_N, axis)
    if x_N is None or base_x_N is None or not len(own) or not len(other):
        return None
    inside = (x_N >= base_x_N[0]) & (x_N <= base_x_N[-1])
    if not inside.any():
        return None
    ratio_N = own.values_N[inside] / np.interp(x_N[inside], base_x_N, other.values_N)
    return Line(run.letter, run.group, x_N[inside], 100 * (ratio_N - 1))


def _figure(
    title: str, runs: Sequence[Run], by_axis: dict[str, list[Line]], ylabel: str, caption: str,
    *, zero: bool = False, every_point: bool = False,
) -> str:  # fmt: skip
    """The chart against every axis, of which the page shows one."""
    if not by_axis[AXES[0]]:
        return ""
    parts = []
    for axis, lines in by_axis.items():
        content = "<p>Not known for these runs: no line of metrics.jsonl says the ranks.</p>"
        if lines:
            uri = figures.embedded(line_chart(lines, axis, ylabel, zero=zero, every_point=every_point))
            content = f'<img src="{uri}" alt="{escape(title)} against {_AXIS_NAMES[axis]}">'
        parts.append(f'<div class="on on-{axis}">{content}</div>')
    below = f"{_legend(runs)}<figcaption>{escape(caption)}</figcaption>"
    return f"<figure><h3>{escape(title)}</h3>{''.join(parts)}{below}</figure>"


def _data_section() -> str:
    files = {
        CURVES: "every loss, score and capacity at every step, with images, FLOPs and device-hours",
        RESULTS: "the table of results",
        SETTINGS: "the settings that differ",
    }
    links = "".join(f'<li><a href="{name}">{name}</a>: {about}</li>' for name, about in files.items())
    return f"<section><h2>Data</h2><p>Beside this page, in full precision:</p><ul>{links}</ul></section>"
