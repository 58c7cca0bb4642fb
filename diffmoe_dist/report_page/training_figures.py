"""Where the experts work, sampled now and then while a model trains."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist

from diffmoe_dist.config import Config
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.report_page import figures
from diffmoe_dist.sampling.conditions import Conditions
from diffmoe_dist.sampling.generate import generate, run_sampler
from diffmoe_dist.sampling.routing_trace import recorded


def training_figures(model: DiT, config: Config, conditions: Conditions) -> dict[str, np.ndarray]:
    """Figures of the report by name, (H, W, C) uint8 each, on the first rank; nothing on the others; collective.

    Every rank samples its part of `sample.num` images; the figures show those of the first rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    per_rank = -(-config.sample.num // world_size)
    numbers = list(range(rank * per_rank, (rank + 1) * per_rank))
    objective = build_objective(config)
    with recorded(model, objective) as recorder:
        generate(model, objective, numbers, conditions, run_sampler(config), recorder)
    if rank != 0:
        return {}
    trace, blocks = recorder.trace(), config.moe_blocks
    passes = trace.conditional
    labels = [conditions.label(number) for number in numbers]
    found = {
        "capacity_over_steps": figures.capacity_figure(trace, blocks, getattr(config.moe, "capacity", None)),
        f"capacity_by_{conditions.kind}": figures.class_figure(passes, labels, conditions.name),
        "expert_load": figures.load_in_sampling_figure(passes, blocks),
        "experts_and_steps": figures.expert_times_figure(passes, blocks),
        f"experts_and_{conditions.kinds}": figures.expert_classes_figure(passes, blocks, labels, conditions),
    }
    if trace.overlap_PL is not None:
        found["count_and_threshold"] = figures.overlap_figure(trace.overlap_PL, passes.progress_P, blocks)
    return {name: figures.as_pixels(figure) for name, figure in found.items()}
