"""The Frechet distance of a few samples during training: no FID-50K, but a curve that tells better from worse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from diffmoe_dist.config import Config
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.extractors import Extractor, open_features, open_inception
from diffmoe_dist.evaluation.metrics import Moments, Statistics
from diffmoe_dist.evaluation.reference import read_reference
from diffmoe_dist.evaluation.scores import add_up, count_name, distance_on_all_ranks
from diffmoe_dist.logs import logger
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.precision import tf32_products
from diffmoe_dist.sampling.conditions import Conditions
from diffmoe_dist.sampling.generate import Decode, generate, run_sampler, to_uint8


@dataclass(frozen=True)
class TrainingScores:
    """Samples images 0 to `fid.num` - 1 of the run's seed, on all ranks, and compares them with a reference."""

    config: Config
    extractor: Extractor
    reference: Statistics
    decode: Decode
    conditions: Conditions

    def __call__(self, model: DiT) -> dict[str, float | None]:
        """The score by the name it has in metrics.jsonl; collective. Every rank makes the same forward passes.

        None where samples of any rank are not finite: as black images they would have a distance, too.
        """
        config, rank, ranks = self.config, dist.get_rank(), dist.get_world_size()
        num, batch = config.fid.num, config.train.micro_batch_size
        share = -(-num // ranks)
        objective = build_objective(config)
        moments = Moments(len(self.reference.mean_F), self.extractor.device)
        bad = moments.sums.new_zeros(1)
        for start in range(rank * share, (rank + 1) * share, batch):
            numbers = list(range(start, min(start + batch, (rank + 1) * share)))
            sampled = generate(model, objective, numbers, self.conditions, run_sampler(config))
            if sampled.non_finite is not None:
                logger.warning("scores: %s", sampled.non_finite)
                bad += sampled.non_finite.images
            images_NCHW = torch.from_numpy(to_uint8(self.decode(sampled.images))).permute(0, 3, 1, 2)
            with tf32_products(self.extractor.device, enabled=False):  # as the reference was made
                features_NF = self.extractor(images_NCHW).pooled_NF
            moments.add(features_NF[: max(0, num - start)])
        add_up([moments.sums, bad])
        name = f"{self.extractor.distance}_{count_name(num)}"
        if bad:
            return {name: None}
        distance = distance_on_all_ranks(moments, self.reference, rank)
        logger.info("scores: %s %.4f", name, distance)
        return {name: distance}


def open_training_scores(
    config: Config, conditions: Conditions, decode: Decode, device: torch.device
) -> TrainingScores:
    """The scores that `score` asks for.

    Args:
        decode: turns the model's images into pixels on `device`.

    Raises:
        UserError: the extractor or the reference cannot be used, or they do not fit each other.
    """
    settings = config.fid
    features, named = str(settings.features), f"fid.features={settings.features}"
    open_extractor = open_inception if features.endswith(".pth") else open_features
    extractor = open_extractor(features, device, named)
    of_reference = f"fid.reference={settings.reference}"
    reference = read_reference(Path(str(settings.reference)), extractor, of_reference).pooled
    size, channels = config.model.input_size, config.model.in_channels
    pixels = decode(torch.zeros(2, channels, size, size, device=device))
    probe = extractor(torch.from_numpy(to_uint8(pixels)).permute(0, 3, 1, 2)).pooled_NF
    if reference is None:
        raise UserError(f"{of_reference}: it has no statistics (mu, sigma); make one with --make-reference")
    if len(reference.mean_F) != probe.shape[1]:
        raise UserError(
            f"{of_reference}: its statistics are of {len(reference.mean_F)} features, but "
            f"{named} gives {probe.shape[1]}; make one of it with --make-reference"
        )
    return TrainingScores(config, extractor, reference.to(device), decode, conditions)
