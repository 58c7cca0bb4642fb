"""What a rank really allocates in a step, on a CPU, against the plan: weights, optimizer, gradients and activations."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measuring import peak_bytes
from diffmoe_dist.planning.estimate import Plan, make_plan
from diffmoe_dist.planning.memory import ZeroGroup, gradient_bytes
from diffmoe_dist.planning.workload import Cluster
from tests.distributed import run_ranks
from tests.engine.runs import make_trainer, tiny_config
from tests.planning.plans import DENSE, H100, MIXED, SHARDED, Case

# So large that what no plan counts, such as indices and losses, is small beside it.
LARGE = {
    "model": {"depth": 4, "hidden_size": 256, "num_heads": 4, "patch_size": 1}, "train": {"global_batch_size": 8},
}  # fmt: skip
LAYOUTS: dict[int, dict[str, Case]] = {
    2: {
        "dense": DENSE,
        "sharded, bf16": {"precision": "bf16", **SHARDED},
        "mixed": MIXED,
        "accumulated": {**SHARDED, "train": {"micro_batch_size": 2}},
        "recomputed": {**SHARDED, "train": {"recompute": "block"}},
        "cut and sharded": {"parallel": {"tensor": 2, "expert": 2}},
        "half is frozen, bf16": {**SHARDED, "precision": "bf16", "train": {"freeze": ["?_e*", "*.[01].*", "*.attn.*"]}},
    },
    4: {
        "parameters larger than chunks": {**DENSE, "model": {"depth": 2, "mlp_ratio": 32.0}},
        "two groups": SHARDED,
        "two groups, ZeRO 2": {"train": {"micro_batch_size": 1}, "parallel": {"expert": 2, "zero_stage": 2}},
        "cut over two, sharded over four, gradients in bf16": {
            "parallel": {"tensor": 2, "expert": 4, "gradient_dtype": "bf16"}
        },
    },
}  # fmt: skip


def allocated(rank: int, world_size: int, run_dir: str, digits: str, layouts: list[Case]) -> list[int]:
    """Of each layout the most bytes that this rank adds in a step to those that it holds."""
    found = []
    for settings in layouts:
        trainer = make_trainer(rank, world_size, tiny_config(Path(run_dir), Path(digits), LARGE, settings))
        trainer.train_step()
        found.append(peak_bytes(trainer.train_step, torch.device("cpu")))
        trainer.close()
        del trainer
        gc.collect()
    return found


def plan_of(settings: Case, ranks: int) -> Plan:
    config = tiny_config(Path("unused"), Path("unused"), LARGE, settings)
    return make_plan(config, Cluster(1, ranks, H100))


@pytest.fixture(scope="module")
def measured(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[int]]:
    found = {}
    for ranks, layouts in LAYOUTS.items():
        run_dir = tmp_path_factory.mktemp("run")
        by_rank = run_ranks(ranks, allocated, str(run_dir), str(digits), list(layouts.values()), time_limit=300)
        for place, name in enumerate(layouts):
            found[ranks, name] = [of_rank[place] for of_rank in by_rank]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks in LAYOUTS for name in LAYOUTS[ranks]])
def test_a_rank_allocates_what_the_plan_says_within_a_tenth(ranks: int, name: str, measured: Any) -> None:
    plan = plan_of(LAYOUTS[ranks][name], ranks)
    held = sum(plan.persistent.values())  # exact, see test_estimate.py
    # The plan is of the rank whose gradients are complete first.
    assert plan.memory == pytest.approx(held + max(measured[ranks, name]), rel=0.1)


def test_gradients_wait_for_the_largest_parameter_to_be_complete() -> None:
    """Of one that several chunks share, the gradient is whole until the last of them is copied."""
    config = plan_of({**DENSE, "parallel": {"zero_stage": 1}}, 4).config
    small, large = (ZeroGroup("all", "world", 400, largest, 400, 4) for largest in (50, 200))
    assert [group.chunk for group in (small, large)] == [100, 100]
    # Three chunks are copied, the fourth has waited for the rest of its last parameter; one is added up already.
    assert gradient_bytes(config, [small], 1, 1.0) == 4 * (300 + 150 + 100)
    assert gradient_bytes(config, [large], 1, 1.0) == 4 * (300 + 300 + 100)
