"""The tables and plots of docs/study.md, from the committed results alone; what is missing is named.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->` of the page, whose other text stays.

Differences are paired by seed. Two intervals are given: by Student's t of the pair's own differences, and by the spread
that all systems have in common (`statistics.common_spread`).
"""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from studies.routing.results import LEVELS, by_learning_rate, read_result, read_results
from studies.routing.statistics import Estimate, Spread, Values, common_spread, mean_of, paired_difference
from studies.routing.systems import (
    EXPERT_NUMBERS,
    FALLING,
    LARGER_RATES,
    LARGER_SYSTEMS,
    LOW_RATE_FACTOR,
    MAIN_SYSTEMS,
    MORE_SEEDS,
    POOLS,
    SEEDS,
    SENSITIVE_SYSTEMS,
    SYSTEMS,
    VARIANTS,
    Run,
    Variant,
    chosen_learning_rate,
    learning_rate_runs,
    planned_runs,
)

PAGE_WIDTH = 100
REFERENCE = "dense"
DEAD = 0.1  # an expert with less than this part of an equal share of the tokens counts as dead


@dataclass(frozen=True)
class Measure:
    """A number of a run under an inference rule."""

    title: str
    path: tuple[str, str]
    digits: int

    def of(self, result: dict[str, Any], rule: str) -> float:
        return float(result["measures"][rule][self.path[0]][self.path[1]])


LOSS = Measure("loss on held-out images", ("held_out", "loss"), 5)
FRECHET = Measure("Fréchet distance", ("samples", "frechet"), 4)
ACCURACY = Measure("accuracy of samples", ("samples", "accuracy"), 4)


class Results:
    """The results that there are."""

    def __init__(self, folder: Path) -> None:
        self.runs = read_results(folder)
        self.classifier = read_result(folder / "classifier.json")
        self.timing = read_result(folder / "timing.json")
        self.larger = read_results(folder / "larger")
        self.lr = chosen_learning_rate(by_learning_rate(self.runs, "dense"))

    @property
    def low_rate(self) -> float | None:
        return None if self.lr is None else self.lr * LOW_RATE_FACTOR

    def of(self, system: str) -> dict[int, dict[str, Any]]:
        """The runs of a system at the chosen learning rate, by seed."""
        return {
            result["seed"]: result
            for result in self.runs.values()
            if result["system"] == system and result["lr"] == self.lr
        }

    def at(self, lr: float | None) -> Results:
        """With another learning rate as the one that is chosen."""
        other = copy.copy(self)
        other.lr = lr
        return other

    def values(self, variant: Variant, measure: Measure) -> dict[int, float]:
        """By seed."""
        return {seed: measure.of(result, variant.rule) for seed, result in self.of(variant.system).items()}

    def spread(self, measure: Measure) -> Spread | None:
        """What all main variants have in common, each system once."""
        systems = {VARIANTS[name].system: self.values(VARIANTS[name], measure) for name in VARIANTS}
        return common_spread([values for values in systems.values() if len(values) > 1])

    def missing(self) -> dict[str, list[Run]]:
        """The planned runs without a result, by what they are for."""
        if self.lr is None:
            runs = [run for run in learning_rate_runs() if run.name not in self.runs]
            return {"the learning rate, on which all the others wait": runs}
        missing: dict[str, list[Run]] = {}
        for run in planned_runs(self.lr):
            if run.name not in self.runs:
                missing.setdefault(self._purpose(run), []).append(run)
        return missing

    def _purpose(self, run: Run) -> str:
        if run.lr != self.lr:
            is_sensitivity = run.lr != self.low_rate or (run.seed == SEEDS[0] and run.system in SENSITIVE_SYSTEMS)
            return "the sensitivity to the learning rate" if is_sensitivity else "the comparison at a low rate"
        if run.system not in MAIN_SYSTEMS:
            return "the ablations"
        return "more seeds of the main comparison" if run.seed in MORE_SEEDS else "the main comparison"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, or a line that says that there is nothing yet."""
    if not rows:
        return ["Not run yet."]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def told(estimate: Estimate | None, digits: int, signed: bool = True) -> str:
    """`+0.0012 ± 0.0009`; in bold where the interval leaves out 0."""
    if estimate is None:
        return "-"
    mean = f"{estimate.mean:{'+' if signed else ''}.{digits}f}"
    if estimate.half_width is None:
        return f"{mean} (n = 1)"
    text = f"{mean} ± {estimate.half_width:.{digits}f}"
    return f"**{text}**" if signed and estimate.is_clear else text


def difference(
    results: Results, variant: Variant, reference: Variant, measure: Measure
) -> tuple[Estimate | None, Estimate | None]:
    """To the reference: by the pair's own differences, and by the common spread."""
    own = paired_difference(results.values(variant, measure), results.values(reference, measure))
    spread = results.spread(measure)
    if own is None or spread is None or variant.system == reference.system:
        return own, None
    return own, Estimate(own.mean, spread.half_width(own.n), own.n)


def main_table(results: Results) -> list[str]:
    rows = []
    for name, variant in VARIANTS.items():
        runs = results.of(variant.system)
        if not runs:
            continue
        measured = [run["measures"][variant.rule]["held_out"] for run in runs.values()]
        capacities = [one["capacity"] for one in measured if one["capacity"] is not None]
        losses = results.values(variant, LOSS)
        own, pooled = difference(results, variant, VARIANTS[REFERENCE], LOSS)
        is_reference = name == REFERENCE
        rows.append([
            variant.title, str(len(runs)),
            f"{measured[0]['parameters'] / 1e6:.3f}",
            f"{fmean(one['activated_parameters'] for one in measured) / 1e6:.3f}",
            f"{fmean(capacities):.3f}" if capacities else "-",
            _mean_and_deviation(losses, LOSS.digits),
            "" if is_reference else told(own, LOSS.digits), "" if is_reference else told(pooled, LOSS.digits),
        ])  # fmt: skip
    head = ["system", "seeds", "parameters (M)", "activated at this C", "C", "loss, mean (deviation)"]
    return table([*head, "minus dense, own 95 %", "common 95 %"], rows)


def samples_table(results: Results) -> list[str]:
    rows = []
    for name, variant in VARIANTS.items():
        distances, right = results.values(variant, FRECHET), results.values(variant, ACCURACY)
        if not distances:
            continue
        own, pooled = difference(results, variant, VARIANTS[REFERENCE], FRECHET)
        is_reference = name == REFERENCE
        rows.append([
            variant.title, _mean_and_deviation(distances, FRECHET.digits),
            "" if is_reference else told(own, FRECHET.digits), "" if is_reference else told(pooled, FRECHET.digits),
            f"{100 * fmean(right.values()):.1f} %",
        ])  # fmt: skip
    head = ["system", "Fréchet distance, mean (deviation)", "minus dense, own 95 %", "common 95 %", "right class"]
    return table(head, rows)


def _mean_and_deviation(values: Values, digits: int) -> str:
    numbers = list(values.values())
    deviation = f" ({stdev(numbers):.{digits}f})" if len(numbers) > 1 else ""
    return f"{fmean(numbers):.{digits}f}{deviation}"


def levels_table(results: Results) -> list[str]:
    """The loss against dense at each noise level, in percent; in bold where the interval over seeds leaves out 0."""
    dense = {seed: losses_by_level(run, REFERENCE) for seed, run in results.of(REFERENCE).items()}
    rows = []
    for name, variant in VARIANTS.items():
        of_seeds = [
            [100 * (one / other - 1) for one, other in zip(losses_by_level(run, name), dense[seed], strict=True)]
            for seed, run in results.of(variant.system).items()
            if seed in dense
        ]
        if of_seeds and name != REFERENCE:
            estimates = [mean_of(column) for column in zip(*of_seeds, strict=True)]
            cells = [f"{one.mean:+.2f}" for one in estimates]
            cells = [f"**{cell}**" if one.is_clear else cell for cell, one in zip(cells, estimates, strict=True)]
            rows.append([variant.title, *cells])
    return table(["loss against dense, %", *map(str, range(1, LEVELS + 1))], rows)


def losses_by_level(run: dict[str, Any], name: str) -> list[float]:
    return run["measures"][VARIANTS[name].rule]["held_out"]["by_level"]


def classes_table(results: Results) -> list[str]:
    rows = []
    for variant in VARIANTS.values():
        runs = results.of(variant.system)
        if runs:
            by_class = [run["measures"][variant.rule]["samples"]["accuracy_by_class"] for run in runs.values()]
            rows.append([variant.title, *(f"{100 * fmean(column):.0f}" for column in zip(*by_class, strict=True))])
    return table(["right class, %", *CLASS_NAMES], rows)


CLASS_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def learning_rate_table(results: Results) -> list[str]:
    rates = sorted({run["lr"] for run in results.runs.values()})
    rows = []
    for system in ("dense", *SENSITIVE_SYSTEMS):
        losses = by_learning_rate(results.runs, system)
        if losses:
            rows.append([SYSTEMS[system].title, *(f"{losses[lr]:.5f}" if lr in losses else "-" for lr in rates)])
    return table(["loss, seed 0", *(f"{lr:g}" for lr in rates)], rows)


def larger_table(results: Results) -> list[str]:
    """Dense and DiffMoE at every rate of the larger model; of a run that ended early, where."""
    rows = []
    for lr in LARGER_RATES:
        names = [Run(system, SEEDS[0], lr).name for system in LARGER_SYSTEMS]
        runs = [results.larger[name] for name in names if name in results.larger]
        if len(runs) == len(names):
            losses = [final_loss(run) if is_finished(run) else f"ended at step {run['steps']}" for run in runs]
            distances = [run["samples"]["frechet"] if is_finished(run) else "-" for run in runs]
            rows.append([f"{lr:g}", *_compared(losses), *_compared(distances)])
    head = ["learning rate", "loss of dense", "of DiffMoE", "difference"]
    return table([*head, "Fréchet distance of dense", "of DiffMoE", "difference"], rows)


def _compared(values: Sequence[float | str]) -> list[str]:
    """Two values, or why there is none, and the second over the first."""
    one, other = values
    texts = [value if isinstance(value, str) else f"{value:.4f}" for value in values]
    return [*texts, "-" if isinstance(one, str) or isinstance(other, str) else f"{100 * (other / one - 1):+.1f} %"]


def is_finished(run: dict[str, Any]) -> bool:
    """A larger run, of which there are samples then."""
    return run["samples"] is not None


def final_loss(run: dict[str, Any]) -> float:
    """Of a larger run: that of the last validation."""
    return float(list(run["curve"]["validation"].values())[-1])


def load_table(results: Results) -> list[str]:
    """What part of an equal share the experts of a layer get on held-out images."""
    rows = []
    for variant in VARIANTS.values():
        layers = [layer for run in results.of(variant.system).values() for layer in relative_load(run, variant.rule)]
        if not layers:
            continue
        dead = fmean(sum(share < DEAD for share in layer) for layer in layers)
        rows.append([
            variant.title, f"{fmean(map(max, layers)):.2f}", f"{fmean(map(min, layers)):.2f}",
            f"{dead:.2f} of {len(layers[0])}",
        ])  # fmt: skip
    return table(["tokens over an equal share", "largest", "smallest", "dead experts of a layer"], rows)


def relative_load(run: dict[str, Any], rule: str) -> list[list[float]]:
    """Of each layer, the tokens of each routed expert over their mean; ProMoE's unconditional one has none here."""
    load = run["measures"][rule]["held_out"]["load"]
    experts = _num_experts(run["settings"])
    return [[count / (sum(layer[:experts]) / experts) for count in layer[:experts]] for layer in load]


def _num_experts(settings: Sequence[str]) -> int:
    return int(next((item.split("=")[1] for item in settings if item.startswith("moe.num_experts=")), "0"))


def pairs_table(results: Results) -> list[str]:
    """Every two main variants with their difference over seeds and, in one seed, over images."""
    rows = []
    names = [name for name, variant in VARIANTS.items() if results.of(variant.system)]
    for row, name in enumerate(names):
        for other in names[row + 1 :]:
            first, second = VARIANTS[name], VARIANTS[other]
            own, pooled = difference(results, first, second, LOSS)
            if own is None or first.system == second.system:
                continue
            images = by_images(results, first, second)
            rows.append([first.title, second.title, told(own, 5), told(pooled, 5), told(images, 5)])
    head = ["system", "minus", "over seeds, own 95 %", "common 95 %", "over images, seed 0"]
    return table(head, rows)


def by_images(results: Results, first: Variant, second: Variant, seed: int = SEEDS[0]) -> Estimate | None:
    """The difference of two runs of one seed over blocks of held-out images: what other test images might change."""
    runs = [results.of(variant.system).get(seed) for variant in (first, second)]
    if runs[0] is None or runs[1] is None:
        return None
    blocks = [
        run["measures"][variant.rule]["held_out"]["by_block"]
        for run, variant in zip((runs[0], runs[1]), (first, second), strict=True)
    ]
    return mean_of([one - other for one, other in zip(*blocks, strict=True)])


def ablation_rows(results: Results, systems: Mapping[Any, str], reference: str) -> list[list[str]]:
    base = Variant("", reference, without_predictor(reference))
    rows = []
    for label, system in systems.items():
        variant = Variant("", system, without_predictor(system))
        losses = results.values(variant, LOSS)
        if losses:
            row = [str(label), str(len(losses))]
            for measure in (LOSS, FRECHET):
                against = [told(one, measure.digits) for one in difference(results, variant, base, measure)]
                row.append(_mean_and_deviation(results.values(variant, measure), measure.digits))
                row += ["", ""] if system == reference else against
            rows.append(row)
    return rows


def without_predictor(system: str) -> str:
    """The rule under which a system needs no threshold: what ablations of training are compared under."""
    rules = SYSTEMS[system].rules
    return "static" if "static" in rules else rules[0]


def _ablation(first: str, systems: Mapping[Any, str], reference: str) -> Callable[[Results], list[str]]:
    intervals = ["difference, own 95 %", "common 95 %"]
    head = [first, "seeds", "loss", *intervals, "Fréchet distance", *intervals]
    return lambda results: table(head, ablation_rows(results, systems, reference))


def low_rate_table(results: Results) -> list[str]:
    """All systems at the low rate, without thresholds."""
    systems = {SYSTEMS[system].title: system for system in MAIN_SYSTEMS}
    return _ablation("system", systems, REFERENCE)(results.at(results.low_rate))


def rules_table(results: Results) -> list[str]:
    """The same weights under every inference rule: at C = 1, or near it."""
    rows = []
    for rule in SYSTEMS["global_pool"].rules:
        variant, static = Variant("", "global_pool", rule), Variant("", "global_pool", "static")
        runs = results.of("global_pool")
        if not runs:
            continue
        measured = [run["measures"][rule] for run in runs.values()]
        pairs = [
            paired_difference(results.values(variant, one), results.values(static, one)) for one in (LOSS, FRECHET)
        ]
        against = ["", ""] if rule == "static" else [told(pairs[0], LOSS.digits), told(pairs[1], FRECHET.digits)]
        rows.append([
            rule, str(len(runs)), f"{fmean(one['held_out']['capacity'] for one in measured):.3f}",
            _mean_and_deviation(results.values(variant, LOSS), 5), against[0],
            f"{fmean(one['samples']['capacity'] for one in measured):.3f}",
            _mean_and_deviation(results.values(variant, FRECHET), FRECHET.digits), against[1],
        ])  # fmt: skip
    head = ["rule", "seeds", "C", "loss", "minus static, own 95 %"]
    return table([*head, "C in sampling", "Fréchet distance", "minus static, own 95 %"], rows)


CONTRASTIVE = {"with": "prototype", "without": "no_contrastive"}


def missing_list(results: Results) -> list[str]:
    lines = []
    for purpose, runs in results.missing().items():
        names = ", ".join(f"`{run.name}`" for run in runs)
        lines.append(
            textwrap.fill(
                f"- {purpose}, {len(runs)} of them: {names}", PAGE_WIDTH, subsequent_indent="  ", break_on_hyphens=False
            )
        )
    return lines or ["Nothing: every planned run has its result."]


def timing_table(results: Results) -> list[str]:
    steps = results.timing.get("seconds_per_step", {})
    base = steps.get(REFERENCE)
    rows = []
    for system, rounds in steps.items():
        ratios = [one / dense for one, dense in zip(rounds, base, strict=True)]
        rows.append(
            [
                SYSTEMS[system].title,
                f"{sorted(rounds)[len(rounds) // 2]:.3f}",
                f"{sorted(ratios)[len(ratios) // 2]:.2f}",
            ]
        )
    return table(["system", "process seconds a step", "/ dense"], rows)


def classifier_line(results: Results) -> list[str]:
    found = results.classifier
    if not found:
        return ["Not trained yet."]
    own, of_5000 = found["frechet_of_test_images"], found["frechet_of_5000_test_images"]
    text = (
        f"Accuracy on the test images: {100 * found['accuracy']:.2f} %. Their own Fréchet distance to the training "
        f"images: {own:.4f}; that of 5,000 of them: {of_5000:.4f}."
    )
    return [textwrap.fill(text, PAGE_WIDTH)]


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "main": main_table,
    "samples": samples_table,
    "pairs": pairs_table,
    "levels": levels_table,
    "classes": classes_table,
    "learning-rate": learning_rate_table,
    "low-rate": low_rate_table,
    "larger": larger_table,
    "load": load_table,
    "falling": _ablation("learning rate falls to 0", FALLING, "dense_falling"),
    "pool": _ablation("images in a pool", POOLS, "global_pool"),
    "experts": _ablation("experts", EXPERT_NUMBERS, "global_pool"),
    "contrastive": _ablation("contrastive loss", CONTRASTIVE, "prototype"),
    "rules": rules_table,
    "timing": timing_table,
    "classifier": classifier_line,
    "missing": missing_list,
}


# The plots of plots.py and picture.py, and what they say to who cannot see them.
PICTURES = {
    "differences": "Loss and Fréchet distance of every system minus those of dense, with a point for each seed",
    "noise-levels": "Loss of every system against dense, at ten noise levels",
    "curves": "Training loss of every system against dense",
    "learning-rate": "Loss over the learning rate; and DiffMoE against dense while training, for each rate",
    "larger": "The larger model: loss over the learning rate; and DiffMoE against dense while training",
    "load": "Tokens of the experts of a layer, the busiest first",
    "ablations": "Loss and Fréchet distance over the images in a pool, and over the number of experts",
    "experts": "Which patches of ten images the eight experts of a layer take",
}


def with_tables(page: str, results: Results, plots: Path) -> str:
    """The page with every table and plot that it has a place for.

    Args:
        plots: the folder that they are drawn into, beside the page.
    """
    for name, make in TABLES.items():
        page = _put(page, name, make(results))
    for name, text in PICTURES.items():
        there = (plots / f"{name}.png").is_file()
        page = _put(page, f"plot-{name}", [f"![{text}]({plots.name}/{name}.png)" if there else "Not drawn yet."])
    return page


def _put(page: str, name: str, lines: Sequence[str]) -> str:
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text = "\n".join(["", *lines, "", ""])
    return place.sub(lambda match: match[1] + text + match[2], page)
