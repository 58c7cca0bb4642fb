"""What a plan calls exact is what a trainer of a tiny model really holds and sends, on 1, 2 and 4 CPU ranks."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from diffmoe_dist.config import check_world
from diffmoe_dist.model.accounting import account
from diffmoe_dist.model.condition import Condition, TextCondition
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.planning.accelerators import ACCELERATORS, device_peak
from diffmoe_dist.planning.planning import (
    Cluster,
    Plan,
    Transfer,
    achieved_share,
    activation_bytes,
    held_bytes,
    make_plan,
    workload,
)
from tests.distributed import run_ranks
from tests.engine.runs import make_trainer, tiny_config

H100 = ACCELERATORS["H100-80"]
SHARDED = {"parallel": {"expert": 2}}
ACCUMULATED = {"train": {"micro_batch_size": 4}}
BF16_ZERO_2 = {"precision": "bf16", "parallel": {"zero_stage": 2, "expert": 2}}
DENSE = {"moe": {"router": "dense", "num_experts": None}}
EXPERT_CHOICE = {"moe": {"router": "expert_choice"}, **SHARDED}
TOKEN_CHOICE = {"moe": {"router": "token_choice", "top_k": 2}, **SHARDED}
# Without dropped labels the number of images without a condition is known, else it is an expectation.
PROTOTYPE = {"moe": {"router": "prototype"}, "train": {"label_dropout": 0.0}, **SHARDED}
PROTOTYPE_EXPERT_CHOICE = {**PROTOTYPE, "moe": {"router": "prototype", "variant": "expert_choice"}}

FLOWLESS = {"time_distribution": None, "time_scale": None}
DDPM = {"objective": {"name": "ddpm", **FLOWLESS}, "model": {"learn_sigma": True}}

Case = dict[str, Any]


def plan_of(settings: Case, ranks: int, gpus_per_node: int | None = None, capacity: float | None = None) -> Plan:
    gpus = gpus_per_node or ranks
    config = tiny_config(Path("unused"), Path("unused"), settings)
    return make_plan(config, Cluster(ranks // gpus, gpus, H100), capacity)


# What trainers really hold and send


def measure(rank: int, world_size: int, run_dir: str, digits: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Of each case what this rank holds after a step, and sends in one, in bytes by kind."""
    sent = _Recorder()
    results = []
    for settings in cases:
        trainer = make_trainer(rank, world_size, tiny_config(Path(run_dir), Path(digits), settings))
        trainer.train_step()
        sent.bytes.clear()
        trainer.train_step()
        results.append({"held": _held(trainer), "sent": dict(sent.bytes), "gradients": _gradients(trainer)})
        trainer.close()
    return results


class _Recorder:
    """Stands between the program and torch.distributed; adds up what this rank hands to each kind of collective."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        import diffmoe_dist.parallel.pool as pool

        self._wrap(dist, "all_to_all_single", lambda output, input, *_, **__: (_kind_of_rows(input), input))
        self._wrap(dist, "all_reduce", lambda tensor, **_: (_kind_of_sum(tensor), tensor))
        self._wrap(dist, "all_gather_into_tensor", lambda output_tensor, **_: ("parameters", output_tensor))
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
    if tensor.dtype == torch.int64 or tensor.ndim == 2:
        return "sums of the batch"
    return "gradients" if tensor.ndim == 1 and tensor.dtype == torch.float32 else "norm and overflow"


def _held(trainer: Any) -> dict[str, int]:
    zero, state = trainer.engine.optimizer, trainer.state
    flats = {flat.untyped_storage().data_ptr() for flat in zero.bit16_groups_flat}
    views = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    assert views == flats, "the model's parameters are views of ZeRO's flat groups, and nothing beside them"
    adamw = [tensor for values in state.adamw.state.values() for tensor in values.values()]
    masters = [group["params"][0] for group in state.adamw.param_groups]
    return {
        "weights": sum(map(_bytes, zero.bit16_groups_flat)),
        "fp32 master weights": sum(map(_bytes, masters)),
        "AdamW moments": sum(map(_bytes, adamw)),
        "EMA": sum(map(_bytes, state.flat["ema"])),
        "buffers": sum(map(_bytes, trainer.model.buffers())),
    }


def _gradients(trainer: Any) -> int:
    zero = trainer.engine.optimizer
    kept = [zero.averaged_gradients[group] for group in zero.averaged_gradients]
    left = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    return len(left) + sum(value is not None for value in kept)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


ON_RANKS: dict[int, dict[str, Case]] = {
    1: {"dense": DENSE, "global pool": {}, "bf16": {"precision": "bf16"}},
    2: {
        "dense": DENSE,
        "global pool": {},
        "sharded": SHARDED,
        "bf16, ZeRO 2": BF16_ZERO_2,
        "bf16, ZeRO 2, accumulated": {**BF16_ZERO_2, **ACCUMULATED},
        "DDPM": DDPM,
        "accumulated": {**SHARDED, **ACCUMULATED},
        "scores gathered": {"parallel": {"expert": 2, "score_exchange": "all_gather"}},
        "pool of a rank": {"moe": {"pool": "rank", "capacity": 0.8}, **SHARDED},
        "expert choice": EXPERT_CHOICE,
        "token choice": TOKEN_CHOICE,
        "prototype": PROTOTYPE,
        "prototype, expert choice": PROTOTYPE_EXPERT_CHOICE,
    },
    4: {"two groups, one pool": SHARDED, "two groups, two pools": {"moe": {"pool": "expert_parallel"}, **SHARDED}},
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
    planned = plan_of(ON_RANKS[ranks][name], ranks).held
    for result in measured[ranks, name]:
        assert result["held"] == planned
        assert result["gradients"] == 0, "none outlives its step"


PLANNED = {
    "rows": ("tokens to experts and back", "their gradients"),
    "row counts": ("row counts",),
    "scores": ("scores and cutoffs", "scores"),
    "sums of the batch": ("sums of the batch",),
    "report": ("losses, thresholds, load",),
    "gradients": ("gradients, all", "gradients, dense", "gradients, experts"),
    "parameters": ("parameters, all", "parameters, dense", "parameters, experts"),
}


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_the_planned_bytes_are_what_the_ranks_send(ranks: int, name: str, measured: Any) -> None:
    payloads = {transfer.name: transfer.payload for transfer in plan_of(ON_RANKS[ranks][name], ranks).transfers}
    planned = {kind: sum(payloads.pop(name, 0) for name in names) for kind, names in PLANNED.items()}
    # A pool that spans ranks takes more rows from one rank and fewer from another; a plan says the mean.
    sent = [result["sent"] for result in measured[ranks, name]]
    assert {kind: sum(by_kind.get(kind, 0) for by_kind in sent) / ranks for kind in PLANNED} == planned
    assert payloads == {}, "nothing planned was left out of the comparison"


def test_every_kind_of_bytes_is_sent_in_some_case(measured: Any) -> None:
    sent = {kind for results in measured.values() for kind in results[0]["sent"]}
    assert sent == {*PLANNED, "norm and overflow"}


# Estimates


TEXT = {
    "model": {
        "condition": "text", "num_classes": 0, "text_hidden_size": 32, "text_max_length": 16, "text_pooled_size": 24
    },
    "data": {"text": "unused"},
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        DENSE, {}, {"moe": {"router": "token_choice"}}, {"moe": {"router": "prototype"}},
        {"moe": {"router": "token_choice", "activation": "swiglu", "shared_experts": 1}}, {"precision": "bf16"},
        TEXT, {**TEXT, "precision": "bf16"},
    ],
    ids=["dense", "global pool", "token choice", "prototype", "swiglu", "bf16", "text", "text in bf16"],
)  # fmt: skip
def test_the_estimate_of_activations_is_near_what_autograd_keeps(settings: Case) -> None:
    shape = {"model": {"depth": 4, "hidden_size": 64, "num_heads": 4, "input_size": 16, "in_channels": 1}}
    config = tiny_config(Path("unused"), Path("unused"), settings, shape)
    check_world(config, 1)
    images = config.train.global_batch_size
    work = workload(config, 1)
    model = DiT(config)
    initialize(model, 0)
    if config.precision == "bf16":
        model.bfloat16()
    labels = torch.zeros(images, dtype=torch.int64)
    labels[: round(images * config.train.label_dropout)] = 10  # the null label
    told: Condition = labels
    if config.model.condition == "text":
        mask = torch.arange(16) < torch.randint(1, 17, (images, 1))
        told = TextCondition(torch.randn(images, 16, 32).half(), mask, torch.randn(images, 24).half(), labels == 10)
    kept = _saved_bytes(model, torch.randn(images, 1, 16, 16), torch.rand(images), told)
    assert activation_bytes(config, work) == pytest.approx(kept, rel=0.03)


def _saved_bytes(model: DiT, *inputs: Any) -> int:
    storages: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # which keeps the storage, so that its address stays its own

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    del output
    return sum(storages.values())


# By hand


def rows_of(plan: Plan) -> Transfer:
    return next(transfer for transfer in plan.transfers if transfer.name == "tokens to experts and back")


def test_bytes_inside_and_across_nodes_follow_from_consecutive_ranks() -> None:
    one_node, two_nodes = (plan_of({"parallel": {"expert": 4}}, 4, gpus) for gpus in (4, 2))
    # A row in four stays on its rank. Of the other three ranks, one is on the same node of two.
    payload = rows_of(one_node).payload
    assert (rows_of(one_node).inside, rows_of(one_node).across) == (payload * 3 / 4, 0)
    assert (rows_of(two_nodes).inside, rows_of(two_nodes).across) == (payload / 4, payload / 2)
    # Groups of two consecutive ranks stay within nodes of two.
    assert rows_of(plan_of({"parallel": {"expert": 2}}, 4, 2)).across == 0


def test_a_ring_crosses_nodes_once_each_and_expert_data_groups_at_every_edge() -> None:
    transfers = {t.name: t for t in plan_of({"parallel": {"expert": 2}}, 4, 2).transfers}
    dense, experts = transfers["gradients, dense"], transfers["gradients, experts"]
    # An all-reduce of b bytes over 4 ranks sends 2 * 3/4 b of each; 2 of the 4 edges of ring 0 1 2 3 leave a node.
    assert dense.wire == pytest.approx(1.5 * dense.payload)
    assert dense.across == pytest.approx(dense.wire / 2)
    # The groups 0 2 and 1 3 have a rank on either node.
    assert (experts.wire, experts.inside) == (experts.payload, 0)


def test_without_sharded_experts_no_row_travels() -> None:
    assert not any(transfer.kind == "all-to-all" for transfer in plan_of({"moe": {"pool": "rank"}}, 2).transfers)
    assert plan_of({}, 1).transfers == []


def test_a_measured_capacity_takes_the_settings_place() -> None:
    one, two = (plan_of(SHARDED, 2, capacity=capacity) for capacity in (1.0, 2.0))
    assert rows_of(two).payload == 2 * rows_of(one).payload
    assert (one.work.capacity, two.work.capacity) == (1.0, 2.0)
    assert plan_of({"moe": {"capacity": 0.3}}, 2).work.capacity == 4 * 19 / 256, "int(256 / 4 * 0.3) slots an expert"


def test_images_without_a_condition_count_as_visits_and_do_not_travel() -> None:
    settings = {**PROTOTYPE, "train": {"label_dropout": 0.25}}
    work = plan_of(settings, 2).work
    assert (work.tokens, work.assignments, work.unconditional, work.capacity) == (128, 96, 32, 1.0)


def test_a_slower_network_is_what_bounds_groups_that_span_nodes() -> None:
    settings = {"model": {"hidden_size": 512, "num_heads": 8}, "precision": "bf16", "parallel": {"expert": 4}}
    assert plan_of(settings, 4, 1).bound_by == "wire"
    assert plan_of(settings, 4, 1).step_seconds > plan_of(settings, 4, 4).step_seconds
    big = {
        "model": {"depth": 8, "hidden_size": 1024, "num_heads": 16, "input_size": 32},
        "moe": {"pool": "rank"}, "train": {"global_batch_size": 256},
    }  # fmt: skip
    assert plan_of(big, 1).bound_by == "compute"


def test_memory_that_is_not_there_does_not_fit() -> None:
    settings = {"model": {"hidden_size": 1024, "num_heads": 16, "input_size": 64}, "train": {"global_batch_size": 4096}}
    assert plan_of({}, 1).fits and not plan_of(settings, 1).fits


def test_held_memory_shrinks_with_the_ranks_but_for_the_weights() -> None:
    config = tiny_config(Path("unused"), Path("unused"))
    one, four = held_bytes(config, 1), held_bytes(config, 4)
    assert four["weights"] == one["weights"]
    # DeepSpeed pads to two elements a rank.
    assert four["EMA"] * 4 - one["EMA"] in range(0, 2 * 4 * 4)


# Model FLOP utilisation


def test_utilisation_is_the_arithmetic_of_the_model_over_the_devices() -> None:
    # 3 TFLOP an image, 10 images a second, on 2 devices that do 100 TFLOP/s at most.
    assert achieved_share(3e12, 10, ranks=2, peak=100e12) == 0.15


def test_training_takes_three_times_a_forward_pass() -> None:
    counts = account(tiny_config(Path("unused"), Path("unused")))
    assert counts.training_flops(1.5) == 6 * (sum(counts.macs(1.5).values()) + counts.attention_macs)


def test_the_peak_is_that_of_the_device_by_its_exact_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(Path("unused"), Path("unused"), {"precision": "bf16"})
    assert device_peak(torch.device("cpu"), config) is None
    expected = {
        "NVIDIA H200": 989e12, "NVIDIA A800-SXM4-80GB": 312e12,
        # Other boards: GH200 and H100 PCIe have H200 and H100 in their names.
        "NVIDIA GH200 480GB": None, "NVIDIA H100 PCIe": None,
    }  # fmt: skip
    for name, peak in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device_peak(torch.device("cuda"), config) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    config.precision = "fp32"
    assert device_peak(torch.device("cuda"), config) == 67e12, "TF32 is off"
    config.tf32 = True
    assert device_peak(torch.device("cuda"), config) == 494e12


def log_with_a_known_peak(rank: int, world_size: int, run_dir: str, digits: str) -> list[dict[str, Any]]:
    """A trainer whose device has a peak of 1 GFLOP/s; the first lacks one."""
    lines = []
    for settings in ({}, DENSE):
        trainer = make_trainer(rank, world_size, tiny_config(Path(run_dir), Path(digits), settings))
        for trainer.device_peak in (None, 1e9):
            with trainer.timer:
                report = trainer.train_step()
            lines.append(trainer._metrics(report))
        trainer.close()
    return lines


def test_a_run_logs_its_utilisation_where_the_peak_is_known(digits: Path, tmp_path: Path) -> None:
    (lines,) = run_ranks(1, log_with_a_known_peak, str(tmp_path), str(digits))
    for unknown, known, settings in ((*lines[:2], {}), (*lines[2:], DENSE)):
        assert "mfu" not in unknown
        counts = account(tiny_config(Path("unused"), Path("unused"), settings))
        flops = counts.training_flops(known["capacity"] or 0.0) * known["images_per_second"]
        assert known["mfu"] == pytest.approx(flops / 1e9, rel=1e-12)
