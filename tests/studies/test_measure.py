"""What the study measures is the same for all models, and means what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffmoe_dist.config import Config, load_config
from diffmoe_dist.model.dit import DiT, initialize
from studies.routing.classifier import CLASSES, accuracy_by_class, load_classifier, look
from studies.routing.measure import BLOCK, losses_on
from studies.routing.picture import taken_by_experts
from studies.routing.results import LEVELS
from studies.routing.systems import BASE_CONFIG, SYSTEMS

PLACES = ["run_dir=run", "data.shards=train", "validation.shards=test"]
SMALL = ["model.depth=2", "model.hidden_size=32"]


def model_of(system: str) -> tuple[DiT, Config]:
    config = load_config(BASE_CONFIG, [*SYSTEMS[system].settings, *PLACES, *SMALL])
    model = DiT(config)
    initialize(model, 0)
    return model.eval().requires_grad_(False), config


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2 * BLOCK, 1, 28, 28)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8), torch.arange(2 * BLOCK) % CLASSES


def test_every_block_has_as_many_images_of_each_noise_level(images: tuple[Tensor, Tensor]) -> None:
    model, config = model_of("dense")

    losses_N, levels_N, load_LE = losses_on(model, config, *images)

    assert [block.bincount(minlength=LEVELS).tolist() for block in levels_N.split(BLOCK)] == [
        [BLOCK // LEVELS] * 10
    ] * 2
    assert losses_N.shape == (2 * BLOCK,) and losses_N.isfinite().all() and not load_LE.numel()


def test_models_are_measured_on_the_same_noise_and_times_so_that_equal_models_have_equal_losses(
    images: tuple[Tensor, Tensor],
) -> None:
    # The final layer starts at zero: whatever the experts, the prediction is 0 and the loss that of the target alone.
    first, second = (losses_on(*model_of(system), *images)[0] for system in ("dense", "prototype"))

    assert torch.equal(first, second)


def test_the_load_counts_every_choice_of_a_token(images: tuple[Tensor, Tensor]) -> None:
    load_LE = losses_on(*model_of("token_choice"), *images)[2]

    assert load_LE.shape == (1, 8) and load_LE.sum() == 2 * BLOCK * 49


def test_the_picture_shows_the_tokens_that_experts_take() -> None:
    model, _ = model_of("expert_choice")
    z, t = torch.randn(3, 1, 28, 28), torch.full((3,), 500.0)

    (taken_ENS,) = taken_by_experts(model, z, t, torch.arange(3))

    assert taken_ENS.shape == (8, 3, 49)
    assert (taken_ENS.sum(axis=2) == 6).all()  # of each image


def test_accuracy_is_told_class_by_class() -> None:
    labels = torch.arange(CLASSES).repeat(2)
    found = labels.clone()
    found[:2] = 9  # one of two of the first two classes

    assert accuracy_by_class(found, labels) == [0.5, 0.5, *[1.0] * 8]


def test_the_committed_classifier_gives_features_of_gray_images(images: tuple[Tensor, Tensor]) -> None:
    statistics, found = look(load_classifier(), images[0])

    assert len(statistics.mean_F) == 96 and statistics.mean_F.isfinite().all()
    assert found.shape == (2 * BLOCK,)
