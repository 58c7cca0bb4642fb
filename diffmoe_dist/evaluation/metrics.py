"""The numbers the field compares: FID, sFID, Inception score, precision, recall. From features, in fp64 sums.

Sums over images are kept as one flat tensor each, so that the ranks of a job add theirs up in one reduction.

Shape legend: N images, F features, K classes; R reference images, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPLIT_IMAGES = 5000  # the Inception score is the mean over splits of so many samples (ADM's evaluator)
NEIGHBOURS = 3  # precision and recall (ADM's evaluator)
_BLOCK_DISTANCES = 2**25  # distances computed at once: 128 MiB


@dataclass(frozen=True)
class Statistics:
    mean_F: Tensor  # fp64
    covariance_FF: Tensor  # fp64, the unbiased one

    def to(self, device: torch.device) -> Statistics:
        return Statistics(self.mean_F.to(device), self.covariance_FF.to(device))


class Moments:
    """Streaming mean and covariance of features."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.sums = torch.zeros(1 + width + width * width, dtype=torch.float64, device=device)

    def add(self, x_NF: Tensor) -> None:
        x_NF = x_NF.double()
        count, total_F, outer_FF = self._parts()
        count += len(x_NF)
        total_F += x_NF.sum(dim=0)
        outer_FF.addmm_(x_NF.T, x_NF)

    def statistics(self) -> Statistics:
        """Of everything added; at least two images."""
        count, total_F, outer_FF = self._parts()
        assert count >= 2, "one image has no covariance"
        mean_F = total_F / count
        return Statistics(mean_F, (outer_FF - count * torch.outer(mean_F, mean_F)) / (count - 1))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        count, total_F, outer = self.sums.split([1, self.width, self.width**2])
        return count, total_F, outer.view(self.width, self.width)


class ClassSums:
    """Streaming Inception score: the sums of each split of 5,000 samples, in their order."""

    def __init__(self, num_images: int, num_classes: int, device: torch.device) -> None:
        splits = -(-num_images // SPLIT_IMAGES)
        self.sums = torch.zeros(splits * (2 + num_classes), dtype=torch.float64, device=device)
        self.of_splits = self.sums.view(splits, 2 + num_classes)  # count, sum of p log p, sum of p by class

    def add(self, first: int, p_NK: Tensor) -> None:
        """Class probabilities of the samples `first`, `first` + 1, ..."""
        p_NK = p_NK.double()
        row = torch.cat([torch.ones_like(p_NK[:, :1]), torch.xlogy(p_NK, p_NK).sum(dim=1, keepdim=True), p_NK], dim=1)
        split_N = torch.arange(first, first + len(p_NK), device=p_NK.device) // SPLIT_IMAGES
        self.of_splits.index_add_(0, split_N, row)

    def score(self) -> float:
        """exp of the mean KL divergence of p(class | image) from p(class), averaged over the splits (Salimans 2016)."""
        count, negative_entropy, p_K = self.of_splits.split([1, 1, self.of_splits.shape[1] - 2], dim=1)
        marginal_K = p_K / count
        kl = (negative_entropy / count).squeeze(1) - torch.xlogy(marginal_K, marginal_K).sum(dim=1)
        return float(kl.exp().mean())


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, eq. 6).

    The trace of the root of S1 S2 is the sum of the roots of its eigenvalues, which are those of the symmetric
    S1^(1/2) S2 S1^(1/2).
    """
    variances, axes = torch.linalg.eigh(first.covariance_FF)
    root_FF = (axes * variances.clamp(min=0).sqrt()) @ axes.T
    product = torch.linalg.eigvalsh(root_FF @ second.covariance_FF @ root_FF)
    traces = first.covariance_FF.trace() + second.covariance_FF.trace()
    distance = (first.mean_F - second.mean_F).square().sum() + traces - 2 * product.clamp(min=0).sqrt().sum()
    return float(distance)


def neighbour_radii(rows_NF: Tensor, all_MF: Tensor) -> Tensor:
    """(N,) squared distance of each row, itself one of `all_MF`, to its third nearest neighbour among the others."""
    radii = [
        _squared_distances(block, all_MF).topk(NEIGHBOURS + 1, largest=False).values[:, -1]
        for block in rows_NF.split(_block_rows(all_MF))
    ]
    return torch.cat(radii) if radii else rows_NF.new_empty(0)


def count_inside(points_NF: Tensor, centres_MF: Tensor, squared_radii_M: Tensor) -> int:
    """How many points lie in the manifold of the centres: within the radius of at least one of them.

    Of samples in the references' manifold that is precision, of references in the samples' recall (Kynkaanniemi et al.
    2019, eq. 1 and 2).
    """
    return sum(
        int((_squared_distances(block, centres_MF) <= squared_radii_M).any(dim=1).sum())
        for block in points_NF.split(_block_rows(centres_MF))
    )


def _block_rows(others: Tensor) -> int:
    return max(1, _BLOCK_DISTANCES // len(others))


def _squared_distances(x_NF: Tensor, y_MF: Tensor) -> Tensor:
    """(N, M), in the precision of the features."""
    lengths = x_NF.square().sum(dim=1)[:, None] + y_MF.square().sum(dim=1)
    return torch.addmm(lengths, x_NF, y_MF.T, alpha=-2).clamp(min=0)
