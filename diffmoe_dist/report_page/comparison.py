"""Several runs beside each other: what they are called, what of them compares, and what came out, as tables.

Runs whose settings differ in nothing but the seed are a group: they have one letter, and numbers.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from diffmoe_dist.config import Config, data_sets, flat_settings
from diffmoe_dist.model.accounting import account
from diffmoe_dist.report_page.run_history import AXES, Curve, RunHistory, value_over_time
from diffmoe_dist.report_page.scored_samples import FoundScore, higher_is_better, is_score

TRAINING_LOSS, VALIDATION_LOSS, CAPACITY = "loss_diffusion", "loss_val", "capacity"
COST, EXPERTS = "Size and cost", "Experts"
SMOOTHED_OVER = 20  # the mean is over this part of the longest run's steps
_OF_EXPERTS = {
    CAPACITY: "C in training", "predictor_capacity": "C of the predictor",
    **{f"capacity_at_noise_{noise}": f"C at noise {noise}" for noise in (0.1, 0.3, 0.5, 0.7, 0.9)},
    "predictor_agreement": "predictor's agreement", "dead_experts": "dead experts", "gate_entropy": "entropy of gates",
}  # fmt: skip
_CAPACITIES = (CAPACITY, "predictor_capacity")
_OF_SCORES = (
    "fid.features", "fid.reference", "sample.steps", "sample.cfg_scale", "sample.time_shift", "sample.decoder",
)  # fmt: skip
_NOT_THERE, _CHANGE = "-", " until step "
_NAMES_A_RUN = ("run_dir", "seed")
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Run:
    history: RunHistory
    name: str  # the end of its path, as much as tells it from the others
    letter: str  # A, or A1 and A2 of one group
    group: int

    @property
    def config(self) -> Config:
        return self.history.config


@dataclass(frozen=True)
class Comparison:
    runs: list[Run]
    scores: list[FoundScore]  # of finished samples

    @property
    def window(self) -> int:
        """The steps that a smoothed loss is the mean of."""
        return max(1, round(max(run.history.last_step for run in self.runs) / SMOOTHED_OVER))

    def groups(self) -> list[list[Run]]:
        return together(self.runs, lambda run: run.group)

    def measured(self) -> list[str]:
        """The scores that any run or finished sample has, by the names they have in their files."""
        names = [name for run in self.runs for name in run.history.names() if is_score(name)]
        return list(dict.fromkeys([*names, *(score.name for score in self.scores)]))

    def curve(self, run: Run, name: str) -> Curve:
        """Of metrics.jsonl; a score of finished samples: of these."""
        of_name = [score for score in self.scores if (score.folder, score.name) == (run.history.folder, name)]
        found = sorted({score.step: score.value for score in of_name}.items())
        if not found:
            return run.history.curve(name)
        return Curve(np.array([step for step, _ in found], float), np.array([value for _, value in found], float))

    def smooth(self, run: Run, name: str) -> Curve:
        return self.curve(run, name).smoothed(self.window)


def compare(histories: Sequence[RunHistory], scores: list[FoundScore]) -> Comparison:
    """Name the runs. `scores`: those of finished samples."""
    groups = together(histories, lambda history: json.dumps(_settings_of_group(history), default=str))
    numbers = {history.folder: group for group, members in enumerate(groups) for history in members}
    names = distinct_names([history.folder for history in histories])
    runs = []
    for history, name in zip(histories, names, strict=True):
        members = groups[numbers[history.folder]]
        place = [member.folder for member in members].index(history.folder)
        letter = column_letter(numbers[history.folder]) + (str(place + 1) if len(members) > 1 else "")
        runs.append(Run(history, name, letter, numbers[history.folder]))
    return Comparison(runs, scores)


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Of each path as much of its end as no other one has."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        length = 1
        while sum(other[-length:] == own[-length:] for other in parts) > 1 and length < len(own):
            length += 1
        names.append("/".join(own[-length:]))
    return names


def column_letter(number: int) -> str:
    """A to Z, then AA, as of a spreadsheet."""
    return (column_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def together(things: Iterable[Thing], key: Callable[[Thing], Any]) -> list[list[Thing]]:
    """Those with equal keys, in the order of the first of each."""
    found: dict[Any, list[Thing]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return list(found.values())


def comparable(runs: Sequence[Run], name: str) -> list[list[Run]]:
    """Runs whose losses of this name are of one kind: of the same objective, on the same data."""
    has_prints = all(run.history.data_fingerprint for run in runs)

    def kind(run: Run) -> str:
        config = run.config
        data = run.history.data_fingerprint if has_prints else data_sets(config.data)
        of_data = [config.validation.shards, config.validation.images] if name.startswith(VALIDATION_LOSS) else []
        sizes = [config.model.input_size, config.model.in_channels, config.model.learn_sigma]
        return repr([config.objective, config.train.label_dropout, sizes, data, of_data])

    return together(runs, kind)


def why_not_comparable(runs: Sequence[Run]) -> str:
    """The settings in which their losses are of other kinds, as `objective.name flow, ddpm`."""
    about = (
        "objective.", "train.label_dropout", "model.input_size", "model.in_channels", "model.learn_sigma",
        "data.shards", "data.latents", "data.mixture", "validation.shards", "validation.images",
    )  # fmt: skip
    return "; ".join(
        f"{name} {', '.join(dict.fromkeys(values))}"
        for name, values in differing_settings(runs).items()
        if name.startswith(about)
    )


def made_otherwise(runs: Sequence[Run], name: str) -> str:
    """The settings in which runs differ that measured a score of this name in training, and which decide what it is."""
    having = [run for run in runs if len(run.history.curve(name))]
    rows = {of: values for of, values in differing_settings(having).items() if of in _OF_SCORES}
    return "; ".join(f"{of} {', '.join(dict.fromkeys(values))}" for of, values in rows.items())


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """By its name in config.yaml, the value of each setting that is not the same in all runs, for each run."""
    names = dict.fromkeys(name for run in runs for name in flat_settings(run.config))
    rows = {name: [_setting(run, name) for run in runs] for name in names if name != "run_dir"}
    return {
        name: values
        for name, values in rows.items()
        if (len(set(values)) > 1 or _CHANGE in values[0]) and not _only_defaults(runs, name, set(values) - {_NOT_THERE})
    }


def _only_defaults(runs: Sequence[Run], name: str, values: set[str]) -> bool:
    """Whether a setting of some routers is in all runs that have it what it is where nobody sets it."""
    section, _, field = name.partition(".")
    routers = [run.config.moe for run in runs if hasattr(run.config.moe, field)]
    is_of_some = section == "moe" and len(routers) < len(runs)
    return is_of_some and values == {as_written(getattr(type(moe)(), field)) for moe in routers}


def _setting(run: Run, name: str) -> str:
    if name not in flat_settings(run.config):
        return _NOT_THERE
    over_time = value_over_time(run.history, name)
    parts = [as_written(value) + (f"{_CHANGE}{step:,}, then " if step else "") for step, value in over_time]
    return "".join(parts)


def as_written(value: Any) -> str:
    """A setting as in config.yaml."""
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, default=lambda item: vars(item) if is_dataclass(item) else str(item))


def _settings_of_group(history: RunHistory) -> list[dict[str, Any]]:
    settings = [flat_settings(config) for config in (*history.earlier.values(), history.config)]
    return [{name: value for name, value in flat.items() if name not in _NAMES_A_RUN} for flat in settings]


@dataclass(frozen=True)
class Result:
    """A row of results: a value for each run, and how it is told. None: there is none."""

    about: str  # what the row and its neighbours are about
    quantity: str
    values: list[float | None]
    shown: list[str]
    best: str = ""  # min or max, where one is better than another


def results(comparison: Comparison) -> list[Result]:
    runs = comparison.runs
    found = [*_costs(runs), *_losses(comparison)]
    for name in comparison.measured():
        better = "max" if higher_is_better(name) else "min"
        found += _over_training(comparison, name, better, ranked=not made_otherwise(runs, name))
    for name, title in _OF_EXPERTS.items():
        values = [comparison.smooth(run, name).at(math.inf) for run in runs]
        if any(value is not None for value in values):
            found.append(_plain(EXPERTS, title, values))
    return found


def varying_capacities(runs: Sequence[Run]) -> dict[str, str]:
    """What says how many experts a token has, and its title; of that what varies in any run."""
    of_runs = {name: [run.history.curve(name).values_N for run in runs] for name in _CAPACITIES}
    varying = [name for name, values in of_runs.items() if any(len(v) and np.ptp(v) > 1e-6 for v in values)]
    return {name: _OF_EXPERTS[name] for name in varying}


def _costs(runs: Sequence[Run]) -> list[Result]:
    histories = [run.history for run in runs]
    capacities = [history.curve(CAPACITY).at(math.inf) for history in histories]
    counts = [account(run.config) for run in runs]
    ranks = [None if history.ranks_N is None else float(history.ranks_N[-1]) for history in histories]
    rates = [float(np.median(history.curve("images_per_second").values_N)) for history in histories]
    steps = [float(history.last_step) for history in histories]
    ends = [f"{h.last_step:,}" + ("" if h.is_done else f" of {h.config.train.steps:,}") for h in histories]
    seen = [history.curve("images_seen").at(math.inf) for history in histories]
    return [
        _plain(COST, "parameters", [float(count.total) for count in counts]),
        _plain(COST, "activated, at C of training", [c.activated(C) for c, C in zip(counts, capacities, strict=True)]),
        Result(COST, "steps", list(steps), ends),
        _plain(COST, "images seen", seen),
        _plain(COST, "training FLOPs", [_end(history, "training_flops") for history in histories]),
        _plain(COST, "device-hours", [_end(history, "device_hours") for history in histories]),
        Result(COST, "ranks", ranks, [_ranks(history) for history in histories]),
        _plain(COST, "images per second, median", rates),
    ]


def _plain(about: str, quantity: str, values: Sequence[float | None], best: str = "") -> Result:
    return Result(about, quantity, list(values), [digits(value) for value in values], best)


def _ranks(history: RunHistory) -> str:
    if history.ranks_N is None:
        return "not recorded"
    over_time = [f"{ranks:.0f}" for ranks in history.ranks_N]
    changes = [ranks for place, ranks in enumerate(over_time) if place == 0 or ranks != over_time[place - 1]]
    return ", then ".join(changes) + (" (by its log files)" if history.ranks_are_guessed else "")


def _losses(comparison: Comparison) -> list[Result]:
    runs = comparison.runs
    last = [comparison.smooth(run, TRAINING_LOSS).at(math.inf) for run in runs]
    found = [_plain("Training loss", "at the end", last)]
    common = min(run.history.last_step for run in runs)
    at_common = [comparison.smooth(run, TRAINING_LOSS).at(common) for run in runs]
    found.append(
        _plain("Training loss", f"at step {common:,}", at_common, "min" if _ranked(runs, TRAINING_LOSS) else "")
    )
    alike = _ranked(runs, VALIDATION_LOSS)
    return found + _over_training(comparison, VALIDATION_LOSS, "min", "Validation loss", ranked=alike)


def _ranked(runs: Sequence[Run], name: str) -> bool:
    """Whether one loss is better than another: another seed is also other noise, in validation too."""
    return len(comparable(runs, name)) == 1 and len({run.config.seed for run in runs}) == 1


def _over_training(
    comparison: Comparison, name: str, better: str, title: str | None = None, ranked: bool = True
) -> list[Result]:
    """Its best and last value in each run, and where all have measured it. Nothing if no run has it."""
    curves, title = [comparison.curve(run, name) for run in comparison.runs], title or name
    if not any(len(curve) for curve in curves):
        return []
    rows = _best_and_last(title, curves, better) if max(map(len, curves)) > 1 else []
    common = set.intersection(*(set(curve.steps_N.tolist()) for curve in curves))
    if common:
        step = max(common)
        rows.append(
            _plain(title, f"at step {step:,.0f}", [curve.at(step) for curve in curves], better if ranked else "")
        )
    elif not rows:
        rows.append(Result(title, "(step)", [c.at(math.inf) for c in curves], [_value_and_step(c, -1) for c in curves]))
    return rows


def _best_and_last(title: str, curves: Sequence[Curve], better: str) -> list[Result]:
    pick = np.argmax if better == "max" else np.argmin
    places = [int(pick(curve.values_N)) if len(curve) else 0 for curve in curves]
    best = [float(c.values_N[p]) if len(c) else None for c, p in zip(curves, places, strict=True)]
    shown = [_value_and_step(curve, place) for curve, place in zip(curves, places, strict=True)]
    return [Result(title, "best (step)", best, shown), _plain(title, "last", [curve.at(math.inf) for curve in curves])]


def _value_and_step(curve: Curve, place: int) -> str:
    return f"{digits(curve.values_N[place])} ({curve.steps_N[place]:,.0f})" if len(curve) else "-"


def over_seeds(comparison: Comparison, rows: Sequence[Result]) -> list[tuple[Result, list[str]]]:
    """What compares, for each group its mean and standard deviation; nothing where no group has several runs."""
    groups = comparison.groups()
    if max(map(len, groups)) == 1:
        return []
    places = [[comparison.runs.index(run) for run in group] for group in groups]
    return [
        (row, [_mean([row.values[place] for place in of_group]) for of_group in places])
        for row in rows
        if row.quantity.startswith("at step ")
    ]


def _mean(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    if len(there) < 2:
        return digits(there[0]) if there else "-"
    return f"{digits(float(np.mean(there)))} ± {float(np.std(there, ddof=1)):.2g} ({len(there)})"


def _end(history: RunHistory, axis: str) -> float | None:
    places_N = history.axes[axis]
    return None if places_N is None else float(places_N[-1])


def digits(value: float | None) -> str:
    """Four significant digits, with a unit from ten thousand on."""
    if value is None or not math.isfinite(value):
        return "-"
    for unit, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size and abs(value) >= 1e4:
            return f"{value / size:.4g}\N{NO-BREAK SPACE}{unit}"
    return f"{value:.4g}"


def curves_csv(comparison: Comparison) -> str:
    """Every loss, score and capacity of every run, a row for each value."""
    rows: list[list[Any]] = [["run", "name", "quantity", *AXES, "value", "smoothed"]]
    for run in comparison.runs:
        logged = [n for n in run.history.names() if n.startswith("loss") or CAPACITY in n or is_score(n)]
        scored = [score.name for score in comparison.scores if score.folder == run.history.folder]
        for name in dict.fromkeys([*logged, *scored]):
            curve = comparison.curve(run, name)
            if not len(curve):
                continue
            places = [run.history.place(curve.steps_N, axis) for axis in AXES]
            columns = [["" for _ in curve.steps_N] if p is None else p.tolist() for p in places[1:]]
            values = zip(curve.values_N.tolist(), curve.smoothed(comparison.window).values_N.tolist(), strict=True)
            rows += [
                [run.letter, run.name, name, int(step), *of_axes, *of_value]
                for step, *of_axes, of_value in zip(curve.steps_N, *columns, values, strict=True)
            ]
    return _csv(rows)


def table_csv(comparison: Comparison, heading: str, rows: dict[str, Sequence[Any]]) -> str:
    """A row for each quantity or setting, a column for each run."""
    head = [[heading, *(run.name for run in comparison.runs)]]
    return _csv([*head, *([name, *("" if v is None else v for v in values)] for name, values in rows.items())])


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()
