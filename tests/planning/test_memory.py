"""Memory that persists, and how near the estimate of activations comes to what autograd keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.measuring import saved_bytes
from diffmoe_dist.config import for_world
from diffmoe_dist.model.condition import Condition, TextCondition
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.planning.memory import activation_bytes, persistent_bytes
from diffmoe_dist.planning.workload import workload
from tests.engine.runs import tiny_config
from tests.planning.plans import DENSE, MIXED, Case

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
        {**DENSE, **MIXED}, MIXED, {"moe": {"router": "token_choice"}, **MIXED},
        {"moe": {"router": "prototype"}, **MIXED}, {**TEXT, **MIXED},
    ],
    ids=[
        "dense", "global pool", "token choice", "prototype", "swiglu", "bf16", "text", "text in bf16",
        "dense, mixed", "global pool, mixed", "token choice, mixed", "prototype, mixed", "text, mixed",
    ],
)  # fmt: skip
def test_the_estimate_of_activations_is_near_what_autograd_keeps(settings: Case) -> None:
    shape = {"model": {"depth": 4, "hidden_size": 64, "num_heads": 4, "input_size": 16, "in_channels": 1}}
    config = tiny_config(Path("unused"), Path("unused"), settings, shape)
    config = for_world(config, 1)
    images = config.train.global_batch_size
    work = workload(config, 1)
    model = DiT(config)
    initialize(model, 0)
    if config.precision == "bf16":
        model.bfloat16()
    labels = torch.zeros(images, dtype=torch.int64)
    labels[: round(images * config.train.label_dropout)] = 10  # the null label
    condition: Condition = labels
    if config.model.condition == "text":
        mask = torch.arange(16) < torch.randint(1, 17, (images, 1))
        condition = TextCondition(
            torch.randn(images, 16, 32).half(), mask, torch.randn(images, 24).half(), labels == 10
        )
    images_NCHW, times = torch.randn(images, 1, 16, 16), torch.rand(images)
    kept = saved_bytes(model, lambda: model(images_NCHW, times, condition))
    assert activation_bytes(config, work) == pytest.approx(kept, rel=0.03)


def test_persistent_memory_shrinks_with_the_ranks_but_for_the_weights() -> None:
    config = tiny_config(Path("unused"), Path("unused"))
    one, four = persistent_bytes(config, 1), persistent_bytes(config, 4)
    assert four["weights"] == one["weights"]
    # DeepSpeed pads to two elements a rank.
    assert four["EMA"] * 4 - one["EMA"] in range(0, 2 * 4 * 4)
