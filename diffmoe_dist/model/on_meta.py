"""A model without memory: the names and shapes of its tensors."""

from __future__ import annotations

from functools import lru_cache

import torch

from diffmoe_dist.config import Config
from diffmoe_dist.model.dit import DiT


def meta_model(config: Config) -> DiT:
    """The whole model on the meta device: shapes and no memory. To be read alone, for it is kept."""
    return _meta_model(_ByModel(config))


class _ByModel:
    """Settings that are equal where they make the same model."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.key = repr((config.model, config.moe, config.precision))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByModel) and self.key == other.key


@lru_cache(maxsize=4)
def _meta_model(settings: _ByModel) -> DiT:
    with torch.device("meta"):
        return DiT(settings.config)
