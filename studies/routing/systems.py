"""What is compared, and the runs of the study in the order of their worth: cut anywhere, it has what matters most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

BASE_CONFIG = Path(__file__).parent / "base.yaml"
EXPERTS = 8
SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4)
LEARNING_RATES = (0.0005, 0.001, 0.002, 0.004, 0.008)
LOW_RATE_FACTOR = 1 / 4  # of the best one for dense: there all systems are compared once more
LARGER_RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # of the larger model; the first is that of both papers

OWN = "own"  # the inference rule of a system that has no other
CONSTANT = "constant"  # the rule with one threshold for all experts and layers, which is searched for


@dataclass(frozen=True)
class System:
    title: str
    settings: tuple[str, ...] = ()
    rules: tuple[str, ...] = (OWN,)  # values of moe.inference that its trained models are measured under


@dataclass(frozen=True)
class Variant:
    """A row of the main table: a system's trained models under one inference rule."""

    title: str
    system: str
    rule: str = OWN


def _experts(router: str, *settings: str, experts: int = EXPERTS) -> tuple[str, ...]:
    return (f"moe.router={router}", f"moe.num_experts={experts}", *settings)


# A capacity predictor, through which every token passes, is paid for by narrower experts.
_WITH_PREDICTOR = "moe.expert_mlp_ratio=3.5"
_GLOBAL_POOL = _experts("global_pool", _WITH_PREDICTOR)
_FALLING = "optim.schedule=cosine"  # to 0 at the last step
# ProMoE's 12 routed experts have half the width, and one of the two that a token passes through is shared.
_PROTOTYPE = _experts("prototype", experts=12)

SYSTEMS = {
    "dense": System("dense"),
    "dense_wide": System("dense, wider", ("model.hidden_size=160",)),
    "token_choice": System("token choice", _experts("token_choice")),
    "load_balanced": System("load-balanced token choice", _experts("token_choice", "moe.balance_loss_weight=0.01")),
    "expert_choice": System("expert choice", _experts("expert_choice")),
    "expert_choice_dynamic": System(
        "expert choice with a capacity predictor",
        _experts("expert_choice", "moe.capacity_predictor=true", _WITH_PREDICTOR),
        ("threshold", "static"),
    ),
    "global_pool": System("DiffMoE", _GLOBAL_POOL, ("threshold", "static", "count", CONSTANT)),
    "prototype": System("ProMoE, token choice", _PROTOTYPE),
    "prototype_expert_choice": System("ProMoE, expert choice", (*_PROTOTYPE, "moe.variant=expert_choice")),
    # Ablations
    "dense_falling": System("dense, learning rate falls", (_FALLING,)),
    "token_choice_falling": System("token choice, learning rate falls", (*_experts("token_choice"), _FALLING)),
    "global_pool_falling": System("DiffMoE, learning rate falls", (*_GLOBAL_POOL, _FALLING), ("static",)),
    "no_contrastive": System(
        "ProMoE, token choice, without contrastive loss", (*_PROTOTYPE, "moe.contrastive_loss_weight=0")
    ),
    "pool_16": System("DiffMoE, pool of 16 images", (*_GLOBAL_POOL, "train.micro_batch_size=16"), ("static",)),
    "pool_4": System("DiffMoE, pool of 4 images", (*_GLOBAL_POOL, "train.micro_batch_size=4"), ("static",)),
    "pool_1": System("DiffMoE, pool of 1 image", (*_GLOBAL_POOL, "moe.pool=sample"), ("static",)),
    "experts_2": System("DiffMoE, 2 experts", _experts("global_pool", _WITH_PREDICTOR, experts=2), ("static",)),
    "experts_4": System("DiffMoE, 4 experts", _experts("global_pool", _WITH_PREDICTOR, experts=4), ("static",)),
    "experts_16": System("DiffMoE, 16 experts", _experts("global_pool", _WITH_PREDICTOR, experts=16), ("static",)),
}
MAIN_SYSTEMS = tuple(SYSTEMS)[:9]
SENSITIVE_SYSTEMS = ("global_pool", "token_choice")
LARGER_SYSTEMS = ("dense", "global_pool")
FALLING = {"dense": "dense_falling", "token choice": "token_choice_falling", "DiffMoE": "global_pool_falling"}
POOLS = {1: "pool_1", 4: "pool_4", 16: "pool_16", 64: "global_pool"}  # images that compete
EXPERT_NUMBERS = {2: "experts_2", 4: "experts_4", 8: "global_pool", 16: "experts_16"}

VARIANTS = {
    "dense": Variant("dense", "dense"),
    "dense_wide": Variant("dense, 1.5 times as many parameters", "dense_wide"),
    "token_choice": Variant("token choice", "token_choice"),
    "load_balanced": Variant("token choice, load-balanced", "load_balanced"),
    "expert_choice": Variant("expert choice, static", "expert_choice"),
    "expert_choice_dynamic": Variant("expert choice, dynamic", "expert_choice_dynamic", "threshold"),
    "global_pool_static": Variant("DiffMoE, static", "global_pool", "static"),
    "global_pool_dynamic": Variant("DiffMoE, dynamic", "global_pool", "threshold"),
    "prototype": Variant("ProMoE, token choice", "prototype"),
    "prototype_expert_choice": Variant("ProMoE, expert choice", "prototype_expert_choice"),
}


@dataclass(frozen=True)
class Run:
    system: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """Of its result and its folder; runs with the same settings are one run."""
        return f"{self.system}-lr{self.lr:g}-seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """What it sets beside `BASE_CONFIG`, places apart."""
        return [f"seed={self.seed}", f"optim.lr={self.lr:g}", *SYSTEMS[self.system].settings]


def learning_rate_runs() -> list[Run]:
    return [Run("dense", SEEDS[0], lr) for lr in sorted(LEARNING_RATES, key=lambda lr: abs(lr - 0.0015))]


def planned_runs(lr: float) -> list[Run]:
    """All runs but those that choose the learning rate, the most important ones first."""
    first, *others = SEEDS
    runs = [Run(system, first, lr) for system in MAIN_SYSTEMS]
    runs += [
        Run(system, first, rate) for rate in (lr / 2, lr * LOW_RATE_FACTOR, lr * 2) for system in SENSITIVE_SYSTEMS
    ]
    runs += [Run(system, seed, lr) for seed in others for system in MAIN_SYSTEMS]
    between = round(lr / math.sqrt(2), 4)  # and the next smaller one, where another system may have its best
    runs += [Run(system, first, between) for system in ("dense", *SENSITIVE_SYSTEMS)]
    ablations = (
        "no_contrastive",
        "pool_1",
        "experts_16",
        "experts_2",
        "pool_16",
        *FALLING.values(),
        "pool_4",
        "experts_4",
    )
    runs += [Run(system, first, lr) for system in ablations]
    low = ("dense", *SENSITIVE_SYSTEMS, *MAIN_SYSTEMS)
    runs += [Run(system, seed, lr * LOW_RATE_FACTOR) for seed in SEEDS for system in low]
    runs += [Run(system, seed, lr) for seed in others for system in ablations]
    runs += [Run(system, seed, lr) for seed in MORE_SEEDS for system in MAIN_SYSTEMS]
    return list(dict.fromkeys(runs))


def larger_runs() -> list[Run]:
    return [Run(system, SEEDS[0], lr) for lr in LARGER_RATES for system in LARGER_SYSTEMS]


def chosen_learning_rate(losses: Mapping[float, float]) -> float | None:
    """The one with the lowest validation loss of the dense model; None before all have been run."""
    if not set(LEARNING_RATES) <= losses.keys():
        return None
    return min(LEARNING_RATES, key=lambda lr: losses[lr])


def next_runs(finished: Iterable[str], lr: float | None) -> list[Run]:
    """What is still to be run, in order; without a learning rate only what chooses it."""
    done = set(finished)
    runs = learning_rate_runs() if lr is None else learning_rate_runs() + planned_runs(lr)
    unique = {run.name: run for run in runs}
    return [run for name, run in unique.items() if name not in done]
