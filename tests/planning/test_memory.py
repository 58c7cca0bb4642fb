"""Memory that persists, and how near the estimate of activations comes to what autograd keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.measuring import saved_bytes
from diffmoe_dist.config import for_world
from diffmoe_dist.model.condition import Condition, TextCondition
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.freezing import freeze, frozen_parameters
from diffmoe_dist.model.recompute import apply_recompute
from diffmoe_dist.planning.memory import activation_bytes, persistent_bytes
from diffmoe_dist.planning.workload import workload
from tests.engine.runs import tiny_config
from tests.planning.plans import DENSE, MIXED, NO_ATTENTION, NO_WEIGHTS, Case, plan_of

TEXT: Case = {
    "model": {
        "condition": "text", "num_classes": 0, "text_hidden_size": 32, "text_max_length": 16, "text_pooled_size": 24
    },
    "data": {"text": "unused"},
}  # fmt: skip
HEADS: Case = {"model": {"qk_norm": "layer", "head_dim": 24, "activation": "swiglu"}}

HALF: Case = {"train": {"freeze": ["?_embedder.*", "blocks.[01].*", "blocks.3.attn.*"]}}

CASES: dict[str, Case] = {
    "dense": DENSE,
    "global pool": {},
    "token choice": {"moe": {"router": "token_choice"}},
    "prototype": {"moe": {"router": "prototype"}},
    "swiglu": {"moe": {"router": "token_choice", "activation": "swiglu", "shared_experts": 1}},
    "dense swiglu and normed heads": {**DENSE, **HEADS},
    "swiglu and normed heads": {**HEADS, "moe": {"shared_experts": 2, "shared_mlp_ratio": 1.0, "blocks": "all"}},
    "rms, bf16": {"model": {"qk_norm": "rms"}, "precision": "bf16"},
    "bf16": {"precision": "bf16"},
    "text": TEXT,
    "text and normed heads, mixed": {**TEXT, "model": {**TEXT["model"], **HEADS["model"]}, **MIXED},
    "text in bf16": {**TEXT, "precision": "bf16"},
    "dense, mixed": {**DENSE, **MIXED},
    "global pool, mixed": MIXED,
    "token choice, mixed": {"moe": {"router": "token_choice"}, **MIXED},
    "prototype, mixed": {"moe": {"router": "prototype"}, **MIXED},
    "text, mixed": {**TEXT, **MIXED},
    "no attention, mixed": {**NO_ATTENTION, **MIXED},
    "no weights, prototype, swiglu": {"moe": {"router": "prototype", "activation": "swiglu"}, **NO_WEIGHTS},
    "half of the blocks, text": {**HALF, **TEXT},
    "experts alone": {"train": {"freeze": ["?_embedder.*", "blocks.*.a*", "*.fc?.*", "*.router.*", "final_layer.*"]}},
}


@pytest.mark.parametrize(("recompute", "tolerance"), [("none", 0.03), ("mlp", 0.05), ("block", 0.1)])
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_of_activations_is_near_what_autograd_keeps(case: str, recompute: str, tolerance: float) -> None:
    shape = {"model": {"depth": 4, "hidden_size": 64, "num_heads": 4, "input_size": 16, "in_channels": 1}}
    config = tiny_config(Path("unused"), Path("unused"), CASES[case], shape, {"train": {"recompute": recompute}})
    config = for_world(config, 1)
    images = config.train.global_batch_size
    work = workload(config, 1)
    model = DiT(config)
    initialize(model, 0)
    freeze(model, frozen_parameters(config))
    if config.precision == "bf16":
        model.bfloat16()
    apply_recompute(model, config.train.recompute)
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
    assert activation_bytes(config, work) == pytest.approx(kept, rel=tolerance)


def test_persistent_memory_shrinks_with_the_ranks_but_for_the_weights() -> None:
    config = tiny_config(Path("unused"), Path("unused"))
    one, four = persistent_bytes(config, 1), persistent_bytes(config, 4)
    assert four["weights"] == one["weights"]
    # DeepSpeed pads to two elements a rank.
    assert four["EMA"] * 4 - one["EMA"] in range(0, 2 * 4 * 4)


def test_what_is_computed_again_is_a_row_of_its_own_and_less_than_what_is_no_longer_kept() -> None:
    plans = {mode: plan_of({"train": {"recompute": mode}}, 1) for mode in ("none", "mlp", "block")}
    assert "recomputed activations" not in plans["none"].peak
    assert plans["mlp"].peak["recomputed activations"] > 0
    assert plans["none"].memory > plans["mlp"].memory > plans["block"].memory
    assert plans["none"].persistent == plans["block"].persistent


@pytest.mark.parametrize("settings", [{}, {**DENSE, "train": {"micro_batch_size": 2}}], ids=["pool", "accumulated"])
def test_the_largest_micro_batch_fits_and_one_image_more_does_not(settings: Case) -> None:
    wide = {"model": {"hidden_size": 256, "num_heads": 4, "input_size": 32}}
    plan = plan_of({**wide, **settings}, 2)
    images = plan.largest_micro_batch()
    assert images > 100
    for more, fits in ((0, True), (1, False)):
        train = {"micro_batch_size": images + more, "global_batch_size": 2 * (images + more) * plan.work.micro_steps}
        assert plan_of({**wide, **settings, "train": train}, 2).fits == fits
