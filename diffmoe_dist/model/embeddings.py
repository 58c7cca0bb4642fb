"""Embeddings: of patches, times, class labels and captions into vectors of the model's width; the position table.

Shape legend: N images, C channels, H = W input size, p patch size, T = (H / p)^2 tokens, D width; of a text encoder
L tokens after padding, E their width, P the width of its pooled vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffmoe_dist.model.condition import TextCondition

FREQUENCY_EMBEDDING_SIZE = 256


class PatchEmbed(nn.Module):
    """(N, C, H, W) to (N, T, D): one linear map for each p x p patch."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # The residual stream takes its layout from here: channels side by side, through the whole net.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # (N, T, D)


class TimestepEmbedder(nn.Module):
    """(N,) times to (N, D): sinusoids of 256 frequencies, then a two-layer MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        first = nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        weight_type = next(self.mlp.parameters()).dtype
        return self.mlp(sinusoidal_embedding(t, FREQUENCY_EMBEDDING_SIZE).to(weight_type))


class LabelEmbedder(nn.Module):
    """(N,) class labels to (N, D). The last row is the null label, `num_classes`, for classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class TextEmbedder(nn.Module):
    """Encoded captions to the tokens for cross-attention, (N, L, D), and a vector to add to the time's, (N, D)."""

    def __init__(self, text_hidden_size: int, text_pooled_size: int, hidden_size: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(
            nn.Linear(text_hidden_size, hidden_size), nn.GELU("tanh"), nn.Linear(hidden_size, hidden_size)
        )
        # An encoder may have no pooled vector (P is 0); the mean of the caption's tokens is taken instead.
        self.pooled = nn.Sequential(
            nn.Linear(text_pooled_size or text_hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, text: TextCondition) -> tuple[Tensor, Tensor]:
        weight_type = next(self.parameters()).dtype
        tokens_NLE = text.tokens.to(weight_type).masked_fill(~text.mask[..., None], 0.0)
        pooled = text.pooled
        if pooled is None:
            pooled = tokens_NLE.float().sum(dim=1) / text.mask.sum(dim=1, keepdim=True)
        return self.tokens(tokens_NLE), self.pooled(pooled.to(weight_type))


def sinusoidal_embedding(t: Tensor, size: int, max_period: float = 10_000.0) -> Tensor:
    """(N,) to (N, size) in fp32: cosines then sines of t at geometrically spaced frequencies."""
    half = size // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def position_table(hidden_size: int, grid_size: int) -> Tensor:
    """The fixed two-dimensional sine-cosine table, (1, T, D) fp32: half of D for the column, half for the row."""
    place = torch.arange(grid_size, dtype=torch.float64)
    row, column = torch.meshgrid(place, place, indexing="ij")
    table = torch.cat([_axis_table(hidden_size // 2, axis.flatten()) for axis in (column, row)], dim=1)
    return table.float()[None]


def _axis_table(size: int, places: Tensor) -> Tensor:
    frequencies = 1.0 / 10_000 ** (torch.arange(size // 2, dtype=torch.float64) / (size / 2))
    angles = places[:, None] * frequencies[None]  # (T, size / 2)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
