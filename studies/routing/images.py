"""The images of a packed set as one tensor, in the order of their numbers.

Shape legend: N images, H = W image size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.data.format import LABEL_FIELD
from diffmoe_dist.data.images import decode_image
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.labels import label_in_payload


def read_images(shards: Path) -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) uint8 gray images and (N,) int64 labels of a folder of shards."""
    index = ShardIndex.open(shards)
    (image_field,) = index.image_fields
    images, labels = [], []
    for sample in range(index.num_samples):
        payloads = index.read(sample)
        images.append(np.asarray(decode_image(payloads[image_field], channels=1)))
        labels.append(label_in_payload(payloads[LABEL_FIELD]))
    index.close()
    return torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels)


def to_model(images: Tensor) -> Tensor:
    """uint8 as the models see it: fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1
