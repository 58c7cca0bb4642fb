"""A run that comes back on fewer ranks, then on more, stays on its curve by the settings of one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffmoe_dist.config import load_config
from diffmoe_dist.engine.progress import read_progress
from tests.distributed import run_ranks
from tests.engine.runs import curve, train_all

pytestmark = pytest.mark.slow

# Each on two ranks at first: a pool of half the batch, a pool for each rank, one for the two ranks that share experts,
# and none.
RUNS: dict[str, dict[str, Any]] = {
    "global": {"train": {"micro_batch_size": 4}, "parallel": {"expert": 2}},
    "rank": {"moe": {"pool": "rank"}, "train": {"micro_batch_size": 4}},
    "expert": {"moe": {"pool": "expert_parallel"}, "parallel": {"expert": 2}, "train": {"micro_batch_size": 4}},
    "dense": {"moe": {"router": "dense", "num_experts": None}},
}
RANKS, STEPS = (2, 1, 4, 2), 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    root = tmp_path_factory.mktemp("runs")

    def jobs(steps: int, folder: str) -> list[tuple[Path, dict[str, Any]]]:
        return [
            (root / f"{name}{folder}", {**layer, "train": {**layer.get("train", {}), "steps": steps}})
            for name, layer in RUNS.items()
        ]

    for number, ranks in enumerate(RANKS, 1):
        undisturbed = jobs(STEPS * len(RANKS), "-undisturbed") if number == 1 else []
        run_ranks(ranks, train_all, digits, [*undisturbed, *jobs(STEPS * number, "")])
    return root


@pytest.mark.parametrize("name", RUNS)
def test_from_two_ranks_to_one_to_four_to_two_the_curve_is_the_undisturbed_one(runs: Path, name: str) -> None:
    assert curve(runs / name, "step") == list(range(1, STEPS * len(RANKS) + 1))
    assert curve(runs / name) == pytest.approx(curve(runs / f"{name}-undisturbed"), abs=1e-6, rel=0)


def test_what_was_fitted_to_the_ranks_is_one_line_and_stands_in_the_run_folder(runs: Path) -> None:
    lines = (runs / "global/logs/rank-0.log").read_text().splitlines()
    told = [line.partition("WARNING ")[2] or line for line in lines if "the run goes on" in line]
    kept = [f"{runs}/global/config-until-step-{STEPS * number:08d}.yaml" for number in (1, 2, 3)]
    common, same = "the run goes on after step-0000000", "2 micro-steps a step, token pools of 8 samples as before"
    expected = [
        f"{common}2 on 1 rank, after 2: train.micro_batch_size 4 -> 8 (asked for: 4), parallel.expert 2 -> 1 (asked "
        f"for: 2), {same}; the old settings stay in {kept[0]}",
        f"{common}4 on 4 ranks, after 1: train.micro_batch_size 8 -> 2 (asked for: 4), parallel.expert 1 -> 2, {same}; "
        f"the old settings stay in {kept[1]}",
        f"{common}6 on 2 ranks, after 4: train.micro_batch_size 2 -> 4, {same}; the old settings stay in {kept[2]}",
    ]
    assert [line[line.index("the run") :] for line in told] == expected
    micro_batches = [load_config(path).train.micro_batch_size for path in kept]
    assert [*micro_batches, load_config(runs / "global/config.yaml").train.micro_batch_size] == [4, 8, 2, 4]
    asked = {"train.micro_batch_size": 4, "parallel.expert": 2, "parallel.tensor": 1, "train.recompute": "none"}
    assert read_progress(runs / "global/checkpoints/step-00000006").asked == asked
    assert "settings change after step-00000002: train.steps 2 -> 4; the old ones" in "\n".join(lines)
