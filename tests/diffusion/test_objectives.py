from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, SigmoidTransform, TransformedDistribution

from diffmoe_dist.config import OBJECTIVE_DEFAULTS, ObjectiveConfig, build_config
from diffmoe_dist.diffusion.objectives import DDPM, RectifiedFlow, build_objective

DIRECTIONS = ["data_at_one", "noise_at_one"]


def make_flow(**settings: Any) -> RectifiedFlow:
    return RectifiedFlow(ObjectiveConfig("flow", **{**OBJECTIVE_DEFAULTS["flow"], **settings}))


def flow_loss(flow: RectifiedFlow, prediction: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    losses = flow.losses(prediction, None, x, noise, torch.full((len(x),), 0.3))
    assert tuple(losses) == flow.loss_names == ("diffusion",)
    return losses["diffusion"]


def make_pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    x, noise = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return x, noise


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_ends_of_the_path_are_exactly_the_data_and_the_noise(direction: str) -> None:
    flow = make_flow(direction=direction)
    x, noise = make_pair()

    at_one, at_zero = flow.corrupt(x, noise, torch.ones(5)), flow.corrupt(x, noise, torch.zeros(5))

    data_end, noise_end = (at_one, at_zero) if direction == "data_at_one" else (at_zero, at_one)
    assert torch.equal(data_end, x) and torch.equal(noise_end, noise)
    assert flow.data_time == (1.0 if direction == "data_at_one" else 0.0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_image_is_mixed_by_its_own_time(direction: str) -> None:
    flow = make_flow(direction=direction)
    x, noise = make_pair()
    times = [0.0, 0.25, 0.5, 0.75, 1.0]

    z = flow.corrupt(x, noise, torch.tensor(times))

    for image, t in enumerate(times):
        weight = t if direction == "data_at_one" else 1 - t
        assert torch.allclose(z[image], weight * x[image] + (1 - weight) * noise[image], atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_target_is_the_derivative_of_the_path(direction: str) -> None:
    flow = make_flow(direction=direction)
    x, noise = (values.double() for values in make_pair())
    t, step = torch.full((5,), 0.3, dtype=torch.float64), 1e-3

    slope = (flow.corrupt(x, noise, t + step) - flow.corrupt(x, noise, t - step)) / (2 * step)

    assert torch.allclose(flow.target(x, noise), slope, atol=1e-10)  # the path is straight: no error but rounding


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_perfect_prediction_has_no_loss(direction: str) -> None:
    flow = make_flow(direction=direction)
    x, noise = make_pair()
    velocity = x - noise if direction == "data_at_one" else noise - x

    assert not flow_loss(flow, velocity, x, noise).any()
    assert flow_loss(flow, -velocity, x, noise).all()


def test_the_loss_of_an_image_is_the_mean_square_over_its_own_pixels() -> None:
    flow = make_flow()
    x, noise = make_pair()
    off = torch.zeros_like(x)
    off[1] = 2.0
    off[3, 0, 0, 0] = 6.0  # 36 over 48 pixels

    loss = flow_loss(flow, x - noise + off, x, noise)

    assert loss.tolist() == pytest.approx([0.0, 4.0, 0.0, 0.75, 0.0], abs=1e-5)


def test_logit_normal_times_are_the_quantiles_of_the_distribution() -> None:
    uniform = torch.tensor([1e-9, 1e-4, 0.02, 0.3, 0.5, 0.77, 0.999, 1 - 1e-9], dtype=torch.float64)
    logit_normal = TransformedDistribution(
        Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)), [SigmoidTransform()]
    )

    times = make_flow(time_distribution="logit_normal").times(uniform)

    assert times.dtype == torch.float32
    assert torch.allclose(times.double(), logit_normal.icdf(uniform), rtol=1e-6, atol=0)  # computed in fp64
    assert times[4] == 0.5


@pytest.mark.parametrize(("mean", "deviation"), [(-0.7, 1.0), (0.5, 0.4)])
def test_the_logit_of_a_time_has_the_mean_and_the_deviation_that_are_set(mean: float, deviation: float) -> None:
    uniform = torch.tensor([1e-4, 0.02, 0.3, 0.5, 0.77, 0.999], dtype=torch.float64)
    normal = Normal(*torch.tensor([mean, deviation], dtype=torch.float64))

    times = make_flow(time_distribution="logit_normal", logit_mean=mean, logit_std=deviation).times(uniform)

    assert torch.allclose(
        times.double(), TransformedDistribution(normal, [SigmoidTransform()]).icdf(uniform), rtol=1e-6
    )


@pytest.mark.parametrize("scale", [-1.0, 0.8, 1.29, 1.75])
def test_mode_weighted_times_are_those_of_the_paper(scale: float) -> None:
    uniform = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)

    times = make_flow(time_distribution="mode", mode_scale=scale).times(uniform).double()

    # SD3, section 3.1: f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), which falls from 1 to 0.
    for u, time in zip(uniform.tolist(), times.tolist(), strict=True):
        v = 1 - u
        assert time == pytest.approx(1 - v - scale * (math.cos(math.pi / 2 * v) ** 2 - 1 + v), abs=1e-6)
    assert (times.diff() > 0).all() and times[0] > 0 and times[-1] < 1
    middle = ((times > 0.25) & (times < 0.75)).double().mean()
    assert (middle > 0.5) == (scale > 0), "a positive scale favours the middle"


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_a_time_shift_multiplies_noise_over_data_in_either_direction(distribution: str) -> None:
    uniform = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for direction in DIRECTIONS:
        plain, shifted = (
            make_flow(direction=direction, time_distribution=distribution, time_shift=shift).times(uniform).double()
            for shift in (1.0, 3.0)
        )
        sigma, after = (plain, shifted) if direction == "noise_at_one" else (1 - plain, 1 - shifted)
        assert torch.allclose(after / (1 - after), 3 * sigma / (1 - sigma), rtol=1e-4)
        assert torch.allclose(after, 3 * sigma / (1 + 2 * sigma), atol=1e-6)  # SD3, eq. 23


def test_uniform_times_are_the_numbers_themselves() -> None:
    uniform = torch.tensor([0.001, 0.25, 0.5, 0.9], dtype=torch.float64)

    assert torch.equal(make_flow().times(uniform), uniform.float())


def test_the_model_is_given_the_scaled_time() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])

    assert make_flow(time_scale=1000.0).model_time(t).tolist() == [0.0, 250.0, 1000.0]


def test_a_flow_leaves_the_variance_channels_of_the_published_models_alone() -> None:
    x, noise = make_pair()
    variance = torch.zeros_like(x, requires_grad=True)
    prediction = torch.zeros_like(x, requires_grad=True)

    losses = make_flow().losses(prediction, variance, x, noise, torch.full((5,), 0.3))
    torch.stack([loss.sum() for loss in losses.values()]).sum().backward()

    assert variance.grad is None and prediction.grad is not None


def test_each_objective_is_built_by_its_name() -> None:
    model = {"size": "S"}
    assert isinstance(build_objective(build_config({"model": model}, training=False)), RectifiedFlow)
    for learned in (True, False):
        settings = {"model": {**model, "learn_sigma": learned}, "objective": {"name": "ddpm"}}
        objective = build_objective(build_config(settings, training=False))
        assert isinstance(objective, DDPM) and objective.learned_variance == learned
