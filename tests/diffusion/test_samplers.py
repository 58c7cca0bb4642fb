from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from torchdiffeq import odeint

from diffmoe_dist.config import OBJECTIVE_DEFAULTS, ObjectiveConfig
from diffmoe_dist.diffusion.objectives import DDPM, DDPM_SCHEDULE, RectifiedFlow
from diffmoe_dist.diffusion.samplers import (
    ADAPTIVE,
    FIXED_GRID,
    Denoiser,
    Guidance,
    Prediction,
    ddim_stride,
    ddpm_chain,
    sample,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    with_guidance,
)

DIRECTIONS = ["data_at_one", "noise_at_one"]


def make_flow(**settings: Any) -> RectifiedFlow:
    return RectifiedFlow(ObjectiveConfig("flow", **{**OBJECTIVE_DEFAULTS["flow"], **settings}))


def gaussian_denoiser(mean: float, std: float, direction: str) -> Denoiser:
    """The expected velocity given z, where the data are N(mean, std^2)."""

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        t = t[:, None, None, None]
        data = t if direction == "data_at_one" else 1 - t
        variance = data**2 * std**2 + (1 - data) ** 2
        whitened = (z - data * mean) / variance
        expected_data = mean + data * std**2 * whitened
        expected_noise = (1 - data) * whitened
        velocity = expected_data - expected_noise
        return (velocity if direction == "data_at_one" else -velocity), None

    return denoise


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_euler_with_the_exact_denoiser_of_a_gaussian_recovers_its_mean_and_variance(direction: str) -> None:
    mean, std, steps = 1.5, 0.4, 400
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    flow = make_flow(direction=direction)

    images = sample("euler", gaussian_denoiser(mean, std, direction), noise, flow, steps, [])

    # Sample by sample the exact flow is noise -> mean + std * noise; Euler's error is of the order of 1 / steps.
    assert (images - (mean + std * noise)).abs().max() < 4 / steps
    # The 8,000 numbers' own mean is off by up to 4 * 0.4 / sqrt(8000), their deviation by 4 * 0.4 / sqrt(16000).
    assert images.mean().item() == pytest.approx(mean, abs=0.018 + 1 / steps)
    assert images.std().item() == pytest.approx(std, abs=0.013 + 1 / steps)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("sampler", "tolerance"), [("heun", 2e-3), ("dopri5", 1e-2)])
def test_heun_and_dopri5_with_the_exact_denoiser_of_a_gaussian_recover_its_moments(
    sampler: str, tolerance: float, direction: str
) -> None:
    mean, std = 1.5, 0.4
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    flow, steps = make_flow(direction=direction), 100 if sampler == "heun" else None

    images = sample(sampler, gaussian_denoiser(mean, std, direction), noise, flow, steps, [])

    # Sample by sample the exact flow is noise -> mean + std * noise. Heun's error is of the order of 1 / steps^2 with a
    # curvature of up to 1 / std^2, dopri5's is what its relative tolerance of 1e-3 leaves at 4 deviations.
    assert (images - (mean + std * noise)).abs().max() < tolerance
    assert images.mean().item() == pytest.approx(mean, abs=0.018 + tolerance)
    assert images.std().item() == pytest.approx(std, abs=0.013 + tolerance)


def test_heun_is_of_second_order() -> None:
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    errors = [
        (
            sample("heun", gaussian_denoiser(1.5, 0.4, "data_at_one"), noise, make_flow(), steps, [])
            - (1.5 + 0.4 * noise)
        )
        .abs()
        .max()
        .item()
        for steps in (40, 80)
    ]

    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def test_heun_asks_at_both_ends_of_each_step() -> None:
    asked: list[float] = []

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        asked.append(float(t[0]))
        return torch.full_like(z, float(t[0])), None

    images = sample("heun", denoise, torch.zeros(1, 1, 2, 2), make_flow(), 2, [])

    assert asked == [0.0, 0.5, 0.5, 1.0]
    assert images.flatten().tolist() == [0.5] * 4  # the integral of t, which the trapezoidal rule has exactly


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_dopri5_has_a_higher_nfe_where_the_flow_bends_more_and_none_beyond_the_ends(direction: str) -> None:
    noise = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    counts = []
    for std in (1.0, 0.02):
        calls: list[float] = []
        exact = gaussian_denoiser(0.0, std, direction)

        def denoise(z: Tensor, t: Tensor, exact: Denoiser = exact, calls: list[float] = calls) -> Prediction:
            calls.append(float(t[0]))
            return exact(z, t)

        sample("dopri5", denoise, noise, make_flow(direction=direction), None, [])
        counts.append(len(calls))
        # A step that ends on the last time asks for the number next to it.
        assert 0 <= min(calls) < 1e-6 and 1 - 1e-6 < max(calls) <= 1

    assert counts[0] < counts[1]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_constant_velocity_is_followed_exactly_whatever_the_steps(steps: int, direction: str) -> None:
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    data = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    flow = make_flow(direction=direction)

    images = sample("euler", lambda z, t: (flow.target(data, noise), None), noise, flow, steps, [])

    assert torch.allclose(images, data, atol=1e-6)


@pytest.mark.parametrize(
    ("direction", "expected"), [("data_at_one", [0, 0.25, 0.5, 0.75]), ("noise_at_one", [1, 0.75, 0.5, 0.25])]
)
def test_euler_asks_at_the_start_of_each_step_for_unscaled_times(direction: str, expected: list[float]) -> None:
    asked: list[Tensor] = []

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        asked.append(t)
        return torch.zeros_like(z), None

    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    flow = make_flow(direction=direction, time_scale=1000.0)
    images = sample("euler", denoise, noise, flow, 4, [])

    assert torch.equal(images, noise)
    assert [t.tolist() for t in asked] == [[now] * 3 for now in expected]


class FakeModel:
    """Predicts a function of z, t and the label, the label as variance, and remembers the labels it was asked for."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []

    def __call__(self, z: Tensor, t: Tensor, y: Tensor) -> Prediction:
        self.labels.append(y.tolist())
        return z * (1 + y)[:, None, None, None] + t[:, None, None, None], y[:, None, None, None].expand_as(z)


def guided_denoiser(model: FakeModel, labels: Tensor, guidance: Guidance) -> Denoiser:
    nulls = torch.full_like(labels, 10)
    return with_guidance(model, labels, nulls, lambda: torch.cat([labels, nulls]), guidance)


def test_guidance_of_scale_one_is_one_pass_with_the_labels() -> None:
    model, labels = FakeModel(), torch.tensor([3, 7])
    z, t = torch.ones(2, 1, 2, 2), torch.tensor([0.1, 0.2])

    prediction, variance = guided_denoiser(model, labels, Guidance(1.0))(z, t)

    assert model.labels == [[3, 7]]
    assert torch.equal(prediction, FakeModel()(z, t, labels)[0])
    assert variance is not None and variance[:, 0, 0, 0].tolist() == [3, 7]


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guidance_goes_from_the_unconditional_prediction_past_the_conditional_one(scale: float) -> None:
    model, labels = FakeModel(), torch.tensor([3, 7])
    z, t = torch.full((2, 1, 2, 2), 2.0), torch.tensor([0.1, 0.2])

    prediction, variance = guided_denoiser(model, labels, Guidance(scale))(z, t)

    # By hand: unconditional 2 * 11 + t, conditional 2 * 4 + t and 2 * 8 + t.
    expected = [22.1 + scale * (8.1 - 22.1), 22.2 + scale * (16.2 - 22.2)]
    assert prediction[:, 0, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert (prediction == prediction[:, :1, :1, :1]).all()
    assert sorted(model.labels) == [[3, 7], [10, 10]]  # two passes: no pool mixes unconditional and conditional tokens
    assert variance is not None and variance[:, 0, 0, 0].tolist() == [3, 7]  # the conditional pass's, unguided


def test_guidance_acts_on_every_channel() -> None:
    z, t = torch.rand(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)) + 1, torch.zeros(2)
    labels = torch.tensor([3, 7])

    guided, _ = guided_denoiser(FakeModel(), labels, Guidance(2.0))(z, t)

    assert torch.allclose(guided, z * torch.tensor([11 - 2 * 7, 11 - 2 * 3.0])[:, None, None, None], atol=1e-5)


def test_of_the_channels_that_are_not_guided_the_conditional_prediction_is_taken() -> None:
    z, t = torch.rand(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)) + 1, torch.zeros(2)
    labels = torch.tensor([3, 7])

    guided, _ = guided_denoiser(FakeModel(), labels, Guidance(2.0, channels=3))(z, t)
    everywhere, _ = guided_denoiser(FakeModel(), labels, Guidance(2.0))(z, t)

    assert torch.equal(guided[:, :3], everywhere[:, :3])
    assert torch.equal(guided[:, 3:], FakeModel()(z, t, labels)[0][:, 3:])


@pytest.mark.parametrize(("time", "guides"), [(0.0, False), (0.3, True), (0.5, True), (0.7, True), (0.75, False)])
def test_outside_its_interval_guidance_is_one_conditional_pass(time: float, guides: bool) -> None:
    model, labels, z = FakeModel(), torch.tensor([3, 7]), torch.ones(2, 1, 2, 2)
    denoise = guided_denoiser(model, labels, Guidance(2.0, interval=(0.3, 0.7)))

    denoise(z, torch.full((2,), time))

    assert model.labels == ([[10, 10], [3, 7]] if guides else [[3, 7]])


def test_an_interval_in_the_integer_times_of_a_ddpm_holds_its_ends() -> None:
    model = FakeModel()
    denoise = guided_denoiser(model, torch.tensor([3]), Guidance(2.0, interval=(200, 700)))

    for time in (199, 200, 700, 701):
        denoise(torch.ones(1, 1, 2, 2), torch.tensor([time]))

    assert model.labels == [[3], [10], [3], [10], [3], [3]]


def test_guidance_in_one_pass_is_that_of_two_where_no_pool_mixes_them() -> None:
    model, labels = FakeModel(), torch.tensor([3, 7])
    z, t = torch.rand(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.2])

    prediction, variance = guided_denoiser(model, labels, Guidance(1.5, one_pass=True))(z, t)
    two, variance_of_two = guided_denoiser(FakeModel(), labels, Guidance(1.5))(z, t)

    assert model.labels == [[3, 7, 10, 10]]
    assert torch.equal(prediction, two)
    assert variance is not None and variance_of_two is not None and torch.equal(variance, variance_of_two)


def alpha_bars() -> list[float]:
    """Of the steps 0..999, by a loop."""
    product, bars = 1.0, []
    for t in range(1000):
        product *= 1 - (1e-4 + t * (0.02 - 1e-4) / 999)
        bars.append(product)
    return bars


def gaussian_noise_denoiser(mean: float, std: float, chain: list[int]) -> Denoiser:
    """The expected noise given z, where the data are N(mean, std^2), and the variance of the true step back.

    Args:
        chain: the times that are visited, from the last to the first; the steps back are from each to the next.
    """
    bars = alpha_bars()
    before_of = dict(zip(chain, [*chain[1:], -1], strict=True))

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        assert t.dtype == torch.int64 and (t == t[0]).all()
        now, before = bars[t[0]], bars[before_of[int(t[0])]] if before_of[int(t[0])] >= 0 else 1.0
        total = now * std**2 + 1 - now
        epsilon = math.sqrt(1 - now) * (z - math.sqrt(now) * mean) / total
        if before == 1.0:
            return epsilon, torch.zeros_like(z)
        beta = 1 - now / before
        # Var(z_before | z_now), where Var(z_now) = total and Cov = sqrt(now / before) Var(z_before)
        total_before = before * std**2 + 1 - before
        true = total_before - (now / before) * total_before**2 / total
        shortest = (1 - before) / (1 - now) * beta
        fraction = math.log(true / shortest) / math.log(beta / shortest)
        return epsilon, torch.full_like(z, 2 * fraction - 1)

    return denoise


def make_generators(count: int, first_seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first_seed + image) for image in range(count)]


@pytest.mark.parametrize("steps", [1000, 50, 7])
@pytest.mark.parametrize("std", [0.4, 1.2])
def test_ddpm_with_the_exact_denoiser_and_variance_recovers_a_gaussian_on_chains_of_any_length(
    steps: int, std: float
) -> None:
    mean = 1.5  # outside [-1, 1]: nothing may clip it
    noise = torch.randn(40, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    denoise = gaussian_noise_denoiser(mean, std, ddpm_chain(steps))

    images = sample_ddpm(denoise, noise, steps, make_generators(40, first_seed=1))

    # The steps back of a Gaussian are Gaussian and therefore exact, whatever their length. What is left: 40,960
    # numbers' own mean and deviation, four times std / sqrt(40960) and std / sqrt(81920); and the last step, which adds
    # no noise and so leaves out a deviation of 0.01.
    assert images.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(40_960))
    assert images.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(81_920) + 0.0001)


@pytest.mark.parametrize(("steps", "tolerance"), [(1000, 0.014), (250, 0.04), (50, 0.16)])
def test_ddim_with_the_exact_denoiser_follows_the_flow_to_a_gaussian(steps: int, tolerance: float) -> None:
    mean, std = 1.5, 0.4
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    chain = list(range(0, 1000, 1000 // steps))[::-1]

    images = sample_ddim(gaussian_noise_denoiser(mean, std, chain), noise, steps)

    # Sample by sample the exact flow is noise -> mean + std * noise. The start, whose mean should be 0.01, costs
    # 0.01 everywhere; the steps are of first order, up to 7 / steps at 4 deviations.
    assert (images - (mean + std * noise)).abs().max() < tolerance
    assert images.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(8000) + 0.01)


@pytest.mark.parametrize(("steps", "tolerance"), [(100, 0.02), (20, 0.15)])
def test_dpm_solver_with_the_exact_denoiser_recovers_a_gaussian_in_few_steps(steps: int, tolerance: float) -> None:
    mean, std = 1.5, 0.4
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    chain = [round(step * 999 / steps) for step in range(steps, 0, -1)]

    images = sample_dpm_solver(gaussian_noise_denoiser(mean, std, chain), noise, steps)

    # Sample by sample the exact flow is noise -> mean + std * noise, from a start that is off by 0.01 in its mean. The
    # method is of second order: a fifth of the steps, up to 25 times the error, most of it at 4 deviations.
    assert (images - (mean + std * noise)).abs().max() < tolerance
    assert images.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(8000) + 0.01)
    assert images.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(16_000) + 0.2 * tolerance)


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("ddpm", 4, [999, 666, 333, 0]),
        ("ddpm", 6, [999, 799, 599, 400, 200, 0]),
        ("ddim", 4, [750, 500, 250, 0]),
        ("ddim", 5, [800, 600, 400, 200, 0]),
        ("dpm-solver++", 4, [999, 749, 500, 250]),
    ],
)
def test_the_samplers_visit_the_published_times(name: str, steps: int, expected: list[int]) -> None:
    asked = []

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        asked.append(t.tolist())
        return torch.zeros_like(z), torch.zeros_like(z)

    sample(name, denoise, torch.ones(2, 1, 4, 4), DDPM(), steps, make_generators(2))

    assert asked == [[t] * 2 for t in expected]


def test_a_ddpm_sample_does_not_depend_on_the_images_beside_it() -> None:
    noise = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    denoise = gaussian_noise_denoiser(0.5, 0.4, ddpm_chain(10))

    together = sample("ddpm", denoise, noise, DDPM(), 10, make_generators(5))

    for image in range(5):
        alone = sample("ddpm", denoise, noise[image : image + 1], DDPM(), 10, make_generators(1, first_seed=image))
        assert torch.equal(alone[0], together[image])
    others = sample("ddpm", denoise, noise, DDPM(), 10, make_generators(5, first_seed=9))
    assert not torch.isclose(others, together).any(), "the noise on the way is the generators'"


def test_ddim_samples_no_noise_after_the_start() -> None:
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    denoise = gaussian_noise_denoiser(0.5, 0.4, list(range(900, -1, -100)))
    generators = make_generators(2)

    first = sample("ddim", denoise, noise, DDPM(), 10, generators)
    again = sample("ddim", denoise, noise, DDPM(), 10, make_generators(2, first_seed=7))

    assert torch.equal(first, again)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, make_generators(2), strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", FIXED_GRID)
def test_a_fixed_grid_of_torchdiffeq_is_its_own_solution_at_the_last_of_all_times(name: str, direction: str) -> None:
    noise = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    denoise, ends = gaussian_denoiser(1.5, 0.4, direction), [0.0, 1.0] if direction == "data_at_one" else [1.0, 0.0]

    images = sample(name, denoise, noise, make_flow(direction=direction), 25, [])

    def velocity(t: Tensor, z: Tensor) -> Tensor:
        return denoise(z, t.expand(len(z)))[0]

    times = torch.linspace(ends[0], ends[1], 26, dtype=torch.float64).float()
    order = {"options": {"max_order": 4}} if "adams" in name else {}
    expected = odeint(velocity, noise, times, method=name, rtol=1e-3, atol=1e-6, **order)[-1]
    assert torch.allclose(images, expected, atol=1e-6)
    # Of second order and more: the exact flow is noise -> mean + std * noise.
    assert (images - (1.5 + 0.4 * noise)).abs().max() < 0.03


@pytest.mark.parametrize(("name", "order", "most"), [("explicit_adams", 3, 1), ("implicit_adams", 4, 5)])
def test_the_adams_samplers_are_of_order_3_and_4_on_equal_steps(name: str, order: int, most: int) -> None:
    noise = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for steps in (40, 80):
        asked: list[float] = []

        def denoise(z: Tensor, t: Tensor, asked: list[float] = asked) -> Prediction:
            asked.append(float(t[0]))
            return gaussian_denoiser(1.5, 0.4, "data_at_one")(z, t)

        images = sample(name, denoise, noise, make_flow(), steps, [])
        errors.append(float((images - (1.5 + 0.4 * noise)).abs().max()))
        of_step = (len(asked) - 2 * 4) / (steps - 2)  # after two of rk4
        assert of_step == most if most == 1 else 2 <= of_step <= most
    found = math.log2(errors[0] / errors[1])
    assert found == pytest.approx(order, abs=0.1) if most == 1 else found > order  # it leaves rounding alone


def test_heun2_is_heun() -> None:
    noise = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        sample(name, gaussian_denoiser(1.5, 0.4, "data_at_one"), noise, make_flow(), 10, [])
        for name in ("heun", "heun2")
    )
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name != "dopri5"])
def test_every_adaptive_method_recovers_a_gaussian_and_asks_nothing_beyond_the_ends(name: str) -> None:
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    asked: list[float] = []
    exact = gaussian_denoiser(1.5, 0.4, "noise_at_one")

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        asked.append(float(t[0]))
        return exact(z, t)

    images = sample(name, denoise, noise, make_flow(direction="noise_at_one"), None, [])

    assert (images - (1.5 + 0.4 * noise)).abs().max() < 5e-2
    assert 0 <= min(asked) < 1e-6 and 1 - 1e-6 < max(asked) <= 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sde_is_a_slow_euler_and_maruyama_with_the_score_of_the_velocity(direction: str) -> None:
    """SiT: drift v + sigma * score with sigma = 1 - d, noise sqrt(2 sigma h), and a last step of 0.04 without noise."""
    steps, noise = 6, torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    denoise = gaussian_denoiser(1.5, 0.4, direction)
    asked: list[float] = []

    def counted(z: Tensor, t: Tensor) -> Prediction:
        asked.append(float(t[0]))
        return denoise(z, t)

    images = sample("sde", counted, noise, make_flow(direction=direction), steps, make_generators(2))

    z, added = noise.double(), make_generators(2)
    weights = [0.96 * step / (steps - 1) for step in range(steps)] + [1.0]
    for data, after in itertools.pairwise(weights):
        sigma, length = 1 - data, after - data
        mean, std = 1.5, 0.4
        variance = data**2 * std**2 + sigma**2
        score = -(z - data * mean) / variance  # of the marginal, which is N(d mean, variance)
        velocity = (score * sigma + z) / data if data else z * 0 + mean - z  # d v - z = sigma score
        z = z + length * (velocity + sigma * score)
        if after < 1:
            noises = [torch.randn(1, 2, 2, generator=generator) for generator in added]
            z = z + math.sqrt(2 * sigma * length) * torch.stack(noises)
    assert torch.allclose(images.double(), z, atol=1e-5)
    times = weights[:-1] if direction == "data_at_one" else [1 - weight for weight in weights[:-1]]
    assert asked == pytest.approx(times, abs=1e-7) and len(asked) == steps


def test_sde_with_the_exact_denoiser_recovers_a_gaussian_whatever_is_beside_an_image() -> None:
    mean, std, steps = 1.5, 0.4, 250
    noise = torch.randn(40, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    denoise, flow = gaussian_denoiser(mean, std, "data_at_one"), make_flow()

    images = sample("sde", denoise, noise, flow, steps, make_generators(40, first_seed=1))

    # 40,960 numbers' own mean and deviation, and steps of first order.
    assert images.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(40_960) + 2 / steps)
    assert images.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(81_920) + 2 / steps)
    alone = sample("sde", denoise, noise[3:4], flow, steps, make_generators(1, first_seed=4))
    assert torch.equal(alone[0], images[3])


@pytest.mark.parametrize("name", ["euler", "heun", "rk4", "sde"])
def test_a_time_shift_moves_the_steps_towards_the_noise_alike_in_both_directions(name: str) -> None:
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images, asked = [], []
    for direction in DIRECTIONS:
        exact = gaussian_denoiser(1.5, 0.4, direction)
        levels: list[float] = []

        def denoise(z: Tensor, t: Tensor, exact: Denoiser = exact, levels: list[float] = levels) -> Prediction:
            levels.append(float(t[0]))
            return exact(z, t)

        flow = make_flow(direction=direction)
        images.append(sample(name, denoise, noise, flow, 4, make_generators(4), time_shift=3.0))
        asked.append(levels if direction == "noise_at_one" else [1 - level for level in levels])
    assert torch.allclose(images[0], images[1], atol=1e-5)
    assert asked[0] == pytest.approx(asked[1], abs=1e-6)
    if name == "euler":  # SD3, eq. 23: 3 s / (1 + 2 s)
        assert asked[0] == pytest.approx([1.0, 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5], abs=1e-6)


def test_the_chain_of_ddpm_is_the_published_one_at_every_number_of_steps() -> None:
    other = 0
    for steps in range(2, 1001):
        chain = ddpm_chain(steps)[::-1]
        direct = np.linspace(0, 999, steps).round().astype(int).tolist()
        # Each time is the multiple of the stride, rounded; where that is a half, either way.
        exact = [Fraction(999 * place, steps - 1) for place in range(steps)]
        assert all(abs(time - at) <= Fraction(1, 2) for time, at in zip(chain, exact, strict=True))
        assert chain[0] == 0 and chain[-1] == 999 and len(set(chain)) == steps
        other += chain != direct
    # The published function, run once for all numbers of steps, differs from the direct computation at so many, and
    # with 21 and 31 steps in the middle one.
    assert other == 278
    assert (ddpm_chain(21)[10], ddpm_chain(31)[15]) == (499, 500)
    assert np.linspace(0, 999, 21).round()[10] == 500 and np.linspace(0, 999, 31).round()[15] == 499


def test_ddim_takes_the_published_times_at_counts_that_do_not_divide_1000() -> None:
    asked: list[int] = []
    noise = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = gaussian_noise_denoiser(1.5, 0.4, list(range(992, -1, -31)))

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        asked.append(int(t[0]))
        return exact(z, t)

    images = sample_ddim(denoise, noise, 33)

    assert asked == list(range(992, -1, -31)) and len(asked) == 33
    assert (images - (1.5 + 0.4 * noise)).abs().max() < 0.25
    assert [steps for steps in range(1, 30) if ddim_stride(steps) is None] == [1]
    assert ddim_stride(300) is None and ddim_stride(1000) == 1


def test_ddim_is_that_of_diffusers_where_both_have_the_times() -> None:
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    denoise = gaussian_noise_denoiser(0.5, 0.4, list(range(980, -1, -20)))
    scheduler = DDIMScheduler(**DDPM_SCHEDULE, timestep_spacing="leading", clip_sample=False)
    scheduler.set_timesteps(50)
    z = noise
    for t in scheduler.timesteps:
        z = scheduler.step(denoise(z, t.expand(4))[0], t, z).prev_sample

    assert torch.allclose(sample_ddim(denoise, noise, 50), z, atol=1e-5)


@pytest.mark.parametrize("steps", [1000, 31, 7])
def test_ddpm_without_a_learned_variance_recovers_the_gaussian_that_its_fixed_one_is_of(steps: int) -> None:
    mean = 1.5
    noise = torch.randn(40, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = gaussian_noise_denoiser(mean, 1.0, ddpm_chain(steps))  # a step back has the variance beta
    objective = DDPM(learned_variance=False)

    images = sample("ddpm", lambda z, t: (exact(z, t)[0], None), noise, objective, steps, make_generators(40, 1))

    assert images.mean().item() == pytest.approx(mean, abs=4 / math.sqrt(40_960))
    assert images.std().item() == pytest.approx(1.0, abs=4 / math.sqrt(81_920) + 0.0001)
