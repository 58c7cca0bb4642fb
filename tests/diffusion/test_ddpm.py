"""The DDPM objective against slow evaluations of its definitions, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffmoe_dist.diffusion.objectives import DDPM

TIMES = [1, 2, 10, 300, 998, 999]


@pytest.fixture(scope="module")
def ddpm() -> DDPM:
    return DDPM()


def beta(t: int) -> float:
    return 1e-4 + t * (0.02 - 1e-4) / 999


def alpha_bar(t: int) -> float:
    product = 1.0
    for earlier in range(t + 1):
        product *= 1 - beta(earlier)
    return product


def posterior(x: float, z: float, t: int) -> tuple[float, float]:
    """Mean and variance of q(z_{t-1} | z_t, x), by Bayes' rule from q(z_{t-1} | x) and q(z_t | z_{t-1})."""
    before = alpha_bar(t - 1)
    precision = 1 / (1 - before) + (1 - beta(t)) / beta(t)
    mean = (math.sqrt(before) * x / (1 - before) + math.sqrt(1 - beta(t)) * z / beta(t)) / precision
    return mean, 1 / precision


def learned_variance(v: float, t: int) -> float:
    """Between the posterior variance (v = -1; at t = 0 that of t = 1) and beta (v = 1), in logarithms."""
    smallest = posterior(0.0, 0.0, max(t, 1))[1]
    return math.exp((v + 1) / 2 * math.log(beta(t)) + (1 - v) / 2 * math.log(smallest))


def step_back(z: float, epsilon: float, v: float, t: int) -> tuple[float, float]:
    """Mean and variance of the model's p(z_{t-1} | z_t); at t = 0 of the image."""
    x = (z - math.sqrt(1 - alpha_bar(t)) * epsilon) / math.sqrt(alpha_bar(t))
    return posterior(x, z, t)[0] if t else x, learned_variance(v, t)


def log_density(at: Tensor, mean: float, variance: float) -> Tensor:
    return -0.5 * ((at - mean) ** 2 / variance + math.log(2 * math.pi * variance))


def scalar(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def bound(ddpm: DDPM, x: float, noise: float, epsilon: float, v: float, t: int) -> float:
    losses = ddpm.losses(scalar(epsilon), scalar(v), scalar(x), scalar(noise), torch.tensor([t]))
    assert tuple(losses) == ddpm.loss_names
    return losses["variational"].item()


def test_the_noisy_image_mixes_data_and_noise_by_a_slow_product_of_alphas(ddpm: DDPM) -> None:
    times = torch.tensor([0, *TIMES])
    x, noise = torch.randn(2, len(times), 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    z = ddpm.corrupt(x, noise, times)

    for image, t in enumerate(times.tolist()):
        expected = math.sqrt(alpha_bar(t)) * x[image] + math.sqrt(1 - alpha_bar(t)) * noise[image]
        # diffusers' betas are rounded to fp32, each by up to 6e-8 of itself.
        assert torch.allclose(z[image], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("v", [-1.0, -0.3, 1.0, 1.4])
@pytest.mark.parametrize(("x", "noise", "epsilon"), [(0.3, 0.8, 0.7), (-1.0, -1.2, 0.9), (0.5, 0.1, 0.1)])
def test_the_variational_loss_is_the_integral_of_q_log_q_over_p(
    ddpm: DDPM, t: int, v: float, x: float, noise: float, epsilon: float
) -> None:
    z = math.sqrt(alpha_bar(t)) * x + math.sqrt(1 - alpha_bar(t)) * noise
    mean, variance = posterior(x, z, t)
    deviation = math.sqrt(variance)
    grid = torch.linspace(mean - 12 * deviation, mean + 12 * deviation, 100_001, dtype=torch.float64)
    log_q, log_p = log_density(grid, mean, variance), log_density(grid, *step_back(z, epsilon, v, t))
    kl = torch.trapezoid(log_q.exp() * (log_q - log_p), grid).item()

    # With the noise predicted and the variances equal there is no KL but that of diffusers' fp32 betas.
    assert bound(ddpm, x, noise, epsilon, v, t) == pytest.approx(kl / math.log(2), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("v", [-1.0, 0.2, 1.0])
@pytest.mark.parametrize(("noise", "epsilon"), [(0.8, 0.7), (-1.2, 1.9), (2.0, -1.9)])
@pytest.mark.parametrize("level", [0, 1, 100, 254, 255])
def test_at_time_zero_it_is_the_integral_over_the_bin_of_an_8_bit_image(
    ddpm: DDPM, v: float, noise: float, epsilon: float, level: int
) -> None:
    x = level / 127.5 - 1
    z = math.sqrt(alpha_bar(0)) * x + math.sqrt(1 - alpha_bar(0)) * noise
    mean, variance = step_back(z, epsilon, v, t=0)
    far = 12 * math.sqrt(variance) + abs(mean - x)  # the outermost bins are open
    low = x - far if level == 0 else x - 1 / 255
    high = x + far if level == 255 else x + 1 / 255
    grid = torch.linspace(low, high, 100_001, dtype=torch.float64)
    mass = torch.trapezoid(log_density(grid, mean, variance).exp(), grid).item()

    assert bound(ddpm, x, noise, epsilon, v, t=0) == pytest.approx(-math.log2(mass), rel=1e-5)


@pytest.mark.parametrize("side", [1, -1])
def test_at_time_zero_an_image_far_from_its_prediction_costs_a_finite_price_in_fp32(ddpm: DDPM, side: int) -> None:
    x, noise, variance = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, requires_grad=True)

    def price(epsilon: float) -> Tensor:
        return ddpm.losses(torch.full_like(x, side * epsilon), variance, x, noise, torch.tensor([0]))["variational"]

    # Ten deviations of 0.0086 away the mass is 1e-12 at the most, which is where the loss stops.
    price(12.0).sum().backward()
    assert price(12.0).item() == pytest.approx(12 * math.log2(10), rel=1e-5)
    assert variance.grad is not None and variance.grad.isfinite().all()
    # Five deviations away fp32 still has the mass, on either side of the mean.
    assert price(5.0).item() == pytest.approx(bound(ddpm, 0.0, 0.0, side * 5.0, 0.0, 0), rel=1e-4)


def test_the_learned_variance_is_interpolated_in_logarithms_between_its_ends(ddpm: DDPM) -> None:
    """With the noise predicted exactly the KL is a function of the ratio r of the variances: (r - 1 - log r) / 2."""
    t = 4
    # By hand: abar_3 and abar_4 from the betas 1, 1.199.., 1.398.., 1.597.., 1.796.. of 1e-4.
    before = (1 - 1e-4) * (1 - 1.199199e-4) * (1 - 1.398398e-4) * (1 - 1.597598e-4)
    longest = 1.796797e-4
    shortest = (1 - before) / (1 - before * (1 - longest)) * longest
    for v, expected in [(-1.0, shortest), (0.0, math.sqrt(shortest * longest)), (1.0, longest)]:
        ratio = shortest / expected
        by_hand = (ratio - 1 - math.log(ratio)) / 2 / math.log(2)
        assert bound(ddpm, 0.5, 0.1, 0.1, v, t) == pytest.approx(by_hand, rel=1e-4, abs=1e-12)


def test_the_losses_of_an_image_are_means_over_its_own_pixels(ddpm: DDPM) -> None:
    x, noise, epsilon, variance = torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    times = torch.tensor([0, 5, 700])

    losses = ddpm.losses(epsilon, variance, x, noise, times)

    for image in range(3):
        here = slice(image, image + 1)
        alone = ddpm.losses(epsilon[here], variance[here], x[here], noise[here], times[here])
        assert losses["variational"][image] == pytest.approx(alone["variational"].item(), rel=1e-12)
        pixels = [
            bound(ddpm, *values, t=int(times[image]))
            for values in zip(
                x[image].flatten().tolist(), noise[image].flatten().tolist(),
                epsilon[image].flatten().tolist(), variance[image].flatten().tolist(), strict=True,
            )
        ]  # fmt: skip
        assert losses["variational"][image] == pytest.approx(sum(pixels) / 32, rel=1e-9)
        assert losses["diffusion"][image] == pytest.approx(((epsilon - noise)[image] ** 2).mean().item(), rel=1e-9)


@pytest.mark.parametrize("t", [0, 1, 999])
def test_the_variational_loss_trains_the_variance_alone_and_the_other_the_noise(ddpm: DDPM, t: int) -> None:
    x, noise = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    epsilon, variance = torch.zeros_like(x, requires_grad=True), torch.zeros_like(x, requires_grad=True)

    losses = ddpm.losses(epsilon, variance, x, noise, torch.full((2,), t))

    of_bound = torch.autograd.grad(
        losses["variational"].sum(), [epsilon, variance], allow_unused=True, retain_graph=True
    )
    of_error = torch.autograd.grad(losses["diffusion"].sum(), [epsilon, variance], allow_unused=True)
    assert of_bound[0] is None and of_bound[1] is not None and of_bound[1].all()
    assert of_error[0] is not None and of_error[0].all() and of_error[1] is None


def test_without_a_learned_variance_the_error_of_the_noise_is_the_only_loss() -> None:
    x, noise, epsilon = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    fixed = DDPM(learned_variance=False)

    losses = fixed.losses(epsilon, None, x, noise, torch.tensor([0, 700]))

    assert tuple(losses) == fixed.loss_names == ("diffusion",)
    assert losses["diffusion"].tolist() == pytest.approx(
        ((epsilon - noise) ** 2).mean(dim=(1, 2, 3)).tolist(), rel=1e-6
    )


@pytest.mark.parametrize("learned", [True, False])
def test_min_snr_weights_the_error_of_an_image_by_its_signal_to_noise_ratio(ddpm: DDPM, learned: bool) -> None:
    times = [0, 10, 200, 300, 999]
    x, noise, epsilon, variance = torch.randn(4, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    weighted = DDPM(learned, min_snr_gamma=5.0).losses(epsilon, variance, x, noise, torch.tensor(times))
    plain = ddpm.losses(epsilon, variance, x, noise, torch.tensor(times))

    weights = [min(alpha_bar(t) / (1 - alpha_bar(t)), 5.0) / (alpha_bar(t) / (1 - alpha_bar(t))) for t in times]
    assert weights[0] < 0.001 and weights[1] < 0.1 and weights[3:] == [1.0, 1.0]
    for image, weight in enumerate(weights):
        assert float(weighted["diffusion"][image]) == pytest.approx(weight * float(plain["diffusion"][image]), rel=1e-4)
    assert not learned or torch.equal(weighted["variational"], plain["variational"])


def test_times_are_the_thousand_steps_equally_often(ddpm: DDPM) -> None:
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000

    times = ddpm.times(uniform)

    assert times.dtype == torch.int64
    assert torch.equal(times.bincount(), torch.full((1000,), 10))


def test_the_ends_of_the_uniform_numbers_are_the_first_and_the_last_step(ddpm: DDPM) -> None:
    ends = torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64)

    assert ddpm.times(ends).tolist() == [0, 999]
    assert ddpm.model_time(ddpm.times(ends)).tolist() == [0.0, 999.0]
    assert ddpm.model_time(ddpm.times(ends)).dtype == torch.float32
