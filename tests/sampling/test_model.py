"""The model of a sampling job: whole on each rank, or with its experts sharded over them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.diffusion.samplers import Guidance
from diffmoe_dist.engine.checkpoint import find_checkpoint, read_checkpoint_model
from diffmoe_dist.launch import Launch
from diffmoe_dist.sampling.conditions import ClassLabels
from diffmoe_dist.sampling.generate import SamplerSettings, generate
from diffmoe_dist.sampling.model import shard_experts, weights_fingerprint
from tests.distributed import run_ranks

CPU = torch.device("cpu")
LABELS = [number % 10 for number in range(8)]


def sample_part(rank: int, ranks: int, run: Path, cases: list[tuple[int, int]]) -> list[dict[int, Tensor]]:
    """For each (batch size, ranks that the experts are sharded over) the images of this rank's blocks, by number."""
    sampled = []
    for batch_size, expert in cases:
        launch = Launch(rank, ranks, rank, "environment")
        spread = partial(shard_experts, expert=expert, device=CPU, launch=launch) if expert > 1 else None
        model, config = read_checkpoint_model(find_checkpoint(run), CPU, spread=spread)
        blocks = [list(range(start, min(start + batch_size, 8))) for start in range(0, 8, batch_size)]
        images: dict[int, Tensor] = {}
        for turn in range(-(-len(blocks) // ranks)):
            place = turn * ranks + rank
            numbers = blocks[place] if place < len(blocks) else blocks[0]
            if place < len(blocks) or expert > 1:
                result = generate(
                    model, build_objective(config), numbers, ClassLabels(LABELS, 10),
                    SamplerSettings("euler", steps=10, guidance=Guidance(2.0), seed=3),
                )  # fmt: skip
                if place < len(blocks):
                    images |= dict(zip(numbers, result.images, strict=True))
        sampled.append(images)
    return sampled


def test_with_the_threshold_rule_an_image_is_the_same_on_any_ranks_in_any_batch_and_with_experts_sharded_or_not(
    trained: Path,
) -> None:
    (reference,) = sample_part(0, 1, trained, [(8, 1)])
    cases = {1: [(1, 1), (3, 1), (8, 1)], 2: [(1, 1), (3, 1), (8, 1), (1, 2), (4, 2)]}
    cases[4] = [(1, 1), (3, 1), (8, 1), (1, 4), (2, 2), (8, 4)]

    for ranks, of_ranks in cases.items():
        everyone = run_ranks(ranks, sample_part, trained, of_ranks)
        for case, shares in zip(of_ranks, zip(*everyone, strict=True), strict=True):
            images = {number: image for share in shares for number, image in share.items()}
            assert sorted(images) == list(range(8)), (ranks, case)
            for number, image in images.items():
                # Batches of another size round the matrix products differently.
                assert torch.allclose(image, reference[number], rtol=0, atol=1e-5), (ranks, case, number)
    assert not torch.allclose(reference[0], reference[1], atol=0.1)


def test_the_fingerprint_of_weights_is_that_of_all_of_them_wherever_the_experts_are(trained: Path) -> None:
    model, _ = read_checkpoint_model(find_checkpoint(trained), CPU)
    whole = weights_fingerprint(model, is_sharded=False)

    assert run_ranks(2, sharded_fingerprint, trained) == [whole, whole]
    layer: Any = model.moe_layers[0]
    layer.experts.w1[3, 0, 0] += 1e-6
    assert weights_fingerprint(model, is_sharded=False) != whole
    layer.experts.w1[3, 0, 0] -= 1e-6
    layer.router.threshold[0] += 1e-3
    assert weights_fingerprint(model, is_sharded=False) != whole


def sharded_fingerprint(rank: int, ranks: int, run: Path) -> str:
    launch = Launch(rank, ranks, rank, "environment")
    spread = partial(shard_experts, expert=ranks, device=CPU, launch=launch)
    model, _ = read_checkpoint_model(find_checkpoint(run), CPU, spread=spread)
    assert len(model.moe_layers[0].experts.w1) == 2
    return weights_fingerprint(model, is_sharded=True)
