"""Extractors of a user's own, as --features tests.evaluation.colours:NAME names them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def colours(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 to (N, 12): the mean of each channel in each quarter of the image."""
    return nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def too_many_axes(images: Tensor) -> Tensor:
    return images.float()


def broken(images: Tensor) -> Tensor:
    return colours(images) / 0


class Colours(nn.Module):
    """`colours` and a product of them with a weight, for any number of images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Linear(12, 5)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, images: Tensor) -> Tensor:
        quarters = nn.functional.avg_pool2d(images.float() / 255, 4)
        return self.mixing(quarters.reshape(images.shape[0], -1)) * self.scale
