"""`train.recompute`: less memory, and the same run, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from diffmoe_dist.config import build_config
from tests.distributed import run_ranks
from tests.engine.captions import save_captioned, text_settings
from tests.engine.runs import TINY, curve, make_trainer, metrics, tiny_config, train_all, train_one
from tests.engine.test_non_finite import train_poisoned
from tests.planning.plans import DDPM, DENSE, Case

pytestmark = pytest.mark.slow

MODES = ("none", "mlp", "block")
ROUTERS: dict[str, Case] = {
    "global_pool": {},
    "global_pool_swiglu": {"moe": {"activation": "swiglu", "shared_experts": 1}},
    "token_choice": {"moe": {"router": "token_choice", "balance_loss_weight": 0.01}},
    "expert_choice": {"moe": {"router": "expert_choice"}},
    "expert_choice_dynamic": {"moe": {"router": "expert_choice", "capacity_predictor": True, "inference": "count"}},
    "prototype": {"moe": {"router": "prototype"}},
    "prototype_expert_choice": {"moe": {"router": "prototype", "variant": "expert_choice"}},
    "ddpm": DDPM,
    "accumulated": {"train": {"micro_batch_size": 4}},
    "bf16": {"precision": "bf16", "parallel": {"zero_stage": 2}},
    "bf16_mixed": {"precision": "bf16_mixed"},
}
CAPTIONS = ("captions", "captions_prototype")
# On two ranks, what their exchange of tokens and gradients may change.
SPREAD = ("global_pool", "token_choice", "expert_choice_dynamic", "prototype", "accumulated", "bf16", "captions")
# The high learning rate brings adaLN's gates away from zero, so that gradients reach the experts.
STEPS = 4
COMMON: Case = {"train": {"steps": STEPS}, "optim": {"lr": 1e-2}}


def both(*layers: Case) -> Case:
    merged: Case = {}
    for layer in layers:
        for key, value in layer.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def mode(recompute: str) -> Case:
    return {"train": {"recompute": recompute}}


def names_on(ranks: int) -> tuple[str, ...]:
    return (*ROUTERS, *CAPTIONS, "dense") if ranks == 1 else SPREAD


def train_with_every_mode(rank: int, world_size: int, folder: Path, shards: Path) -> list[tuple[int, int]]:
    """Returns how often routers and collectives were called in a step of the global pool, with each mode."""
    calls = []
    for name, settings in {**ROUTERS, "dense": DENSE}.items():
        if name not in names_on(world_size):
            continue
        spread: Case = {"parallel": {"expert": world_size}}
        for recompute in MODES:
            layers = both(settings, COMMON, spread, mode(recompute))
            train_one(rank, world_size, tiny_config(folder / f"{name}-{world_size}-{recompute}", shards, layers))
    for name in (name for name in CAPTIONS if name in names_on(world_size)):
        router: Case = {"moe": {"router": "prototype", "inference": None}} if "prototype" in name else {}
        for recompute in MODES:
            run = text_settings(folder, f"{name}-{world_size}-{recompute}")
            layers = both(run, router, COMMON, {"parallel": {"expert": world_size}}, mode(recompute))
            train_one(rank, world_size, build_config(TINY, layers))
    for recompute in MODES:
        layers = both(COMMON, {"parallel": {"expert": world_size}}, mode(recompute))
        calls.append(count_calls(rank, world_size, tiny_config(folder / f"calls-{recompute}", shards, layers)))
    return calls


def count_calls(rank: int, world_size: int, config: Any) -> tuple[int, int]:
    trainer = make_trainer(rank, world_size, config)
    trainer.train_step()
    routed = exchanged = 0

    def count_router(*_: Any) -> None:
        nonlocal routed
        routed += 1

    original = dist.all_to_all_single

    def exchange(*args: Any, **options: Any) -> Any:
        nonlocal exchanged
        exchanged += 1
        return original(*args, **options)

    for layer in trainer.model.moe_layers:
        layer.router.register_forward_hook(count_router)
    dist.all_to_all_single = exchange
    trainer.train_step()
    dist.all_to_all_single = original
    trainer.close()
    return routed, exchanged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioned(tmp_path_factory.mktemp("recompute"))


@pytest.fixture(scope="module")
def calls(folder: Path, digits: Path) -> dict[int, list[tuple[int, int]]]:
    return {ranks: run_ranks(ranks, train_with_every_mode, folder, digits, time_limit=300.0)[0] for ranks in (1, 2)}


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for ranks in (1, 2) for name in names_on(ranks)])
def test_a_run_that_computes_activations_again_has_the_same_bits(
    calls: object, folder: Path, name: str, ranks: int, recompute: str
) -> None:
    once, again = (metrics(folder / f"{name}-{ranks}-{kind}") for kind in ("none", recompute))
    names = {key for key in once[0] if key.startswith(("loss", "grad_norm", "capacity", "expert_load"))}
    assert len(once) == len(again) == STEPS and names >= {"loss", "grad_norm"}
    for key in names:
        assert [line[key] for line in again] == [line[key] for line in once], key


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_router_and_no_exchange_of_tokens_is_done_twice(calls: dict[int, list[tuple[int, int]]], ranks: int) -> None:
    none, mlp, block = calls[ranks]
    assert none == mlp == block
    assert none[0] == 1 and (none[1] > 0) == (ranks == 2)


def test_a_resume_with_another_recomputation_stays_on_the_curve_bit_for_bit(tmp_path: Path, digits: Path) -> None:
    spread: Case = {"parallel": {"expert": 2}}
    first = both(COMMON, spread, {"train": {"steps": 2}})
    run_ranks(2, train_all, digits, [(tmp_path / "straight", both(COMMON, spread)), (tmp_path / "run", first)])
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    run_ranks(2, train_all, digits, [(tmp_path / "resumed", both(COMMON, spread, mode("block")))])
    assert curve(tmp_path / "resumed") == curve(tmp_path / "straight")
    assert curve(tmp_path / "resumed", "grad_norm") == curve(tmp_path / "straight", "grad_norm")


def test_what_is_not_finite_is_found_where_it_begins(tmp_path: Path, digits: Path) -> None:
    jobs = [
        (tmp_path / kind, kind, both({"parallel": {"expert": 2}}, {"train": {"steps": 6, "recompute": "block"}}))
        for kind in ("noise", "gradient")
    ]
    noise, gradient = run_ranks(2, train_poisoned, digits, jobs)[0]
    assert "first in the output of x_embedder" in noise
    assert "grad_norm not finite, first in the gradient of blocks.0.attn.proj" in gradient
