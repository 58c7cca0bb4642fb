"""A device with too little memory gets the same run with less of it, or a refusal."""

from __future__ import annotations

import pytest

from diffmoe_dist.config import Config, for_world, load_config
from diffmoe_dist.errors import UserError
from diffmoe_dist.planning.fit import fit_to_memory
from diffmoe_dist.planning.memory import USABLE_MEMORY, peak_bytes, persistent_bytes
from diffmoe_dist.planning.workload import workload
from tests.machine import ROOT

GIB = 2**30


def settings(name: str, ranks: int, *overrides: str) -> Config:
    file = ROOT / f"configs/imagenet256/{name}.yaml"
    return for_world(load_config(file, ["run_dir=r", "data.shards=s", *overrides]), ranks)


def needed(config: Config, ranks: int) -> float:
    peak = peak_bytes(config, ranks, workload(config, ranks))
    return sum(persistent_bytes(config, ranks).values()) + sum(peak.values())


def test_what_fits_stays_and_what_does_not_is_recomputed_as_little_as_will_do() -> None:
    config = settings("global_pool_xl", 8, "parallel.expert=8")
    assert fit_to_memory(config, 8, 79 * GIB) == config
    for mode, memory in {"none": 40 * GIB, "mlp": 25 * GIB}.items():
        fitted = fit_to_memory(config, 8, memory)
        assert fitted.train.recompute == mode, needed(config, 8) / GIB
        assert needed(fitted, 8) <= USABLE_MEMORY * memory
        assert fitted.train.micro_batch_size == 32, "the pool is the batch"
    assert fit_to_memory(settings("global_pool_xl", 8, "train.recompute=block"), 8, 79 * GIB).train.recompute == "block"


def test_a_dense_model_accumulates_before_it_recomputes() -> None:
    config = settings("dense_xl", 1)
    fitted = fit_to_memory(config, 1, 79 * GIB)
    assert fitted.train.recompute == "none" and 256 % fitted.train.micro_batch_size == 0
    assert needed(fitted, 1) <= USABLE_MEMORY * 79 * GIB < needed(config, 1)


def test_what_is_set_anew_is_not_changed_for_memory() -> None:
    config = settings("dense_xl", 1, "train.micro_batch_size=256")
    fitted = fit_to_memory(config, 1, 130 * GIB, given=["train.micro_batch_size"])
    assert (fitted.train.micro_batch_size, fitted.train.recompute) == (256, "mlp")
    assert fit_to_memory(config, 1, 130 * GIB).train.micro_batch_size < 256


def test_what_no_memory_is_enough_for_is_refused_with_the_remedy() -> None:
    config = settings("global_pool_xl", 1)
    with pytest.raises(UserError) as refusal:
        fit_to_memory(config, 1, 40 * GIB)
    assert str(refusal.value).startswith("train.micro_batch_size=256 on 1 rank needs ")
    assert str(refusal.value).endswith(
        "by the plan, even with train.recompute=block, and a device has 40.0; start on more ranks"
    )
