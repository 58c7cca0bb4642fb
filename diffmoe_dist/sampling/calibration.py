"""Capacity thresholds for averaged weights.

Training moves the thresholds with the weights it trains; the averaged weights have another capacity predictor, which
those thresholds do not fit exactly. A few batches of training data give the thresholds at which the averaged model has
the capacity that it was trained for.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from diffmoe_dist.config import Config
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.loader import TrainingLoader
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.data.stream import StreamedData
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.noising import noisy_inputs, with_one_time
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.dit import DiT


def recalibrate_on_training_data(
    model: DiT, config: Config, data: TrainingData | StreamedData, num_batches: int, batch_size: int
) -> None:
    """Set the thresholds from the first `num_batches` of `batch_size` images of the run's own training order.

    Raises:
        UserError: the model has no thresholds, or the data no order.
    """
    if not any(hasattr(layer.router, "threshold") for layer in model.moe_layers):
        raise UserError(
            f"--recalibrate {num_batches}: a model with moe.router={config.moe.router} has no capacity thresholds; "
            "leave it out"
        )
    if not isinstance(data, TrainingData):
        raise UserError(f"--recalibrate {num_batches}: data.stream=true has no order to read again; leave it out")
    loader = TrainingLoader(data, BatchSplit(batch_size, batch_size), seed=config.seed, flip=config.data.flip)
    recalibrate(model, config, (next(loader) for _ in range(num_batches)))
    loader.close()


@torch.no_grad()
def recalibrate(model: DiT, config: Config, batches: Iterable[Batch]) -> None:
    """Set every capacity threshold to the mean of what the batches propose (DiffMoE eq. 17 at these weights).

    Each batch is one token pool, noised as in training; the proposal for an expert is the predicted score that as many
    tokens exceed as it has slots. The model comes back in eval mode.
    """
    objective = build_objective(config)
    device = model.pos_embed.device
    proposals = []
    for layer in model.moe_layers:
        layer.router.end_schedule()
    model.train()
    for number, batch in enumerate(batches):
        if config.objective.same_t_per_batch:
            batch = with_one_time(batch, config.seed, number * len(batch.labels))
        z, t, y = noisy_inputs(batch.to(device), objective, config)
        output = model(z, objective.model_time(t), y)
        proposals.append([stats.proposed_threshold for stats in output.routing])
    model.eval()
    for layer, of_layer in zip(model.moe_layers, zip(*proposals, strict=True), strict=True):
        threshold = layer.router.get_buffer("threshold")
        threshold.copy_(torch.stack(of_layer).mean(dim=0))
