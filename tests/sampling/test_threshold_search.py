"""A search for a constant threshold: the same images at each, from one opened model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffmoe_dist.launch import Launch
from diffmoe_dist.sampling import job
from diffmoe_dist.sampling.job import sample_to_folder
from diffmoe_dist.sampling.settings import SamplingSettings
from diffmoe_dist.sampling.threshold_search import Point, best_point, search_thresholds
from tests.distributed import run_ranks
from tests.engine.runs import train_all

CPU = torch.device("cpu")
THRESHOLDS = [0.6, 0.2]


def search_and_sample(rank: int, ranks: int, run: Path, out: Path) -> int:
    """Both ways to the same images; how often the search opened the model."""
    settings = SamplingSettings(str(run), num=6, steps=3, batch_size=3)
    launch = Launch(rank, ranks, rank, "environment")
    opened = 0
    open_model: Any = vars(job)["open_model"]

    def counted(*arguments: Any) -> Any:
        nonlocal opened
        opened += 1
        return open_model(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "open_model", counted)
        search_thresholds(settings, THRESHOLDS, out / "search", CPU, launch)
    for threshold in THRESHOLDS:
        overrides = ("moe.inference=constant", f"moe.constant_threshold={threshold}")
        sample_to_folder(replace(settings, overrides=overrides), out / str(threshold), CPU, launch)
    return opened


def test_a_search_opens_the_model_once_and_has_the_images_of_a_job_at_each_threshold(
    tmp_path: Path, digits: Path
) -> None:
    run = tmp_path / "run"
    run_ranks(1, train_all, digits, [(run, {"train": {"steps": 20}})])

    assert run_ranks(1, search_and_sample, run, tmp_path) == [1]

    found = [np.load(tmp_path / f"search/threshold-{threshold}/samples.npz")["arr_0"] for threshold in THRESHOLDS]
    for threshold, images in zip(THRESHOLDS, found, strict=True):
        assert np.array_equal(images, np.load(tmp_path / str(threshold) / "samples.npz")["arr_0"]), threshold
        search, alone = (
            tmp_path / name / "sampling.json" for name in (f"search/threshold-{threshold}", str(threshold))
        )
        differing = {
            ours.split(":")[0].strip()
            for ours, theirs in zip(search.read_text().splitlines(), alone.read_text().splitlines(), strict=True)
            if ours != theirs
        }
        assert differing <= {'"images_per_second"'}
    assert not np.array_equal(*found), "the threshold matters"


def test_the_best_point_has_the_best_score_or_the_most_capacity_up_to_one() -> None:
    scored = [Point(0.2, 1.4, 1.0), Point(0.5, 0.9, 3.0), Point(0.7, 0.4, 2.0)]

    assert best_point(scored) == scored[2]
    assert best_point([replace(point, score=None) for point in scored]) == Point(0.5, 0.9, None)
    assert best_point(scored[:1]) is None
