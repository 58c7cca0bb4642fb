"""`--recalibrate`: capacity thresholds for the weights at hand, from the training data of their run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from diffmoe_dist.config import Config
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.loader import TrainingLoader
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.data.stream import StreamedData
from diffmoe_dist.engine.noising import with_one_time
from diffmoe_dist.engine.thresholds import proposed_thresholds
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
    """Set every capacity threshold to the mean of what the batches propose; each batch is one token pool.

    The model comes back in eval mode.
    """
    for layer in model.moe_layers:
        layer.router.end_schedule()
    model.train()
    thresholds_LN = proposed_thresholds(model, config, _as_in_training(batches, config))
    model.eval()
    for layer, threshold_N in zip(model.moe_layers, thresholds_LN, strict=True):
        layer.router.get_buffer("threshold").copy_(threshold_N)


def _as_in_training(batches: Iterable[Batch], config: Config) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        one_time = config.objective.same_t_per_batch
        yield with_one_time(batch, config.seed, number * len(batch.labels)) if one_time else batch
