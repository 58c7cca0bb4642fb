"""What routers do in a training step that is logged, beyond what every step counts.

All is summed on the device, and leaves it with the step's losses: no layer waits for it.

Shape legend: L layers, N experts, T local tokens, B images of S tokens, K levels of noise, H buckets of gates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.pool_choice import PoolChoice
from diffmoe_dist.model.routing import Router, Routing

NOISE_LEVELS = 5  # of equal width, from the image to noise alone
GATE_BUCKETS = 40  # of equal width, from 0 to 1
DEAD = 0.01  # of the mean load of its layer: an expert with less is called dead
PREFIX = "routing_"


class Observed:
    """The sums of each layer of one forward pass."""

    def __init__(self, noise_B: Tensor, has_thresholds: bool = True) -> None:
        self.has_thresholds = has_thresholds
        level_B = (noise_B * NOISE_LEVELS).long().clamp(0, NOISE_LEVELS - 1)
        self.level_BK = (level_B[:, None] == torch.arange(NOISE_LEVELS, device=noise_B.device)).float()
        self.layers: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def add(self, has_unconditional: bool, router: Router, inputs: Any, routing: Routing) -> None:
        """A router's forward hook, where it is known whether an unconditional expert is beside the routed ones."""
        scores_TN, chosen_NT = routing.scores_TN.detach(), routing.pool.chosen
        experts, images = len(chosen_NT), len(self.level_BK)
        share_TN = scores_TN.clamp_min(0)
        share_TN = share_TN / share_TN.sum(dim=1, keepdim=True).clamp_min(1e-20)
        bucket_TN = (scores_TN.nan_to_num() * GATE_BUCKETS).long().clamp(0, GATE_BUCKETS - 1)
        sums = {
            "entropy": torch.special.entr(share_TN).sum(dim=1).mean() / max(math.log(experts), 1e-20),
            "gates": torch.zeros(GATE_BUCKETS, dtype=torch.int64, device=scores_TN.device).index_add_(
                0, bucket_TN.T.flatten(), chosen_NT.flatten().long()
            ),
            "at_noise": chosen_NT.view(experts, images, -1).sum(dim=2).float() @ self.level_BK,
            "tokens_at_noise": self.level_BK.sum(dim=0) * (len(scores_TN) // images),
        }
        if has_unconditional:  # a part of the capacity, see RoutingStats
            sums["unconditional_at_noise"] = inputs[1].view(images, -1).sum(dim=1).float() @ self.level_BK
        predicted_TN = routing.predicted_TN if self.has_thresholds else None
        if predicted_TN is not None and isinstance(router, PoolChoice):
            above_NT = (predicted_TN.sigmoid() > router.threshold).T
            both, either = (above_NT & chosen_NT).sum(), (above_NT | chosen_NT).sum()
            sums |= {"predicted": above_NT.sum(dim=1), "agreed": torch.stack([both, either])}
        self.layers.append(sums)

    def sums(self) -> dict[str, Tensor]:
        """Of all layers, by name: (L, ...) each."""
        names = self.layers[0] if self.layers else {}
        return {f"{PREFIX}{name}": torch.stack([layer[name] for layer in self.layers]) for name in names}


@contextmanager
def observed(model: DiT, noise_B: Tensor, has_thresholds: bool = True) -> Iterator[Observed]:
    """While in this context, the model's routers are observed.

    Args:
        noise_B: how much noise the images have, 0 to 1.
        has_thresholds: whether those of capacity predictors have been found, as after the first step.
    """
    found = Observed(noise_B, has_thresholds)
    handles = [
        layer.router.register_forward_hook(partial(found.add, layer.unconditional is not None))
        for layer in model.moe_layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def routing_metrics(sums: Mapping[str, Tensor], load_LN: Tensor) -> dict[str, float | None]:
    """What `Observed.sums` say, averaged over the layers, of the global batch; values of a step's line of metrics.

    Args:
        load_LN: tokens of each expert.
    """
    entropy_L, at_noise_LNK = sums[f"{PREFIX}entropy"], sums[f"{PREFIX}at_noise"]
    tokens_K = sums[f"{PREFIX}tokens_at_noise"][0]
    values: dict[str, float | None] = {"gate_entropy": float(entropy_L.mean())}
    if f"{PREFIX}predicted" in sums:
        load_LN = sums[f"{PREFIX}predicted"]
        both_L, either_L = sums[f"{PREFIX}agreed"].T
        relative_LN = relative_load(load_LN)
        values |= {
            "predictor_capacity": float((load_LN.sum(dim=1) / tokens_K.sum()).mean()),
            "predictor_agreement": float((both_L / either_L.clamp_min(1e-9)).mean()),
            "predictor_load_max": float(relative_LN.max()),
            "predictor_load_min": float(relative_LN.min()),
        }
    capacity_LK = at_noise_LNK.sum(dim=1)
    if f"{PREFIX}unconditional_at_noise" in sums:
        capacity_LK = capacity_LK + sums[f"{PREFIX}unconditional_at_noise"]
    values["dead_experts"] = int((relative_load(load_LN) < DEAD).sum())
    for level, tokens in enumerate(tokens_K.tolist()):
        of_level_LN, middle = at_noise_LNK[..., level], (level + 0.5) / NOISE_LEVELS
        capacity = float((capacity_LK[:, level] / tokens).mean()) if tokens else None
        values[f"capacity_at_noise_{middle:g}"] = capacity
        values[f"expert_load_max_at_noise_{middle:g}"] = float(relative_load(of_level_LN).max()) if tokens else None
    return values


def relative_load(load_LN: Tensor) -> Tensor:
    """Over the mean of the layer."""
    return load_LN / load_LN.mean(dim=1, keepdim=True, dtype=torch.float64).clamp_min(1e-9)  # no token had a condition
