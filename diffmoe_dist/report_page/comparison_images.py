"""The same images of several runs: of one class or prompt, from one noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffmoe_dist.data.class_names import NO_NAMES
from diffmoe_dist.engine.progress import read_progress
from diffmoe_dist.engine.weights import read_class_names
from diffmoe_dist.report_page import figures
from diffmoe_dist.report_page.comparison import EXPERTS, Result, Run, digits, together
from diffmoe_dist.report_page.html import section
from diffmoe_dist.report_page.samples import sample_for_page
from diffmoe_dist.report_page.scored_samples import ScoredSamples
from diffmoe_dist.sampling.conditions import ClassLabels
from diffmoe_dist.sampling.settings import SamplingSettings

LARGEST = 192  # pixels of a side; larger images are made smaller for the page
FINISHED_IMAGES = 10  # of each folder of samples


@dataclass(frozen=True)
class RunImages:
    run: Run
    step: int
    images_NHWC: np.ndarray
    conditions: list[str]
    settings: dict[str, Any]  # how they were sampled, for people
    seed: int | None
    capacity: float | None


def images_section(
    runs: Sequence[Run], asked: SamplingSettings | None, finished: Sequence[ScoredSamples], device: torch.device
) -> tuple[str, list[Result]]:
    """A section of the page, and the capacities that were measured while sampling."""
    found = _finished(runs, finished) if finished else [] if asked is None else _sampled(runs, asked, device)
    if not found:
        return "", []
    blocks = "".join(_block(number, found) for number in range(max(len(each.images_NHWC) for each in found)))
    side = min(max(each.images_NHWC.shape[2] for each in found), LARGEST)
    shown = max(side, 64)
    style = f"--side:{shown}px;--wide:{min(len(found), 4) * (shown + 8) + 22}px"
    style += f";--rendering:{'pixelated' if side < 64 else 'auto'}"
    body = f'<div class="same" style="{style}">{blocks}</div>'
    text = section("Samples", _about(runs, found), []).removesuffix("</section>")
    capacities = {each.run.letter: each.capacity for each in found}
    values = [capacities.get(run.letter) for run in runs]
    rows = [Result(EXPERTS, "C in sampling", values, [digits(value) for value in values])]
    return f"{text}{body}</section>", rows if any(value is not None for value in values) else []


def _sampled(runs: Sequence[Run], asked: SamplingSettings, device: torch.device) -> list[RunImages]:
    found = []
    for run, checkpoint in _checkpoints(runs):
        sampled = sample_for_page(checkpoint, replace(asked, checkpoint=str(run.history.folder)), device)
        capacity = None
        if sampled.trace is not None:
            capacity = float(sampled.trace.conditional.capacity_by_layer.mean())
        names = [sampled.conditions.name(label) for label in sampled.labels]
        step = read_progress(checkpoint).step
        found.append(RunImages(run, step, sampled.images_NHWC, names, sampled.settings, asked.seed, capacity))
    return found


def _checkpoints(runs: Sequence[Run]) -> list[tuple[Run, Path]]:
    """The newest step that every run has a checkpoint of; else the newest one of each."""
    having = [run for run in runs if run.history.checkpoints]
    by_name = [{path.name: path for path in run.history.checkpoints} for run in having]
    common = set.intersection(*map(set, by_name)) if by_name else set()
    return [(run, paths[max(common or paths)]) for run, paths in zip(having, by_name, strict=True)]


def _finished(runs: Sequence[Run], finished: Sequence[ScoredSamples]) -> list[RunImages]:
    """Of each run the newest samples that have images."""
    found = []
    for run in runs:
        own = [s for s in finished if s.run_folder == run.history.folder and (s.folder / "samples.npz").is_file()]
        if not own:
            continue
        newest = max(own, key=lambda samples: samples.step)
        images, labels = newest.images(FINISHED_IMAGES)
        checkpoints = run.history.checkpoints
        class_names = read_class_names(checkpoints[-1]) if checkpoints else NO_NAMES
        of_class = ClassLabels(labels, run.config.model.num_classes, class_names).name
        names = [newest.prompt(number) or of_class(label) for number, label in enumerate(labels)]
        job = newest.sampling
        told = {name: job.get(name) for name in ("sampler", "steps", "cfg_scale", "inference", "seed", "recalibrate")}
        found.append(RunImages(run, newest.step, images, names, told, job.get("seed"), job.get("capacity")))
    return found


def _block(number: int, found: Sequence[RunImages]) -> str:
    """One image of each run that has it."""
    having = [each for each in found if number < len(each.images_NHWC)]
    conditions = list(dict.fromkeys(each.conditions[number] for each in having))
    images = "".join(
        f'<div><img src="{figures.image_uri(_small(each.images_NHWC[number]))}" '
        f'alt="{escape(each.conditions[number])}, {each.run.letter}">{each.run.letter}</div>'
        for each in having
    )
    title = conditions[0] if len(conditions) == 1 else "; ".join(
        f"{each.run.letter}: {each.conditions[number]}" for each in having
    )  # fmt: skip
    return f'<figure><h3>{escape(title)}</h3><div class="row">{images}</div></figure>'


def _small(image_HWC: np.ndarray) -> np.ndarray:
    if max(image_HWC.shape[:2]) <= LARGEST:
        return image_HWC
    image = Image.fromarray(image_HWC.squeeze())
    image.thumbnail((LARGEST, LARGEST))
    smaller = np.asarray(image)
    return smaller if smaller.ndim == 3 else smaller[..., None]


def _about(runs: Sequence[Run], found: Sequence[RunImages]) -> str:
    steps = {each.step for each in found}
    text = "Averaged weights of step "
    if len(steps) == 1:
        text += f"{found[0].step:,}."
    else:
        text = "Averaged weights of other steps: " + ", ".join(f"{e.run.letter} {e.step:,}" for e in found) + "."
    shapes = {each.images_NHWC.shape[1:] for each in found}
    if len({each.seed for each in found}) == 1 and len(shapes) == 1:
        text += " The images of a box start from one noise."
    else:
        text += " They start from other noise: another seed, or another size."
    settings = [each.settings for each in found]
    common = {name: value for name, value in settings[0].items() if all(s.get(name) == value for s in settings)}
    text += " Sampled with " + ", ".join(f"{name} {value}" for name, value in common.items()) + "."
    others = [", ".join(f"{name} {value}" for name, value in own.items() if name not in common) for own in settings]
    for members in together(range(len(found)), lambda place: others[place]):
        letters = ", ".join(found[place].run.letter for place in members)
        text += f" {letters}: {others[members[0]]}." if others[members[0]] else ""
    having = {each.run.letter for each in found}
    if without := [run.letter for run in runs if run.letter not in having]:
        text += f" No checkpoint or samples yet: {', '.join(without)}."
    return text
