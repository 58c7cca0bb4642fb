"""Whole models on the simulated device, training and sampling: nothing that CUDA refuses, and no needless wait."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.recompute import apply_recompute
from tests.accelerator.cases import MOE, config, host_model, inputs, model, train
from tests.accelerator.simulator import Log, on_device, simulate, to_device, values_of
from tests.distributed import run_ranks
from tests.engine.runs import make_trainer, tiny_config

RULES = ["static", "threshold", "count", "constant"]
PREDICTS = [moe for moe in MOE if moe.startswith("global_pool") or moe == "expert_choice predictor"]
RECOMPUTE: list[Literal["none", "mlp", "block"]] = ["none", "mlp", "block"]
TYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("moe", MOE)
def test_a_training_step_of_a_model_asks_nothing_that_cuda_refuses(moe: str, dtype: torch.dtype) -> None:
    log = train(model(config(moe), dtype), *inputs())
    assert log.faults == log.copies == []


@pytest.mark.parametrize("dtype", TYPES)
def test_a_training_step_of_a_model_of_captions_asks_nothing_that_cuda_refuses(dtype: torch.dtype) -> None:
    log = train(model(config("global_pool", captions=True), dtype), *inputs(captions=True))
    assert log.faults == log.copies == log.waits == []


@pytest.mark.parametrize("captions", [False, True])
def test_the_residual_stream_is_contiguous(captions: bool) -> None:
    # Else every norm, projection and gate of every block reads and writes with the stride of a token.
    made = model(config("global_pool", captions=captions), torch.bfloat16)
    given: list[Tensor] = []
    for part in [*made.blocks, made.final_layer]:
        part.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    train(made, *inputs(captions))
    assert len(given) == 3 and all(x.is_contiguous() for x in given)


@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_a_pool_of_more_ranks_than_experts_asks_nothing_that_cuda_refuses(exchange: str) -> None:
    for log in run_ranks(3, train_with_two_experts, exchange):
        assert log.faults == log.copies == []


def train_with_two_experts(rank: int, world_size: int, exchange: Any) -> Log:
    settings = config("global_pool", num_experts=2)
    settings = replace(settings, parallel=replace(settings.parallel, score_exchange=exchange))
    return train(model(settings, torch.bfloat16), *inputs())


def train_on_ranks(rank: int, world_size: int) -> list[Log]:
    sharded = [config(moe, expert=2) for moe in MOE if moe != "dense"]
    return [train(model(settings, dtype), *inputs()) for settings in sharded for dtype in TYPES]


@pytest.mark.slow
def test_a_training_step_with_experts_over_two_ranks_asks_nothing_that_cuda_refuses() -> None:
    for logs in run_ranks(2, train_on_ranks):
        assert [log.faults + log.copies for log in logs] == [[]] * len(logs)


def recompute_on_ranks(rank: int, world_size: int) -> dict[str, list[Log]]:
    """Of experts over both ranks, for each router the logs without and with recomputation."""
    logs: dict[str, list[Log]] = {}
    for moe in ("global_pool", "token_choice", "prototype"):
        made = [model(config(moe, expert=2), torch.bfloat16) for _ in RECOMPUTE]
        for each, mode in zip(made, RECOMPUTE, strict=True):
            apply_recompute(each, mode)
        logs[moe] = [train(each, *inputs()) for each in made]
    return logs


@pytest.mark.slow
def test_recomputation_routes_waits_and_communicates_no_second_time() -> None:
    for of_rank in run_ranks(2, recompute_on_ranks):
        for plain, *recomputed in of_rank.values():
            for log in recomputed:
                assert log.faults == log.copies == [] and len(log.kernels) > len(plain.kernels)
                assert (log.collectives, len(log.waits)) == (plain.collectives, len(plain.waits)), log
                assert choices(log) == choices(plain)


def choices(log: Log) -> int:
    return sum(kernel.op in ("topk", "sort") for kernel in log.kernels)


@torch.no_grad()
def infer(made: DiT) -> Log:
    given = inputs()
    with simulate() as log:
        made.eval()(*given)
    return log


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("moe", PREDICTS)
def test_inference_waits_once_a_layer_and_not_at_all_where_counts_are_known(moe: str, rule: str) -> None:
    constant: dict[str, Any] = {"constant_threshold": 0.4} if rule == "constant" else {}
    log = infer(model(config(moe, inference=rule, **constant), torch.bfloat16))
    assert log.faults == log.copies == []
    assert len(log.waits) == (0 if rule == "static" else 1), log.waits


@pytest.mark.parametrize("moe", [moe for moe in MOE if moe not in PREDICTS])
def test_inference_of_other_routers_waits_as_in_training(moe: str) -> None:
    made = model(config(moe), torch.bfloat16)
    training, log = train(made, *inputs()), infer(made)
    assert log.faults == log.copies == []
    assert len(log.waits) == len(training.waits), log.waits


@pytest.mark.parametrize("moe", ["global_pool", "token_choice", "prototype"])
def test_the_simulated_device_computes_what_the_cpu_does(moe: str) -> None:
    # Else its shapes and counts would be those of another model.
    x, t, y = inputs()
    assert isinstance(y, Tensor)
    with simulate():
        there = model(config(moe), torch.float32)(x, t, y)
    here = host_model(config(moe))(values_of(x), values_of(t), values_of(y))
    torch.testing.assert_close(values_of(there.prediction), here.prediction)
    for name, loss in here.losses.items():
        torch.testing.assert_close(values_of(there.losses[name]), loss)


@pytest.mark.slow
def test_weights_lie_where_grouped_mm_takes_them_in_the_memory_of_a_run(digits: Path, tmp_path: Path) -> None:
    # ZeRO keeps all weights in one buffer, where the last bias of a predictor for four experts, 8 bytes, would move all
    # that follow off the boundary. Experts that every rank has whole take ragged rows of a pool over ranks.
    for log in run_ranks(2, step_in_the_memory_of_a_run, digits, tmp_path / "run"):
        assert "_grouped_mm" in {kernel.op for kernel in log.kernels}
        assert log.faults == []


def step_in_the_memory_of_a_run(rank: int, world_size: int, shards: Path, run_dir: Path) -> Log:
    deeper = {"depth": 4}  # the first mixture's predictor before the second one's experts
    trainer = make_trainer(rank, world_size, tiny_config(run_dir, shards, {"precision": "bf16", "model": deeper}))
    made = to_device(trainer.engine.module)
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.arange(2)
    log = train(made, on_device(x), on_device(t), on_device(y))
    trainer.close()
    return log


def train_with_rows_for_the_first_rank_alone(rank: int, world_size: int) -> tuple[Log, list[float]]:
    made = model(config("token_choice", num_experts=4, expert=2), torch.bfloat16)
    [layer] = made.moe_layers
    values_of(layer.router.get_parameter("gate_weight")).zero_()  # equal scores go to the first expert
    log = train(made, *inputs())
    gradients = [parameter.grad for parameter in layer.experts.parameters()]
    return log, [float(values_of(gradient).abs().max()) for gradient in gradients if gradient is not None]


def test_a_rank_whose_experts_get_no_rows_asks_nothing_that_cuda_refuses() -> None:
    for rank, (log, gradients) in enumerate(run_ranks(2, train_with_rows_for_the_first_rank_alone)):
        assert log.faults == log.copies == []
        assert len(gradients) == 4 and all((gradient > 0) == (rank == 0) for gradient in gradients)
