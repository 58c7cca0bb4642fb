"""From gradients to new weights: where parameters lie, how often each byte is touched, what goes over the wire."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_dist.config import load_config
from diffmoe_dist.launch import Launch
from diffmoe_dist.planning.memory import zero_groups
from diffmoe_dist.planning.step_time import state_traffic
from tests.distributed import run_ranks
from tests.engine.runs import curve, make_trainer, tiny_config, train_all

CONFIGS = sorted(Path("configs").rglob("*.yaml"))
BF16 = {"precision": "bf16"}
EP2 = {"parallel": {"expert": 2}}
ZERO2_ACCUMULATED = {"train": {"micro_batch_size": 4, "steps": 6}, "parallel": {"zero_stage": 2}}
BF16_WIRE = {"parallel": {"gradient_dtype": "bf16"}, "train": {"steps": 40}}
# Without clipping, which writes the gradients once more.
PLAIN: dict[str, Any] = {"optim": {"clip_grad_norm": 0.0}, "train": {"steps": 6}}


class TouchedBytes(TorchDispatchMode):
    """Adds up the bytes of the operands that each operation reads and writes, collectives and views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "detach" or func.is_view or "c10d" in func.namespace or name.startswith(("empty", "new_empty")):
            return result
        overwrites = "copy" in name
        for position, argument in enumerate(func._schema.arguments):
            value = kwargs.get(argument.name, args[position] if position < len(args) else None)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if argument.name == "grads":
                written = kwargs.get("grad_scale") is not None  # AdamW's schema says so always
            self.by_operation[name] += _bytes(value) * (2 if written and not overwrites else 1)
        if not func._schema.name.endswith("_"):
            self.by_operation[name] += _bytes(result)
        return result


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def count_bytes(rank: int, world_size: int, shards: Path, run_dir: Path, settings: dict[str, Any]) -> dict[str, int]:
    """What a step touches between its last backward pass and the next forward pass."""
    trainer = make_trainer(rank, world_size, tiny_config(run_dir, shards, PLAIN, settings))
    touched = TouchedBytes()

    def count_in(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            with touched:
                return function(*arguments)

        setattr(owner, name, counted)

    count_in(trainer.engine.optimizer, "_reduce_next")
    count_in(trainer.engine.optimizer, "_receive")
    count_in(trainer.state, "gradient_squares")
    count_in(trainer.engine, "step")
    count_in(trainer.averages, "update")
    trainer.train_step()
    trainer.close()
    return dict(touched.by_operation)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("settings", [{}, BF16, {"parallel": {"gradient_dtype": "bf16"}}], ids=["fp32", "bf16", "wire"])
def test_a_step_touches_the_planned_bytes_of_gradients_weights_and_state_and_at_most_54_of_a_parameter(
    ranks: int, settings: dict[str, Any], tmp_path: Path, digits: Path
) -> None:
    found = run_ranks(ranks, count_bytes, digits, tmp_path / "run", settings)
    config = tiny_config(tmp_path, digits, PLAIN, settings)
    mean = sum(sum(by_operation.values()) for by_operation in found) / ranks
    assert mean == pytest.approx(sum(state_traffic(config, ranks, kernels=False).values()), rel=0.02), found
    [group] = zero_groups(config, ranks)
    assert mean / group.elements < 54.5


def experts_of_configs(rank: int, world_size: int, folder: Path, paths: list[Path]) -> dict[str, list[int]]:
    """Of each configuration, at a width and depth that build fast: where in memory each stack of experts begins."""
    from diffmoe_dist.config import for_world
    from diffmoe_dist.engine.build import _build_engine
    from diffmoe_dist.parallel.expert_parallel import create_topology

    cpu = torch.device("cpu")
    addresses = {}
    for path in paths:
        changes = ["precision=bf16", "model.size=null", "model.depth=4", "model.hidden_size=24", "model.num_heads=2"]
        changes += [f"run_dir={folder}", "data.shards=unused", f"parallel.expert={world_size}"]
        changes += [f"parallel.tensor={min(world_size, load_config(path, changes).parallel.tensor)}"]
        config = for_world(load_config(path, [*changes, f"train.global_batch_size={world_size}"]), world_size)
        topology = create_topology(
            Launch(rank, world_size, rank, "environment"), cpu, config.parallel.expert, config.parallel.tensor
        )
        engine, _ = _build_engine(config, topology)
        experts = {name: p for name, p in engine.module.named_parameters() if ".experts.w" in name}
        addresses[str(path)] = [parameter.data_ptr() for parameter in experts.values()]
    return addresses


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stack_of_experts_in_every_shipped_configuration_begins_at_16_bytes_in_bf16(
    ranks: int, tmp_path: Path
) -> None:
    paths = [path.resolve() for path in CONFIGS if load_config(path, ["data.shards=unused"]).experts is not None]
    for found in run_ranks(ranks, experts_of_configs, tmp_path, paths):
        assert len(found) == len(paths) > 20
        for path, addresses in found.items():
            assert addresses and not any(address % 16 for address in addresses), path


def test_gaps_before_parameters_are_in_no_checkpoint(tmp_path: Path, digits: Path) -> None:
    # Three experts have biases of three numbers.
    odd = {"model": {"hidden_size": 24}, "moe": {"num_experts": 3}, "precision": "bf16"}
    run_ranks(2, train_all, digits, [(tmp_path / "two", {**odd, "train": {"steps": 5}})])
    for name in ("one", "straight"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
    goes_on = {**odd, "train": {"steps": 10}}
    run_ranks(1, train_all, digits, [(tmp_path / "one", goes_on)])
    run_ranks(2, train_all, digits, [(tmp_path / "straight", goes_on)])
    assert curve(tmp_path / "one") == pytest.approx(curve(tmp_path / "straight"), rel=1e-3)


def train_in_chunks(rank: int, world_size: int, elements: int, shards: Path, jobs: list[tuple[Path, Any]]) -> None:
    from diffmoe_dist.engine import build

    build.REDUCTION_CHUNK = elements  # type: ignore[attr-defined]
    train_all(rank, world_size, shards, jobs)


@pytest.mark.parametrize("settings", [{}, EP2, ZERO2_ACCUMULATED], ids=["whole experts", "sharded", "ZeRO 2"])
def test_gradients_reduced_in_many_chunks_train_as_in_one(settings: Any, tmp_path: Path, digits: Path) -> None:
    for name, elements in {"one": 2**25, "many": 777}.items():
        job = {**PLAIN, **settings}
        run_ranks(2, train_in_chunks, elements, digits, [(tmp_path / name, job)])
    assert curve(tmp_path / "many") == curve(tmp_path / "one")


def test_bf16_gradients_on_the_wire_leave_the_curve_near_that_of_fp32(tmp_path: Path, digits: Path) -> None:
    fp32 = {"train": {"steps": 40}}
    run_ranks(2, train_all, digits, [(tmp_path / "bf16", BF16_WIRE), (tmp_path / "fp32", fp32)])
    exact, rounded = curve(tmp_path / "fp32"), curve(tmp_path / "bf16")
    assert rounded != exact, "something is rounded"
    assert rounded == pytest.approx(exact, rel=5e-3)
    norms = [curve(tmp_path / name, "grad_norm") for name in ("bf16", "fp32")]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=2e-3)
