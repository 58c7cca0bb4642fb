"""The loss of the averaged weights on images that are held out from training, by the time of the noise.

Shape legend: N images, B time buckets.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.loader import TrainingLoader
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.diffusion.objectives import DDPM_STEPS, build_objective
from diffmoe_dist.engine.noising import noisy_inputs
from diffmoe_dist.logs import logger
from diffmoe_dist.model.dit import DiT

TIME_BUCKETS = 4


class Validation:
    """The same images, noise, times and label drops every time, so that two values differ by the weights alone.

    Images are noised and routed as in a training step, in pools of the same size: the values compare with
    `loss_diffusion`, and do not depend on the number of ranks where those of training do not. With
    `objective.same_t_per_batch` they do not compare where images share a pool: here each keeps its own time, for a time
    of each of few batches would be a poor sample of all.
    """

    def __init__(self, config: Config, data: TrainingData, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        self.objective = build_objective(config)

    @torch.no_grad()
    def losses(self, model: DiT) -> dict[str, float | None]:
        """`loss_val`, and `loss_val_t0` to `loss_val_t3` for the quarters of the objective's time; collective.

        None for a quarter that no image fell into. Every rank makes the same number of forward passes: the last ones
        are filled up with images that do not count.
        """
        micro, images = self.config.train.micro_batch_size, self.config.validation.images
        rank, world_size = dist.get_rank(), dist.get_world_size()
        together = micro * world_size
        loader = TrainingLoader(
            self.data,
            BatchSplit(together, micro, rank, world_size),
            seed=self.config.seed,
            num_workers=self.config.data.workers,
        )
        sums_2B = torch.zeros(2, TIME_BUCKETS, dtype=torch.float64, device=self.device)
        for start in range(0, images, together):
            first = start + rank * micro
            batch = next(loader).to(self.device)
            z, t, y = noisy_inputs(batch, self.objective, self.config)
            output = model(z, self.objective.model_time(t), y)
            of_images = self.objective.losses(output.prediction, output.variance, batch.images, batch.noise, t)
            counts_N = (first + torch.arange(micro, device=t.device) < images).double()
            losses_N = of_images["diffusion"].double() * counts_N
            sums_2B.index_add_(1, _bucket(t), torch.stack([losses_N, counts_N]))
        loader.close()
        dist.all_reduce(sums_2B)
        means = {f"loss_val_t{bucket}": _ratio(sums_2B[:, bucket]) for bucket in range(TIME_BUCKETS)}
        losses = {"loss_val": _ratio(sums_2B.sum(dim=1)), **means}
        logger.info("validation loss %.5f", losses["loss_val"])
        return losses


def _bucket(t_N: Tensor) -> Tensor:
    """The quarter of the time axis of each time, (N,): of 0 to 1 for a flow, of the steps 0 to 999 for DDPM."""
    fraction_N = t_N if t_N.is_floating_point() else t_N / DDPM_STEPS
    return (fraction_N * TIME_BUCKETS).long().clamp(max=TIME_BUCKETS - 1)


def _ratio(sum_and_count: Tensor) -> float | None:
    total, count = sum_and_count.tolist()
    return total / count if count else None
