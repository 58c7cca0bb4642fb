from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor, nn

from diffmoe_dist.evaluation import metrics
from diffmoe_dist.evaluation.metrics import (
    ClassSums,
    Moments,
    Statistics,
    count_inside,
    frechet_distance,
    neighbour_radii,
)

CPU = torch.device("cpu")


def features(num: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, of different scales, all positive, as those of the Inception network."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    return (torch.randn(num, width, generator=generator, dtype=torch.float64) @ mixing + shift).abs()


def statistics(x_NF: Tensor, batches: int = 3) -> Statistics:
    moments = Moments(x_NF.shape[1], CPU)
    for batch in x_NF.tensor_split(batches):
        moments.add(batch)
    return moments.statistics()


def test_streaming_sums_are_the_mean_and_the_covariance_of_all_at_once() -> None:
    x = features(301, 24, seed=0, shift=3.0)
    for batches in (1, 7, 301):
        found = statistics(x, batches)
        np.testing.assert_allclose(found.mean_F, x.mean(dim=0), rtol=1e-13)
        # The covariance is a difference of sums 100 times as large.
        np.testing.assert_allclose(found.covariance_FF, np.cov(x.numpy(), rowvar=False), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num", "width"), [(400, 32), (1000, 96)])
def test_fid_is_scipys_matrix_root(num: int, width: int) -> None:
    first, second = features(num, width, seed=1), features(num + 50, width, seed=2, shift=0.3)
    a, b = (np.cov(x.numpy(), rowvar=False) for x in (first, second))
    shift = first.mean(dim=0) - second.mean(dim=0)
    expected = float(shift @ shift) + np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b)).real
    assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(expected, abs=1e-6, rel=0)
    assert frechet_distance(statistics(second), statistics(first)) == pytest.approx(expected, abs=1e-6, rel=0)
    assert expected > 0.1


def test_fid_is_that_of_torchmetrics() -> None:
    from torchmetrics.image import fid

    class Itself(nn.Module):
        num_features = 32

        def forward(self, x: Tensor) -> Tensor:
            return x

    theirs = fid.FrechetInceptionDistance(feature=Itself()).set_dtype(torch.float64)
    first, second = features(400, 32, seed=3), features(333, 32, seed=4, shift=0.2)
    theirs.update(first, real=True)
    theirs.update(second, real=False)
    ours = frechet_distance(statistics(first), statistics(second))
    assert ours == pytest.approx(float(theirs.compute()), abs=1e-6, rel=0)


def test_fid_of_gaussians_on_common_axes_is_the_closed_form() -> None:
    mean = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    a, b = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 2.0]).double()
    distance = frechet_distance(Statistics(mean, a.diag()), Statistics(torch.zeros(3).double(), b.diag()))
    # 1 + 4 from the means; (2 - 1)^2, (1 - 3)^2 and (0 - sqrt 2)^2 from the spreads
    assert distance == pytest.approx(5 + 1 + 4 + 2, abs=1e-12)


def test_fid_of_fewer_samples_than_features_is_that_of_the_roots_of_the_eigenvalues() -> None:
    """The covariance is singular; an independent way: the singular values of the two factors' product."""
    first, second = features(20, 48, seed=5), features(30, 48, seed=6)
    a, b = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (first, second))
    shift = first.mean(dim=0) - second.mean(dim=0)
    roots = torch.linalg.svdvals(a @ b.T).sum()
    expected = float(shift @ shift + a.square().sum() + b.square().sum() - 2 * roots)
    # A zero eigenvalue comes out as 1e-17, its root as 3e-9; there are 28 of them.
    assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(expected, abs=1e-6, rel=0)


def test_the_inception_score_is_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SPLIT_IMAGES", 2)
    # First split: two sure images of two classes, KL = ln 2 each. Second: p = (3/4, 1/4) twice, KL = 0. Third: one.
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.75, 0.25], [0.75, 0.25], [0.5, 0.5]])
    for cuts in ([5], [1, 4], [3, 2]):
        sums, done = ClassSums(5, 2, CPU), 0
        for batch in p.split(cuts):
            sums.add(done, batch)
            done += len(batch)
        assert sums.score() == pytest.approx((2 + 1 + 1) / 3, abs=1e-12)


def test_the_inception_score_is_that_of_adms_evaluator_over_splits_of_5000() -> None:
    generator = torch.Generator().manual_seed(0)
    p = (4 * torch.randn(7000, 10, generator=generator)).double().softmax(dim=1)
    sums = ClassSums(7000, 10, CPU)
    for start in range(0, 7000, 640):
        sums.add(start, p[start : start + 640])
    parts = [part.numpy() for part in p.split(5000)]
    divergences = [np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0, keepdims=True))), 1)) for part in parts]
    assert sums.score() == pytest.approx(np.mean(np.exp(divergences)), rel=1e-12)
    assert sums.score() > 2


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_radii_and_manifolds_are_those_of_a_loop_over_pairs(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_DISTANCES", 40 * rows)
    centres, points = features(40, 6, seed=7).float(), features(55, 6, seed=8, shift=1.0).float()
    radii = [sorted(math.dist(a, b) for b in centres.tolist())[3] for a in centres.tolist()]  # 0 is itself
    np.testing.assert_allclose(neighbour_radii(centres, centres).sqrt(), radii, rtol=1e-4)
    inside = sum(
        any(math.dist(point, centre) <= radius for centre, radius in zip(centres.tolist(), radii, strict=True))
        for point in points.tolist()
    )
    assert count_inside(points, centres, neighbour_radii(centres, centres)) == inside
    assert 5 < inside < 50, "some, and not all"
