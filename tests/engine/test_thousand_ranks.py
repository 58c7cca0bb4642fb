"""The real code as one of 1,024 ranks: its process groups, and a training step whose collectives are those of the plan.

The process group is torch's fake one. What it would send is answered as if all ranks had the data of this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.collectives import counted
from diffmoe_dist.planning.estimate import make_plan
from diffmoe_dist.planning.memory import zero_groups
from diffmoe_dist.planning.workload import Cluster
from tests.distributed import run_ranks
from tests.engine.runs import make_trainer, tiny_config
from tests.planning.plans import H100

RANKS, EXPERT = 1024, 16
SETTINGS = {
    "moe": {"num_experts": 16}, "train": {"global_batch_size": RANKS}, "parallel": {"expert": EXPERT},
    "log": {"every": 100},  # a step that is logged also sums up what the experts did
}  # fmt: skip


@contextmanager
def all_ranks_alike() -> Iterator[None]:
    """Every other rank sends what this one sends."""

    def of_others(name: str, fill: Any) -> Any:
        original = getattr(dist.ProcessGroup, name)

        def call(group: Any, *arguments: Any, **named: Any) -> Any:
            fill(group, *arguments)
            return original(group, *arguments, **named)

        return call

    def add_up(group: Any, tensors: list[Tensor], *_: Any) -> None:
        tensors[0].mul_(group.size())

    def gather(group: Any, output: Tensor, mine: Tensor, *_: Any) -> None:
        output.view(group.size(), -1).copy_(mine.clone().view(1, -1))

    def exchange(group: Any, output: Tensor, mine: Tensor, _: Any = (), sizes: Any = (), *__: Any) -> None:
        part = mine.split(sizes or [len(mine) // group.size()] * group.size())[group.rank()]
        output.zero_()
        if len(part):  # rank by rank; ties may give another number of rows to each
            output.copy_(part[torch.arange(len(output)) % len(part)])

    fills = {
        "allreduce": add_up, "reduce": add_up, "all_gather_single": gather, "_allgather_base": gather,
        "all_to_all_single": exchange, "alltoall_base": exchange,
    }  # fmt: skip
    there = {name: of_others(name, fill) for name, fill in fills.items() if hasattr(dist.ProcessGroup, name)}
    with mock.patch.multiple(dist.ProcessGroup, **there):
        yield


def as_one_of_many(_: int, __: int, rank: int, run_dir: str, digits: str) -> dict[str, Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    of_any_backend: Any = dist.new_group  # gloo, for checkpoints, would look for the others
    made = []

    def new_group(*arguments: Any, use_local_synchronization: bool = False, **_: Any) -> Any:
        made.append(use_local_synchronization)
        return of_any_backend(*arguments, use_local_synchronization=use_local_synchronization)

    fake = mock.patch.object(dist, "new_group", new_group)
    same_objects = mock.patch.object(dist, "broadcast_object_list")
    with fake, same_objects, all_ranks_alike():
        trainer = make_trainer(rank, RANKS, tiny_config(Path(run_dir), Path(digits), SETTINGS))
        with counted() as counts:
            report = trainer.train_step()
    topology, model = trainer.topology, trainer.model
    return {
        "groups": [
            dist.get_process_group_ranks(group) for group in (topology.expert_group, topology.expert_data_group)
        ],
        "made": (made.count(True), made.count(False)),
        "losses": report.losses,
        "not finite": report.non_finite,
        "collectives": {of: (count.calls, count.payload) for of, count in counts.items()},
        "experts": [(layer.experts.first, len(layer.experts.w1)) for layer in model.moe_layers],
        "owned": [master.numel() for master in trainer.state.flat["master"]],
    }


@pytest.fixture(scope="module", params=[517, 1023])
def found(request: Any, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("run")
    (result,) = run_ranks(1, as_one_of_many, request.param, str(run_dir), str(digits))
    return {**result, "rank": request.param}


def test_one_of_1024_ranks_takes_a_training_step_whose_collectives_are_those_of_the_plan(found: Any) -> None:
    rank = found["rank"]
    first = rank - rank % EXPERT
    assert found["groups"] == [list(range(first, first + EXPERT)), list(range(rank % EXPERT, RANKS, EXPERT))]
    assert found["experts"] == [(rank % EXPERT, 1)]
    assert found["made"][0] == 4 and found["made"][1] < 4, "none that it is not in"
    assert found["not finite"] == [] and 0 < found["losses"]["loss"] < 100

    plan = make_plan(tiny_config(Path("unused"), Path("unused"), SETTINGS), Cluster(RANKS // 8, 8, H100))
    assert found["owned"] == [group.partition for group in zero_groups(plan.config, RANKS)]
    planned: Counter[tuple[str, int]] = Counter()
    for transfer in plan.transfers:
        planned[transfer.kind, transfer.group_size] += round(transfer.payload)
    rows = ("all-to-all", EXPERT)  # how many rows travel depends on their scores
    assert {of: payload for of, (_, payload) in found["collectives"].items() if of != rows} == {
        of: payload for of, payload in planned.items() if of != rows
    }
    assert ("all-to-all", RANKS) not in planned, "nobody exchanges messages with all ranks"
