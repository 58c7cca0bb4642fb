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
    """The names of what the router keeps constant by construction while it trains."""
    moe = config.experts
    if moe is None:
        return []
    names, of_images = [], moe.pool_kind() == "sample"
    if moe.capacity_is_constant():
        names += ["capacity", "capacity_at_noise_.*"] if of_images else ["capacity"]
    if moe.load_is_constant():
        names += ["expert_load_max", "expert_load_min"]
        names += [] if moe.has_predictor() else ["dead_experts"]
        names += ["expert_load_max_at_noise_.*"] if of_images else []
    return [re.compile(name) for name in names]
