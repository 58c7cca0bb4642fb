"""Folders that `sample` or `evaluate` has written, of the runs of a page: their images and scores."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.image_sources import NpzImages
from diffmoe_dist.files import read_json_object
from diffmoe_dist.sampling.settings import PROMPTS_NAME

_SCORE = re.compile(r"[a-z]\w*_\d+k?")  # fid_50k, frechet_distance_200; with the number of samples
_HIGHER = ("inception_score", "precision", "recall", "clip_score")
_STEP = re.compile(r"step-(\d+)")
# What the name of a score tells where folders differ in it, with the value that goes without saying.
_OF_SAMPLES: dict[str, Any] = {
    "time_shift": None, "one_pass": False, "cfg_channels": "all", "ema_decay": None, "ema_length": None,
    "labels": "balanced", "classes": "all", "negative_prompt": None, "prompts": None,
}  # fmt: skip
# The same where folders of one run differ: of two runs each is compared under its own rule, which may be no other's.
_OF_RUN: dict[str, Any] = {
    "inference": None, "constant_threshold": None, "recalibrate": 0, "recalibrated_on": None, "precision": None,
    "tf32": False,
}  # fmt: skip
_DEFAULTS = _OF_SAMPLES | _OF_RUN
_LONGEST = 24  # letters of what a name tells; of a longer text the begin and a fingerprint


@dataclass(frozen=True)
class FoundScore:
    folder: Path  # of the run
    name: str  # with how its samples were made: two ways are two scores
    step: int
    value: float


@dataclass(frozen=True)
class ScoredSamples:
    """What a folder of finished samples says about one step of a run."""

    folder: Path
    run_folder: Path
    step: int
    sampling: dict[str, Any]
    scores: dict[str, float]

    def images(self, most: int) -> tuple[np.ndarray, list[int]]:
        """The first images, (N, H, W, C) uint8, and their labels. Raises UserError where the file is damaged."""
        path = self.folder / "samples.npz"
        source = NpzImages(path, str(path))
        count = min(most, source.num_images)
        (batch,) = source.batches(range(count), count)
        try:
            with np.load(path, allow_pickle=False) as file:
                labels = [int(label) for label in file["arr_1"][:count]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: arr_1 cannot be read ({error}); sample again") from None
        return batch.permute(0, 2, 3, 1).numpy(), labels

    def prompt(self, number: int) -> str | None:
        """Of an image; None where the model is conditioned on classes. Raises UserError where the file is damaged."""
        path = self.folder / PROMPTS_NAME
        if not path.is_file():
            return None
        try:
            return str(json.loads(path.read_text().splitlines()[number])["prompt"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise UserError(f"{path}: no prompt of image {number}; sample again") from None


def found_scores(finished: Iterable[ScoredSamples]) -> list[FoundScore]:
    """The scores of all folders: those that were made in two ways have two names.

    Raises:
        UserError: two folders have a score of one name at one step of a run.
    """
    scored = [samples for samples in finished if samples.scores]
    differing = _differing(scored)
    folders: dict[tuple[Path, str, int], Path] = {}
    found = []
    for samples in scored:
        told = how_sampled(samples.sampling, differing)
        for score, value in samples.scores.items():
            name = f"{score} ({told})" if told else score
            key = samples.run_folder, name, samples.step
            if key in folders:
                raise UserError(
                    f"--samples {folders[key]} {samples.folder}: both have {name} of {samples.run_folder} at step "
                    f"{samples.step}; leave one out"
                )
            folders[key] = samples.folder
            found.append(FoundScore(*key, value))
    return found


def _differing(scored: Sequence[ScoredSamples]) -> list[str]:
    """The names of what is told of some of these folders."""
    values: dict[tuple[str, Path | None], set[str]] = {}
    for samples in scored:
        for name in _DEFAULTS:
            among = samples.run_folder if name in _OF_RUN else None
            values.setdefault((name, among), set()).add(str(_value(samples.sampling, name)))
    return list(dict.fromkeys(name for (name, _), found in values.items() if len(found) > 1))


def how_sampled(sampling: dict[str, Any], differing: Sequence[str]) -> str:
    """What a score depends on beside the model, of those that scores of one name may differ in.

    Args:
        differing: what folders differ in, of `_DEFAULTS`.
    """
    parts = {
        "sampler": "{}", "steps": "{} steps", "cfg_scale": "CFG {:g}", "cfg_interval": "at {}", "decoder": "{}",
    }  # fmt: skip
    forms = {name: form for name, form in parts.items() if _value(sampling, name) is not None}
    try:
        told = [form.format(sampling[name]) for name, form in forms.items()]
    except (TypeError, ValueError):  # edited
        told = [str(sampling[name]) for name in forms]
    others = {name: _value(sampling, name) for name in differing}
    told += [_shown(name, value) for name, value in others.items() if value != _DEFAULTS[name]]
    return ", ".join(told)


def _value(sampling: dict[str, Any], name: str) -> Any:
    value = sampling.get(name)
    return _DEFAULTS.get(name) if value in (None, "not recorded") else value


def _shown(name: str, value: Any) -> str:
    text = str(value)
    if len(text) > _LONGEST:
        text = f"{text[:12]}... {hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return name if value is True else f"{name} {text}"


def is_score(name: str) -> bool:
    return _SCORE.fullmatch(name) is not None and not name.startswith(("loss", "seconds"))


def higher_is_better(name: str) -> bool:
    return name.startswith(_HIGHER)


def read_scored_samples(folder: Path, run_folders: Sequence[Path]) -> ScoredSamples:
    """Read the sampling.json and scores.json of a folder, one of which may be missing.

    Raises:
        UserError: both are, one is damaged, or they are of none of the runs.
    """
    sampling, scored = _read_json(folder / "sampling.json"), _read_json(folder / "scores.json")
    if not sampling and not scored:
        raise UserError(
            f"--samples {folder}: no sampling.json or scores.json there; give a folder of diffmoe_dist.sample"
        )
    sampling = sampling or _dictionary(scored.get("sampling"))
    checkpoint = Path(str(sampling.get("checkpoint", "")))
    named = _STEP.fullmatch(checkpoint.name)
    of_run = checkpoint.parent.parent
    runs = [run for run in run_folders if run.resolve() == of_run.resolve()]
    runs = runs or [run for run in run_folders if run.resolve().name == of_run.name]  # a folder that has moved
    if named is None or len(runs) != 1:
        raise UserError(f"--samples {folder}: of checkpoint {checkpoint}, which is of none of these runs; leave it out")
    scores = {name: value for name, value in _dictionary(scored.get("scores")).items() if isinstance(value, float)}
    return ScoredSamples(folder, runs[0], int(named[1]), sampling, scores)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); write it again") from None


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
