from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffmoe_dist.config import ObjectiveConfig
from diffmoe_dist.diffusion.objectives import RectifiedFlow
from diffmoe_dist.diffusion.samplers import sample_euler, with_guidance

DIRECTIONS = ["data_at_one", "noise_at_one"]


def gaussian_denoiser(mean: float, std: float, direction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The expected velocity given z, where the data are N(mean, std^2)."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None, None]
        data = t if direction == "data_at_one" else 1 - t
        variance = data**2 * std**2 + (1 - data) ** 2
        surprise = (z - data * mean) / variance
        expected_data = mean + data * std**2 * surprise
        expected_noise = (1 - data) * surprise
        velocity = expected_data - expected_noise
        return velocity if direction == "data_at_one" else -velocity

    return denoise


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_euler_with_the_exact_denoiser_of_a_gaussian_recovers_its_mean_and_variance(direction: str) -> None:
    mean, std, steps = 1.5, 0.4, 400
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    flow = RectifiedFlow(ObjectiveConfig(direction=direction))

    images = sample_euler(gaussian_denoiser(mean, std, direction), noise, flow, steps)

    # Sample by sample the exact flow is noise -> mean + std * noise; Euler's error is of the order of 1 / steps.
    assert (images - (mean + std * noise)).abs().max() < 4 / steps
    # The 8,000 numbers' own mean is off by up to 4 * 0.4 / sqrt(8000), their deviation by 4 * 0.4 / sqrt(16000).
    assert images.mean().item() == pytest.approx(mean, abs=0.018 + 1 / steps)
    assert images.std().item() == pytest.approx(std, abs=0.013 + 1 / steps)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_constant_velocity_is_followed_exactly_whatever_the_steps(steps: int, direction: str) -> None:
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    data = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    flow = RectifiedFlow(ObjectiveConfig(direction=direction))

    images = sample_euler(lambda z, t: flow.target(data, noise), noise, flow, steps)

    assert torch.allclose(images, data, atol=1e-6)


@pytest.mark.parametrize(
    ("direction", "expected"), [("data_at_one", [0, 0.25, 0.5, 0.75]), ("noise_at_one", [1, 0.75, 0.5, 0.25])]
)
def test_euler_asks_at_the_start_of_each_step_for_unscaled_times(direction: str, expected: list[float]) -> None:
    asked: list[Tensor] = []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return torch.zeros_like(z)

    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    flow = RectifiedFlow(ObjectiveConfig(direction=direction, time_scale=1000.0))
    images = sample_euler(denoise, noise, flow, steps=4)

    assert torch.equal(images, noise)
    assert [t.tolist() for t in asked] == [[now] * 3 for now in expected]


class FakeModel:
    """Predicts a function of z, t and the label, and remembers the labels it was asked for."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []

    def __call__(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.labels.append(y.tolist())
        return z * (1 + y)[:, None, None, None] + t[:, None, None, None]


def test_guidance_of_scale_one_is_one_pass_with_the_labels() -> None:
    model, labels = FakeModel(), torch.tensor([3, 7])
    z, t = torch.ones(2, 1, 2, 2), torch.tensor([0.1, 0.2])

    prediction = with_guidance(model, labels, null_label=10, scale=1.0)(z, t)

    assert model.labels == [[3, 7]]
    assert torch.equal(prediction, FakeModel()(z, t, labels))


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guidance_goes_from_the_null_prediction_past_the_conditional_one(scale: float) -> None:
    model, labels = FakeModel(), torch.tensor([3, 7])
    z, t = torch.full((2, 1, 2, 2), 2.0), torch.tensor([0.1, 0.2])

    prediction = with_guidance(model, labels, null_label=10, scale=scale)(z, t)

    # By hand: null 2 * 11 + t, conditional 2 * 4 + t and 2 * 8 + t.
    expected = [22.1 + scale * (8.1 - 22.1), 22.2 + scale * (16.2 - 22.2)]
    assert prediction[:, 0, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert (prediction == prediction[:, :1, :1, :1]).all()
    assert sorted(model.labels) == [[3, 7], [10, 10]]  # two passes: null and conditional tokens share no pool


def test_guidance_acts_on_every_channel() -> None:
    z, t = torch.rand(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)) + 1, torch.zeros(2)
    labels = torch.tensor([3, 7])

    guided = with_guidance(FakeModel(), labels, null_label=10, scale=2.0)(z, t)

    assert torch.allclose(guided, z * torch.tensor([11 - 2 * 7, 11 - 2 * 3.0])[:, None, None, None], atol=1e-5)
