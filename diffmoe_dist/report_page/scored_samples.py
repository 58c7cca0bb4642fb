"""Folders that `sample` or `evaluate` has written, of the runs of a page: their images and scores."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
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

    def found_scores(self) -> list[FoundScore]:
        told = how_sampled(self.sampling)
        return [
            FoundScore(self.run_folder, f"{name} ({told})" if told else name, self.step, value)
            for name, value in self.scores.items()
        ]

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


def how_sampled(sampling: dict[str, Any]) -> str:
    """What a score depends on beside the model, of those that scores of one name may differ in."""
    parts = {
        "sampler": "{}", "steps": "{} steps", "cfg_scale": "CFG {:g}", "cfg_interval": "at {}", "decoder": "{}",
    }  # fmt: skip
    told = {name: form for name, form in parts.items() if sampling.get(name) not in (None, "not recorded")}
    try:
        return ", ".join(form.format(sampling[name]) for name, form in told.items())
    except (TypeError, ValueError):  # edited
        return ", ".join(str(sampling[name]) for name in told)


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
