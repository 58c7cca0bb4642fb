"""Training runs whose data are no single indexed folder: a mixture of several, and a stream."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_tools.digits import DigitsSource
from data_tools.pack import PackSettings, pack
from diffmoe_dist.config import build_config, for_world
from diffmoe_dist.data.open import open_data
from diffmoe_dist.engine.resume import find_start
from diffmoe_dist.errors import UserError
from tests.distributed import run_ranks
from tests.engine.runs import TINY, curve, metrics, train_one

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A mixture's run on one rank, and on two with a resume on one; a stream's on two ranks with a resume."""
    out = tmp_path_factory.mktemp("kinds")
    pack(DigitsSource(), out / "other", PackSettings(seed=1))
    (out / "tars").mkdir()
    for tar in digits.glob("*.tar"):  # without an index
        shutil.copy(tar, out / "tars")
    mixture, stream = mixture_of(out, digits), stream_of(out)
    run_ranks(2, train, [(out / "two", mixture, STEPS // 2), (out / "stream", stream, STEPS // 2)])
    run_ranks(1, train, [(out / "one", mixture, STEPS), (out / "two", mixture, STEPS)])
    run_ranks(2, train, [(out / "stream", stream, STEPS)])
    return out


def mixture_of(folder: Path, digits: Path, weight: float = 0.5) -> dict[str, Any]:
    return {"mixture": [{"shards": str(digits)}, {"shards": str(folder / "other"), "weight": weight}]}


def stream_of(folder: Path) -> dict[str, Any]:
    return {"shards": f"{folder}/tars/digits-{{000000..000003}}.tar", "stream": True}


def settings(run_dir: Path, data: dict[str, Any], steps: int) -> dict[str, Any]:
    return {"run_dir": str(run_dir), "data": data, "train": {"steps": steps}}


def train(rank: int, world_size: int, jobs: list[tuple[Path, dict[str, Any], int]]) -> None:
    for run_dir, data, steps in jobs:
        train_one(rank, world_size, build_config(TINY, settings(run_dir, data, steps)))


def test_a_mixture_gives_one_loss_curve_on_any_ranks_and_across_a_resume(folder: Path) -> None:
    assert [line["step"] for line in metrics(folder / "two")] == list(range(1, STEPS + 1))
    assert curve(folder / "two") == pytest.approx(curve(folder / "one"), abs=1e-6, rel=0)


def test_a_mixture_with_another_weight_is_another_run(folder: Path, digits: Path) -> None:
    config = build_config(TINY, settings(folder / "one", mixture_of(folder, digits, weight=0.6), STEPS))
    with pytest.raises(UserError, match="data.shards holds other data"):
        find_start(for_world(config, 1), open_data(config), 1)


def test_a_stream_trains_on_several_ranks_and_goes_on_where_it_was(folder: Path) -> None:
    lines = metrics(folder / "stream")
    assert [(line["step"], line["images_seen"]) for line in lines] == [(n, 16 * n) for n in range(1, STEPS + 1)]
    assert all(math.isfinite(loss) and 0 < loss < 10 for loss in curve(folder / "stream"))
    assert all(line["bad_samples"] == 0 for line in lines)
    assert not (folder / "tars" / "index.json").exists()
