"""Where a run's numbers stand in TensorBoard and Weights & Biases: by groups, without what cannot change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffmoe_dist.config import Config

# By the beginning of a name in metrics.jsonl; what none of them begins is a score.
_GROUPS = {
    "perf": ("images_per_second", "step_seconds", "seconds_", "mfu", "peak_memory"),
    "moe": ("capacity", "expert_load", "predictor_", "gate_", "dead_experts"),
    "optim": ("lr", "grad_norm"),
    "data": ("bad_samples",),
    "health": ("skipped_steps", "failed_"),
    "loss": ("loss",),
}
_NO_CHART = ("step", "ranks", "images_seen")
# Where all is well these are 0, and no chart: TensorBoard, which sorts the groups, then begins with the losses.
_ONCE_NOT_ZERO = ("data", "health")
_POOL_CHOICE = ("global_pool", "expert_choice")


class Charts:
    """Which values of a line of metrics are charted, by group and name."""

    def __init__(self, config: Config) -> None:
        self.constant = _constant(config)
        self.seen: set[str] = set()  # of those that are charted once they are not zero

    def of(self, values: Mapping[str, Any]) -> dict[str, float]:
        """`group/name`, the losses first."""
        charted = {}
        for name, value in values.items():
            if value is None or name in _NO_CHART or any(pattern.fullmatch(name) for pattern in self.constant):
                continue
            group = next((group for group, begins in _GROUPS.items() if name.startswith(begins)), "score")
            if group in _ONCE_NOT_ZERO and not value and name not in self.seen:
                continue
            self.seen.add(name)
            charted[f"{group}/{name}"] = value
        return dict(sorted(charted.items(), key=lambda one: not one[0].startswith("loss/")))

    def load_is_constant(self) -> bool:
        return any(pattern.fullmatch("expert_load_max") for pattern in self.constant)


def _constant(config: Config) -> list[re.Pattern[str]]:
    """The names of what a router of ours keeps constant by construction while it trains."""
    moe: Any = config.experts
    if moe is None or moe.router not in (*_POOL_CHOICE, "token_choice", "prototype"):
        return []
    own_choice = moe.router in _POOL_CHOICE or getattr(moe, "variant", None) == "expert_choice"
    names = []
    of_images = moe.pool_kind() == "sample"
    if getattr(moe, "capacity_schedule", None) is None and not (moe.unconditional_expert and moe.top_k != 1):
        names += ["capacity", "capacity_at_noise_.*"] if of_images else ["capacity"]
    if own_choice:
        names += ["expert_load_max", "expert_load_min"]
    if not moe.has_predictor() and own_choice:
        names.append("dead_experts")
    if of_images and own_choice:
        names.append("expert_load_max_at_noise_.*")
    return [re.compile(name) for name in names]
