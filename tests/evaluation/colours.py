"""Extractors of a user's own, as --features tests.evaluation.colours:NAME names them."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def colours(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 to (N, 12): the mean of each channel in each quarter of the image."""
    return F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def too_many_axes(images: Tensor) -> Tensor:
    return images.float()


def broken(images: Tensor) -> Tensor:
    return colours(images) / 0


def brightness(images_NHWC: np.ndarray) -> float:
    """A metric, as --score names it."""
    assert images_NHWC.dtype == np.uint8
    assert not dist.is_initialized(), "other ranks wait for this metric"
    return float(images_NHWC.mean())


def failing(images_NHWC: np.ndarray) -> float:
    raise RuntimeError("of the metric")
