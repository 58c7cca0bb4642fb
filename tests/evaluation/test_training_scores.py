"""Scores of a few samples during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffmoe_dist import load_model
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.diffusion.samplers import Guidance
from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.metrics import Moments, Statistics, frechet_distance
from diffmoe_dist.evaluation.training_scores import open_training_scores
from diffmoe_dist.sampling.conditions import ClassLabels
from diffmoe_dist.sampling.generate import SamplerSettings, generate, to_uint8
from tests.distributed import run_ranks
from tests.engine.runs import metrics, tiny_config, train_all
from tests.evaluation.colours import colours

COLOURS = "tests.evaluation.colours:colours"
DIGITS = ClassLabels(range(10), 10)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "colours.npz"
    x = np.random.default_rng(0).random((50, 12))
    np.savez(path, mu=x.mean(0), sigma=np.cov(x, rowvar=False), extractor=np.array(COLOURS))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path, reference: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "train": {"steps": 4},
        "moe": {"inference": "threshold"},
        "log": {"every": 3},
        "fid": {"every": 2, "num": 21, "features": COLOURS, "reference": str(reference)},
        "sample": {"steps": 3, "cfg_scale": 1.5},
    }
    run_ranks(1, train_all, digits, [(folder / "alone", settings), (folder / "without", {"train": {"steps": 4}})])
    run_ranks(2, train_all, digits, [(folder / "two", {**settings, "parallel": {"expert": 2}})])
    return folder


def test_scores_stand_in_the_lines_of_their_steps_and_change_nothing_else(runs: Path) -> None:
    lines = metrics(runs / "alone")
    assert [(line["step"], "frechet_distance_21" in line) for line in lines] == [(2, True), (3, False), (4, True)]
    assert lines[-1]["loss"] == metrics(runs / "without")[-1]["loss"]


def test_a_score_is_that_of_the_averaged_models_images_on_any_ranks(runs: Path, digits: Path, reference: Path) -> None:
    config = tiny_config(runs / "alone", digits)
    numbers = list(range(21))
    sampled = generate(
        load_model(runs / "alone"), build_objective(config), numbers, DIGITS,
        SamplerSettings("euler", steps=3, guidance=Guidance(1.5)),
    )  # fmt: skip
    moments = Moments(12, CPU)
    moments.add(colours(torch.from_numpy(to_uint8(sampled.images)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)))
    with np.load(reference) as file:
        stored = Statistics(torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"]))
    expected = frechet_distance(moments.statistics(), stored)
    for run in ("alone", "two"):
        # A pixel that rounds to its neighbour moves a mean over 16 pixels of one of 21 images by 1e-5.
        assert metrics(runs / run)[-1]["frechet_distance_21"] == pytest.approx(expected, abs=1e-4), run
    assert expected > 0.01


def test_settings_of_scores_that_do_not_fit_are_refused(digits: Path, reference: Path, tmp_path: Path) -> None:
    def open_scores(**settings: Any) -> None:
        open_training_scores(tiny_config(Path("r"), digits, {"fid": settings}), DIGITS, lambda images: images, CPU)

    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3), extractor=np.array(COLOURS))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((9, 8, 8, 1), dtype=np.uint8))
    given = {"every": 5, "features": COLOURS, "reference": str(reference)}
    for wrong, message in (
        ({**given, "reference": None}, r"fid\.every=5 needs fid\.reference"),
        ({**given, "every": 0}, r"fid\.features=\S+ has no effect with fid\.every=0"),
        ({**given, "num": 1}, r"fid\.num=1"),
        ({**given, "features": "nowhere.pt2"}, r"fid\.features=nowhere\.pt2: neither the local folder"),
        ({**given, "features": "nowhere.pth"}, r"fid\.features=nowhere\.pth: cannot be read"),
        ({**given, "features": "nowhere:colours"}, r"fid\.features=nowhere:colours: there is no module nowhere"),
        ({**given, "features": f"{__name__}:nothing"}, r"fid\.features=\S+:nothing: \S+ has no callable 'nothing'"),
        ({**given, "reference": "nowhere.npz"}, r"fid\.reference=nowhere\.npz: cannot be read"),
        ({**given, "reference": str(tmp_path / "narrow.npz")}, r"are of 3 features, but \S+ gives 12"),
        ({**given, "reference": str(tmp_path / "images.npz")}, r"it has no statistics"),
    ):
        with pytest.raises(UserError, match=message):
            open_scores(**wrong)
