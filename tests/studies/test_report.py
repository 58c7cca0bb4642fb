"""The tables and plots come from whatever results there are, and name what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studies.routing.__main__ import PAGE
from studies.routing.plots import PLOTS, draw_all
from studies.routing.report import FRECHET, LOSS, PICTURES, TABLES, Results, by_images, difference, with_tables
from studies.routing.results import RESULTS
from studies.routing.systems import EXPERT_NUMBERS, LEARNING_RATES, MAIN_SYSTEMS, SYSTEMS, VARIANTS, Run

BEST = LEARNING_RATES[1]
PLACES = [*TABLES, *(f"plot-{name}" for name in PICTURES)]


def write(folder: Path, run: Run, loss: float) -> None:
    """A result such as the driver writes, with this loss."""
    experts = 0 if run.system.startswith("dense") else 8
    blocks = (loss + 0.01 * np.sin(np.arange(100.0))).tolist()
    one = {
        "held_out": {
            "loss": loss, "by_level": [loss] * 10, "by_block": blocks, "capacity": 1.0 if experts else None,
            "load": [[700 - 100 * expert for expert in range(experts)]] * 3 if experts else [],
            "parameters": 4_300_000, "activated_parameters": 1_880_000,
        },
        "samples": {
            "capacity": 1.0 if experts else None, "frechet": 10 * loss, "accuracy": 0.8,
            "accuracy_by_class": [0.8] * 10,
        },
    }  # fmt: skip
    training = {"50": loss + 0.1, "100": loss}
    result = {
        "name": run.name, "system": run.system, "seed": run.seed, "lr": run.lr,
        "settings": [f"moe.num_experts={experts}"] if experts else [],
        "curve": {"training": training}, "measures": dict.fromkeys(SYSTEMS[run.system].rules, one),
    }  # fmt: skip
    (folder / f"{run.name}.json").write_text(json.dumps(result))


def write_larger(folder: Path, run: Run, loss: float, finished: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    curve = {"training": {"50": loss}, "validation": {"500": 1.0, "1000": loss}}
    samples = {"frechet": 5 * loss} if finished else None
    result = {"system": run.system, "seed": 0, "lr": run.lr, "steps": 1000, "curve": curve, "samples": samples}
    (folder / f"{run.name}.json").write_text(json.dumps(result))


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """Every learning rate, two systems with two seeds, one with one, one ablation, and the larger model's."""
    for lr, loss in ((1e-4, 0.2), (1e-3, 0.1), (3e-3, 0.9)):
        write_larger(tmp_path / "larger", Run("dense", 0, lr), loss)
        write_larger(tmp_path / "larger", Run("global_pool", 0, lr), 1.1 * loss, finished=lr < 3e-3)
    for lr in LEARNING_RATES:
        write(tmp_path, Run("dense", 0, lr), 0.2 if lr == BEST else 0.3)
    write(tmp_path, Run("dense", 1, BEST), 0.22)
    write(tmp_path, Run("token_choice", 0, BEST), 0.19)
    write(tmp_path, Run("token_choice", 1, BEST), 0.20)
    write(tmp_path, Run("global_pool", 0, BEST), 0.18)
    write(tmp_path, Run("pool_1", 0, BEST), 0.185)
    return tmp_path


def test_every_table_is_written_between_its_markers_and_the_text_around_it_stays(partial: Path) -> None:
    page = "".join(f"before\n<!-- {name} -->\nSTALE\n<!-- /{name} -->\n" for name in PLACES)

    written = with_tables(page, Results(partial), partial)

    assert "STALE" not in written and written.count("before") == len(PLACES)
    # Differences 0.01 and 0.02: mean 0.015, deviation 0.00707, so 12.706 * 0.00707 / sqrt(2).
    assert "| token choice | 2 | 4.300 | 1.880 | 1.000 | 0.19500 (0.00707) | -0.01500 ± 0.06353 |" in written
    assert "| DiffMoE, dynamic | 1 | 4.300 | 1.880 | 1.000 | 0.18000 | -0.02000 (n = 1) |" in written
    # Common to two systems: deviation 0.005 (of the distance ten times that), one seed: 12.706 * 0.005 * sqrt(2).
    assert "| 1 | 1 | 0.18500 | +0.00500 (n = 1) | +0.00500 ± 0.08985 | 1.8500 | +0.0500 (n = 1) |" in written
    assert "| +0.0500 (n = 1) | +0.0500 ± 0.8985 |" in written
    # Loads 700 down to 0, mean 350: the last of eight experts has less than a tenth of it.
    assert "| token choice | 2.00 | 0.00 | 1.00 of 8 |" in written
    assert "| 0.001 | 0.1000 | 0.1100 | +10.0 % | 0.5000 | 0.5500 | +10.0 % |" in written
    assert "| 0.003 | 0.9000 | ended at step 1000 | - | 4.5000 | - | - |" in written
    assert with_tables(written, Results(partial), partial) == written


def test_the_missing_runs_are_named_by_what_they_are_for(partial: Path, tmp_path_factory: Any) -> None:
    missing = Results(partial).missing()

    assert Run("token_choice", 2, BEST) in missing["the main comparison"]
    assert Run("token_choice", 1, BEST) not in missing["the main comparison"]
    assert len(missing["the sensitivity to the learning rate"]) == 9
    (nothing_yet,) = Results(tmp_path_factory.mktemp("empty")).missing().values()
    assert len(nothing_yet) == len(LEARNING_RATES)


def test_differences_are_paired_by_seed_and_by_image(partial: Path) -> None:
    results = Results(partial)
    token_choice, dense = VARIANTS["token_choice"], VARIANTS["dense"]

    own, common = difference(results, token_choice, dense, LOSS)

    assert own is not None and own.n == 2 and own.mean == pytest.approx(-0.015)
    # Two systems and two seeds: residuals of 0.0025 each, one degree of freedom, deviation 0.005.
    assert common is not None and common.half_width == pytest.approx(12.706 * 0.005, rel=1e-3)
    images = by_images(results, token_choice, dense)
    assert images is not None and images.n == 100 and images.is_clear  # what the blocks have in common drops out


def test_the_same_weights_under_two_rules_have_no_common_interval(partial: Path) -> None:
    results = Results(partial)

    assert difference(results, VARIANTS["global_pool_static"], VARIANTS["global_pool_dynamic"], FRECHET)[1] is None


def test_plots_are_drawn_of_what_there_is_and_the_others_are_named(partial: Path, tmp_path: Path) -> None:
    undrawn = draw_all(Results(partial), tmp_path / "plots")
    for number, system in enumerate([*MAIN_SYSTEMS, *EXPERT_NUMBERS.values()]):
        write(partial, Run(system, 0, BEST), 0.2 + 0.001 * number)

    assert undrawn == ["ablations"]
    assert draw_all(Results(partial), tmp_path / "plots") == []
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(PLOTS)


def test_without_results_nothing_is_drawn_and_the_page_says_so(tmp_path: Path) -> None:
    results = Results(tmp_path)

    assert draw_all(results, tmp_path / "plots") == list(PLOTS)
    assert "Not run yet." in with_tables("<!-- main -->\n<!-- /main -->", results, tmp_path)


def test_the_page_shows_what_the_committed_results_say() -> None:
    page = PAGE.read_text()

    assert page == with_tables(page, Results(RESULTS), PAGE.with_suffix("")), "run python -m studies.routing report"
    assert all(f"<!-- {name} -->" in page for name in PLACES)
