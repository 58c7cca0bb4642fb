"""How often an optimizer step waits for the device, outside the layers."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_ranks
from tests.engine.runs import make_trainer, tiny_config

STEPS = 6
BF16 = {"precision": "bf16"}


class ReadValues(TorchDispatchMode):
    """Counts by function where a value leaves a tensor: on a device the host waits there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith("_local_scalar_dense"):
            ours = [f for f in traceback.extract_stack() if "diffmoe_dist" in f.filename or "deepspeed" in f.filename]
            where = next(frame for frame in reversed(ours) if not frame.name.startswith("<"))
            self.found[f"{Path(where.filename).name}:{where.name}"] += 1
        return func(*args, **(kwargs or {}))


def train_counted(rank: int, world_size: int, shards: Path, run_dir: Path, settings: dict[str, Any]) -> Any:
    """Where values were read in the steps from the third on, and how often DeepSpeed synchronised the device."""
    from deepspeed.accelerator import get_accelerator

    trainer = make_trainer(rank, world_size, tiny_config(run_dir, shards, settings, {"log": {"every": 2}}))
    synchronised = []
    get_accelerator().synchronize = lambda device_index=None: synchronised.append(traceback.format_stack())
    trainer.train_step()
    trainer.train_step()
    with ReadValues() as values:
        for _ in range(STEPS):
            with trainer.timer:
                report = trainer.train_step()
            trainer._do_what_is_due(report)
    trainer.close()
    return dict(values.found), synchronised


@pytest.mark.parametrize(
    "settings", [{}, BF16, {"train": {"micro_batch_size": 4}}], ids=["fp32", "bf16", "micro-steps"]
)
def test_a_step_reads_values_from_one_copy_and_deepspeed_never_synchronises(
    tmp_path: Path, digits: Path, settings: dict[str, Any]
) -> None:
    [result] = run_ranks(1, train_counted, digits, tmp_path / "run", settings)
    assert_reads_one_copy(*result)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_reach_their_owners_without_a_wait_of_the_host(tmp_path: Path, digits: Path, stage: int) -> None:
    settings = {"moe": {"router": "dense", "num_experts": None}, "parallel": {"zero_stage": stage}}
    for result in run_ranks(2, train_counted, digits, tmp_path / "run", settings):
        assert_reads_one_copy(*result)


def assert_reads_one_copy(values: dict[str, int], synchronised: list[Any]) -> None:
    """`_update` reads it; it is on the host."""
    assert not synchronised, "".join(synchronised[0])
    assert values.keys() <= {"trainer.py:_update", "trainer.py:_metrics", "routing_stats.py:routing_metrics"}, values
    assert "trainer.py:_update" in values
