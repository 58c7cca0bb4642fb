"""Where the experts work, drawn now and then while a model trains."""

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

    Every rank draws its share of `sample.num` images, and the figures are of the first rank's.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = -(-config.sample.num // world_size)
    numbers = list(range(rank * share, (rank + 1) * share))
    objective = build_objective(config.objective)
    with recorded(model, objective) as recorder:
        generate(model, objective, numbers, conditions, run_sampler(config), recorder)
    if rank != 0:
        return {}
    trace, blocks = recorder.trace(), config.moe_blocks
    labels = [conditions.label(number) for number in numbers]
    drawn = {
        "capacity_over_steps": figures.capacity_figure(trace, blocks, getattr(config.moe, "capacity", None)),
        f"capacity_by_{conditions.kind}": figures.class_figure(trace.conditional, labels, conditions.name),
        "expert_load": figures.load_in_sampling_figure(trace.conditional, blocks),
        "experts_and_steps": figures.expert_times_figure(trace.conditional, blocks),
        f"experts_and_{conditions.kinds}": figures.expert_classes_figure(
            trace.conditional, blocks, labels, conditions.kind
        ),
    }
    if trace.overlap_PL is not None:
        drawn["count_and_threshold"] = figures.overlap_figure(trace, blocks)
    return {name: figures.as_pixels(figure) for name, figure in drawn.items()}
