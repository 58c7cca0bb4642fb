"""What a plan calls exact is what a trainer of a tiny model really holds and sends, on 1, 2 and 4 CPU ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.collectives import counted
from diffmoe_dist.planning.memory import zero_groups
from tests.distributed import run_ranks
from tests.engine.runs import make_trainer, tiny_config
from tests.planning.plans import (
    ACCUMULATED,
    BF16_GRADIENTS,
    BF16_ZERO_2,
    DDPM,
    DENSE,
    EXPERT_CHOICE,
    EXPERTS_ALONE,
    LAST_BLOCK,
    MIXED,
    NO_ATTENTION,
    NO_EXPERTS,
    NO_WEIGHTS,
    PROTOTYPE,
    PROTOTYPE_EXPERT_CHOICE,
    SHARDED,
    TOKEN_CHOICE,
    Case,
    plan_of,
)


def measure(rank: int, world_size: int, run_dir: str, digits: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Of each case what this rank holds after a step, and sends in one, in bytes by kind."""
    sent = _Recorder()
    results = []
    for settings in cases:
        seldom = {"log": {"every": 100}}  # a step that is logged also sums up what the experts did
        trainer = make_trainer(rank, world_size, tiny_config(Path(run_dir), Path(digits), settings, seldom))
        trainer.train_step()
        sent.bytes.clear()
        with counted() as counts:
            trainer.train_step()
        every = {of: count.payload for of, count in counts.items()}
        state = {"persistent": _persistent(trainer), "gradients": _gradients(trainer), "owners": _owners(trainer)}
        results.append({**state, "sent": dict(sent.bytes), "every collective": every})
        trainer.close()
    return results


class _Recorder:
    """Stands between the program and torch.distributed; adds up what this rank hands to each kind of collective."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        import diffmoe_dist.engine.zero as zero
        import diffmoe_dist.parallel.pool as pool

        self._wrap(dist, "all_to_all_single", lambda output, input, *_, **__: (_kind_of_rows(input), input))
        self._wrap(dist, "all_reduce", lambda tensor, **_: (_kind_of_sum(tensor), tensor))
        self._wrap(dist, "reduce", lambda tensor, **_: ("gradients", tensor))
        self._wrap(zero, "all_gather", lambda output, input, group: ("parameters", output))
        self._wrap(pool, "all_gather", lambda output, input, group: ("scores", output))

    def _wrap(self, module: ModuleType, name: str, describe: Any) -> None:
        original = getattr(module, name)

        def recorded(*args: Any, **options: Any) -> Any:
            kind, tensor = describe(*args, **options)
            alone = dist.get_world_size(options.get("group")) == 1
            if not alone:
                self.bytes[kind] = self.bytes.get(kind, 0) + _bytes(tensor)
            return original(*args, **options)

        setattr(module, name, recorded)


def _kind_of_rows(tensor: Tensor) -> str:
    if tensor.dtype == torch.int64:
        return "row counts"
    return "rows" if tensor.ndim == 2 else "scores"


def _kind_of_sum(tensor: Tensor) -> str:
    if tensor.dtype == torch.float64:
        return "report"
    assert tensor.dtype == torch.int64 or tensor.ndim == 2, "nothing else is summed"
    return "sums of the batch"


def _persistent(trainer: Any) -> dict[str, int]:
    zero, state = trainer.engine.optimizer, trainer.state
    flats = {flat.untyped_storage().data_ptr() for flat in zero.bit16_groups_flat}
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    views = {parameter.untyped_storage().data_ptr() for parameter in trained}
    assert views == flats, "what trains is views of ZeRO's flat groups, and nothing beside them"
    adamw = [tensor for values in state.adamw.state.values() for tensor in values.values()]
    masters = [group["params"][0] for group in state.adamw.param_groups]
    return {
        "weights": sum(map(_bytes, zero.bit16_groups_flat)),
        "fp32 master weights": sum(_bytes(m) for m in masters if m.untyped_storage().data_ptr() not in flats),
        "AdamW moments": sum(map(_bytes, adamw)),
        "EMA": sum(_bytes(flat) for kind, flats in state.flat.items() for flat in flats if kind.startswith("ema")),
        "buffers": sum(map(_bytes, trainer.model.buffers())),
        **_frozen(trainer),
    }


def _frozen(trainer: Any) -> dict[str, int]:
    frozen = [parameter for parameter in trainer.model.parameters() if not parameter.requires_grad]
    places = {parameter.untyped_storage().data_ptr() for parameter in frozen}
    exact = [part.exact for part in trainer.state.frozen.parts if part.exact.untyped_storage().data_ptr() not in places]
    kinds = {"frozen weights": sum(map(_bytes, frozen)), "fp32 frozen weights": sum(map(_bytes, exact))}
    return kinds if frozen else {}


def _gradients(trainer: Any) -> int:
    kept = [chunk for chunk in trainer.engine.optimizer.chunks if chunk.reduced is not None]
    return len(kept) + sum(parameter.grad is not None for parameter in trainer.model.parameters())


def _owners(trainer: Any) -> dict[int, list[int]]:
    """Of each group of parameters, the ranks to which its chunks are reduced, in that order."""
    owners: dict[int, list[int]] = {}
    for chunk in trainer.engine.optimizer._reductions:
        owners.setdefault(chunk.group, []).append(chunk.owner)
    return owners


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


ON_RANKS: dict[int, dict[str, Case]] = {
    1: {"dense": DENSE, "global pool": {}, "bf16": {"precision": "bf16"}, "mixed": MIXED},
    2: {
        "dense": DENSE,
        "global pool": {},
        "sharded": SHARDED,
        "bf16, ZeRO 2": BF16_ZERO_2,
        "bf16, ZeRO 2, accumulated": {**BF16_ZERO_2, **ACCUMULATED},
        "mixed": {**MIXED, **SHARDED},
        "mixed, prototype, accumulated": {**MIXED, **PROTOTYPE, "train": {"label_dropout": 0.0, "micro_batch_size": 4}},
        "DDPM": DDPM,
        "averages": {"ema": {"decays": [0.99], "lengths": [0.1]}},
        "accumulated": {**SHARDED, **ACCUMULATED},
        "gradients in bf16": BF16_GRADIENTS,
        "cut": {"parallel": {"tensor": 2}},
        "cut and sharded, bf16": {"precision": "bf16", "parallel": {"tensor": 2, "expert": 2, "zero_stage": 2}},
        "scores gathered": {"parallel": {"expert": 2, "score_exchange": "all_gather"}},
        "scores to their owners": {"parallel": {"expert": 2, "score_exchange": "all_to_all"}},
        "pool of a rank": {"moe": {"pool": "rank", "capacity": 0.8}, **SHARDED},
        "expert choice": EXPERT_CHOICE,
        "token choice": TOKEN_CHOICE,
        "prototype": PROTOTYPE,
        "prototype, expert choice": PROTOTYPE_EXPERT_CHOICE,
        "frozen, bf16, ZeRO 2": {**BF16_ZERO_2, **NO_ATTENTION},
        "frozen experts": {**SHARDED, **NO_EXPERTS},
        "frozen up to the last block": {**SHARDED, **LAST_BLOCK},
        "frozen weights, cut": {"parallel": {"tensor": 2}, **NO_WEIGHTS},
        "frozen up to the last block, cut": {"parallel": {"tensor": 2}, **LAST_BLOCK},
    },
    4: {
        "two groups, one pool": SHARDED,
        "two groups, two levels": {"parallel": {"expert": 2, "score_exchange": "two_level"}},
        "two groups, two pools": {"moe": {"pool": "expert_parallel"}, **SHARDED},
        "cut over two, sharded over four": {"parallel": {"tensor": 2, "expert": 4}},
        "experts alone": {**SHARDED, **EXPERTS_ALONE},
    },
}
CASES = [(ranks, name) for ranks, cases in ON_RANKS.items() for name in cases]


@pytest.fixture(scope="module")
def measured(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """By number of ranks and case: what each rank measured."""
    found = {}
    for ranks, cases in ON_RANKS.items():
        run_dir = tmp_path_factory.mktemp("run")
        by_rank = run_ranks(ranks, measure, str(run_dir), str(digits), list(cases.values()), time_limit=300)
        for place, name in enumerate(cases):
            found[ranks, name] = [results[place] for results in by_rank]
    return found


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_the_planned_memory_is_what_every_rank_holds(ranks: int, name: str, measured: Any) -> None:
    planned = plan_of(ON_RANKS[ranks][name], ranks).persistent
    for result in measured[ranks, name]:
        assert result["persistent"] == planned
        assert result["gradients"] == 0, "none outlives its step"


GROUPS = ("all", "dense", "experts", "slices", "experts and slices")
PLANNED = {
    "rows": ("tokens to experts and back", "their gradients"),
    "row counts": ("row counts",),
    "scores": ("scores and cutoffs", "scores", "scores of the groups"),
    "sums of the batch": ("sums of the batch",),
    "report": ("losses, thresholds, load",),
    "gradients": tuple(f"gradients, {group}" for group in GROUPS),
    "parameters": tuple(f"parameters, {group}" for group in GROUPS),
}


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_the_planned_bytes_are_what_the_ranks_send(ranks: int, name: str, measured: Any) -> None:
    payloads = {transfer.name: transfer.payload for transfer in plan_of(ON_RANKS[ranks][name], ranks).transfers}
    planned = {kind: sum(payloads.pop(name, 0) for name in names) for kind, names in PLANNED.items()}
    # A pool that spans ranks takes more rows from one rank and fewer from another; a plan says the mean.
    sent = [result["sent"] for result in measured[ranks, name]]
    assert {kind: sum(by_kind.get(kind, 0) for by_kind in sent) / ranks for kind in PLANNED} == planned
    payloads = {name: bytes for name, bytes in payloads.items() if not name.startswith("cut layers")}  # test_cut_layers
    assert payloads == {}, "nothing planned was left out of the comparison"


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_every_collective_of_a_step_is_planned_whoever_calls_it(ranks: int, name: str, measured: Any) -> None:
    """By kind and ranks of the group, counted where torch hands it to the process group; the mean over the ranks."""
    planned: Counter[tuple[str, int]] = Counter()
    for transfer in plan_of(ON_RANKS[ranks][name], ranks).transfers:
        planned[transfer.kind, transfer.group_size] += transfer.payload  # type: ignore[assignment]
    sent: Counter[tuple[str, int]] = Counter()
    for result in measured[ranks, name]:
        sent.update(result["every collective"])
    assert {of: total / ranks for of, total in sent.items()} == planned


def test_every_kind_of_bytes_is_sent_in_some_case(measured: Any) -> None:
    sent = {kind for results in measured.values() for kind in results[0]["sent"]}
    assert sent == set(PLANNED)


@pytest.mark.parametrize(("ranks", "name"), [(2, "sharded"), (4, "two groups, one pool"), (2, "gradients in bf16")])
def test_gradients_go_to_their_owners_alone(ranks: int, name: str, measured: Any) -> None:
    sent = sum(result["sent"]["gradients"] for result in measured[ranks, name]) / ranks
    groups = zero_groups(plan_of(ON_RANKS[ranks][name], ranks).config, ranks)
    each = 2 if "bf16" in name else 4
    # What a group of n ranks reduces, each of them must send, but for the nth part that is its own.
    assert sent == sum(each * group.elements for group in groups if group.ranks > 1)
    transfers = plan_of(ON_RANKS[ranks][name], ranks).transfers
    least = sum(each * group.elements * (group.ranks - 1) / group.ranks for group in groups)
    assert sum(t.sent for t in transfers if t.name.startswith("gradients")) <= 1.02 * least


def test_reductions_go_to_one_rank_after_the_other_in_the_order_of_the_ring(measured: Any) -> None:
    """In the other order NCCL would begin each one only when the one before has been around all ranks."""
    lists = [owners for results in measured.values() for owners in results[0]["owners"].values()]
    assert all(owners == sorted(owners) for owners in lists)
    assert max(map(len, lists)) >= 4, "four ranks own chunks"


def test_memory_that_is_not_there_does_not_fit() -> None:
    settings = {"model": {"hidden_size": 1024, "num_heads": 16, "input_size": 64}, "train": {"global_batch_size": 4096}}
    assert plan_of({}, 1).fits
    assert not plan_of(settings, 1).fits
