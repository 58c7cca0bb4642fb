"""What ranks exchange for layers that tensor parallelism cuts, against the plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from benchmarks.collectives import counted
from diffmoe_dist.config import Config, for_world
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.recompute import apply_recompute
from diffmoe_dist.planning.estimate import make_plan
from diffmoe_dist.planning.workload import Cluster
from tests.distributed import run_ranks
from tests.parallel.test_every_router import IMAGES, run_training
from tests.parallel.test_tensor_parallel import filled, make_config, run_text
from tests.planning.plans import H100

RANKS = 2
MODES: tuple[Literal["none", "mlp", "block"], ...] = ("none", "mlp", "block")


def cases() -> Iterator[tuple[str, str, Config]]:
    for name in ("global_pool", "swiglu", "text"):
        for mode in MODES:
            config = make_config(name, tensor=RANKS)
            train = replace(config.train, recompute=mode, global_batch_size=IMAGES)
            parallel = replace(config.parallel, score_exchange="all_to_all")  # so that nothing else is gathered
            yield name, mode, for_world(replace(config, train=train, parallel=parallel), RANKS)


def exchanged(rank: int, world_size: int) -> dict[tuple[str, str], dict[str, tuple[int, int]]]:
    """Of each case, by kind of collective, calls and bytes of a forward and a backward pass."""
    from diffmoe_dist.parallel.expert_parallel import apply_expert_parallel, create_topology
    from diffmoe_dist.parallel.tensor_parallel import apply_tensor_parallel

    topology = create_topology(Launch(rank, world_size, rank, "environment"), torch.device("cpu"), 1, RANKS)
    part = slice(rank * IMAGES // world_size, (rank + 1) * IMAGES // world_size)
    results: dict[Any, Any] = {}
    for name, mode, config in cases():
        model = DiT(config)
        apply_expert_parallel(model, config, topology)
        filled(name, model)
        apply_recompute(model, config.train.recompute)
        apply_tensor_parallel(model, topology)
        with counted() as counts:
            step = run_text if name == "text" else run_training
            step(model.train(), part, world_size)
        kinds = {kind: (count.calls, count.payload) for (kind, _), count in counts.items()}
        results[name, mode] = kinds
    return results


@pytest.fixture(scope="module")
def measured() -> list[dict[tuple[str, str], dict[str, tuple[int, int]]]]:
    return run_ranks(RANKS, exchanged)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode", "config"), list(cases()))
def test_gathers_and_scatters_of_cut_layers_are_those_of_the_plan(
    name: str, mode: str, config: Config, measured: Any
) -> None:
    transfers = make_plan(config, Cluster(1, RANKS, H100)).transfers
    for rank in range(RANKS):
        for kind in ("all-gather", "reduce-scatter"):
            planned = [t for t in transfers if t.kind == kind and t.name.startswith("cut layers")]
            expected = sum(t.calls for t in planned), sum(t.payload for t in planned)
            assert measured[rank][name, mode][kind] == expected, kind
