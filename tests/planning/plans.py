"""Settings of tiny models, and their plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffmoe_dist.planning.accelerators import ACCELERATORS
from diffmoe_dist.planning.estimate import Plan, make_plan
from diffmoe_dist.planning.workload import Cluster
from tests.engine.runs import tiny_config

H100 = ACCELERATORS["H100-80"]
SHARDED = {"parallel": {"expert": 2}}
ACCUMULATED = {"train": {"micro_batch_size": 4}}
BF16_ZERO_2 = {"precision": "bf16", "parallel": {"zero_stage": 2, "expert": 2}}
MIXED = {"precision": "bf16_mixed"}
BF16_GRADIENTS = {"parallel": {"expert": 1, "gradient_dtype": "bf16"}}
DENSE = {"moe": {"router": "dense", "num_experts": None}}
EXPERT_CHOICE = {"moe": {"router": "expert_choice"}, **SHARDED}
TOKEN_CHOICE = {"moe": {"router": "token_choice", "top_k": 2}, **SHARDED}
# Without dropped labels the number of images without a condition is known, else it is an expectation.
PROTOTYPE = {"moe": {"router": "prototype", "balance_loss_weight": 0.1}, "train": {"label_dropout": 0.0}, **SHARDED}
PROTOTYPE_EXPERT_CHOICE = {**PROTOTYPE, "moe": {"router": "prototype", "variant": "expert_choice"}}
# Of a model of two blocks: nothing before the second block trains; only what is new does; the experts alone.
LAST_BLOCK = {"train": {"freeze": ["?_embedder.*", "blocks.0.*", "blocks.1.attn.proj.*", "blocks.1.adaLN*"]}}
NO_ATTENTION = {"train": {"freeze": ["blocks.*.attn.*", "blocks.*.mlp.experts.w1"]}}
NO_WEIGHTS = {"train": {"freeze": ["*.weight", "blocks.*.mlp.experts.w[12]"]}}
NO_EXPERTS = {"train": {"freeze": ["blocks.*.mlp.experts.*"]}}
EXPERTS_ALONE = {"train": {"freeze": ["?_embedder.*", "blocks.*.a*", "blocks.0.mlp.*", "*.router.*", "final_layer.*"]}}

FLOWLESS = {"time_distribution": None, "time_scale": None}
DDPM = {"objective": {"name": "ddpm", **FLOWLESS}, "model": {"learn_sigma": True}}

Case = dict[str, Any]


def plan_of(settings: Case, ranks: int, gpus_per_node: int | None = None, capacity: float | None = None) -> Plan:
    gpus = gpus_per_node or ranks
    config = tiny_config(Path("unused"), Path("unused"), settings)
    return make_plan(config, Cluster(ranks // gpus, gpus, H100), capacity)
