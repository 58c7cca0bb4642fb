"""Where a model spends its experts while it samples images, recorded from its forward passes.

Shape legend: P passes of the sampler, L mixture-of-experts layers, N images, S tokens an image, E experts, T = N * S.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.diffusion.objectives import DDPM_STEPS, Objective, RectifiedFlow
from diffmoe_dist.model.condition import Condition
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.moe import MoELayer
from diffmoe_dist.model.pool_choice import PoolChoice
from diffmoe_dist.model.precision import fp32_products
from diffmoe_dist.model.routing import Router

COMPARED_RULES = ("count", "threshold")


@dataclass(frozen=True)
class Passes:
    """What the passes of one kind, conditional or null, did; in the order of the progress from noise to image."""

    progress_P: np.ndarray  # 0: noise, 1: image
    experts_PLNS: np.ndarray  # uint8, experts of each token, an unconditional one included
    assignments_PLNE: np.ndarray  # int32, tokens of an image that an expert took

    @property
    def capacity_by_layer(self) -> np.ndarray:
        """(P, L) experts a token, C of DiffMoE eq. 8-9."""
        return self.experts_PLNS.mean(axis=(2, 3), dtype=np.float64)

    @property
    def capacity_by_image(self) -> np.ndarray:
        """(N,) experts a token, over passes and layers."""
        return self.experts_PLNS.mean(axis=(0, 1, 3), dtype=np.float64)


@dataclass(frozen=True)
class RoutingTrace:
    conditional: Passes
    null: Passes | None  # with guidance
    overlap_PL: np.ndarray | None  # Jaccard index of the choices by the rules count and threshold, conditional passes


class Recorder:
    """Keeps what the layers of a model chose; see `recorded`."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.null: Condition | None = None  # what guidance moves away from, the object itself
        self.num_images = 0
        self.layers: list[tuple[Tensor, float | None]] = []  # of the pass under way: experts_TE, overlap
        self.records: dict[str, list[tuple[float, np.ndarray, np.ndarray, list[float | None]]]] = {
            "conditional": [], "null": [],
        }  # fmt: skip

    def begin(self, conditional: Condition, unconditional: Condition) -> None:
        """Before the first pass: the conditions of the images, and those that guidance moves away from."""
        self.null, self.num_images = unconditional, len(conditional)

    def trace(self) -> RoutingTrace:
        conditional = self._passes("conditional")
        assert conditional is not None, "nothing has been sampled"
        overlaps = [record[3] for record in self._ordered("conditional")]
        compared = bool(overlaps) and None not in overlaps[0]
        return RoutingTrace(conditional, self._passes("null"), np.array(overlaps, dtype=float) if compared else None)

    def _after_layer(self, layer: MoELayer, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        x_NSD, null_N = inputs
        null_T = null_N.repeat_interleave(x_NSD.shape[1])
        chosen_TE = output[1].pool.chosen.T
        if layer.unconditional is not None:
            chosen_TE = torch.cat([chosen_TE, null_T[:, None]], dim=1)
        self.layers.append((chosen_TE, overlap_of_rules(layer.router, x_NSD.flatten(0, 1), null_T)))

    def _after_model(self, model: DiT, inputs: tuple[Tensor, Tensor, Condition], output: Any) -> None:
        _, t, y = inputs
        layers, self.layers = self.layers, []
        chosen_LNSE = torch.stack([chosen_TE.unflatten(0, (len(y), -1)) for chosen_TE, _ in layers])
        assert self.num_images > 0, "generate begins the record"
        conditional = 0 if y is self.null else self.num_images  # one pass may hold both, the conditional images first
        for kind, rows in (("conditional", slice(conditional)), ("null", slice(conditional, None))):
            of_kind = chosen_LNSE[:, rows]
            if of_kind.shape[1]:
                experts_LNS = of_kind.sum(dim=3).to(torch.uint8).cpu().numpy()
                assignments_LNE = of_kind.sum(dim=2).to(torch.int32).cpu().numpy()
                progress = self._progress(float(t[0]))
                self.records[kind].append((progress, experts_LNS, assignments_LNE, [value for _, value in layers]))

    def _progress(self, model_time: float) -> float:
        if isinstance(self.objective, RectifiedFlow):
            time = model_time / self.objective.time_scale
            return time if self.objective.data_time == 1.0 else 1 - time
        return 1 - model_time / (DDPM_STEPS - 1)

    def _ordered(self, kind: str) -> list[Any]:
        return sorted(self.records[kind], key=lambda record: record[0])  # an adaptive sampler goes back and forth

    def _passes(self, kind: str) -> Passes | None:
        if not self.records[kind]:
            return None
        progress, experts, assignments, _ = zip(*self._ordered(kind), strict=True)
        return Passes(np.array(progress), np.stack(experts), np.stack(assignments))


@contextmanager
def recorded(model: DiT, objective: Objective) -> Iterator[Recorder]:
    """While in this context, forward passes of the model are recorded; all of them with the same images.

    Raises:
        AssertionError: the model has no experts.
    """
    assert model.moe_layers, "a dense model routes nothing"
    recorder = Recorder(objective)
    handles = [layer.register_forward_hook(recorder._after_layer) for layer in model.moe_layers]
    handles.append(model.register_forward_hook(recorder._after_model))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def overlap_of_rules(router: Router, x_TD: Tensor, null_T: Tensor) -> float | None:
    """The Jaccard index of the (token, expert) pairs that `count` and `threshold` choose; None: not of this router.

    Both choose as many tokens of a pool for each expert: count those with the highest gate, threshold those with the
    highest predicted scores (DiffMoE Alg. 4 and eq. 14).
    """
    if not isinstance(router, PoolChoice) or router.capacity_predictor is None:
        return None
    own = router.inference
    choices = []
    for rule in COMPARED_RULES:
        router.inference = rule
        with fp32_products(x_TD.device):  # as the layer does
            choices.append(router.forward(x_TD, null_T).pool.chosen)
    router.inference = own
    either = int((choices[0] | choices[1]).sum())
    return int((choices[0] & choices[1]).sum()) / either if either else 1.0
