"""The transformer block with adaptive layer norm (adaLN-Zero; DiT, Peebles and Xie 2022, Sec. 3.2), the output layer.

Shape legend: N images, T tokens an image, D width, L tokens of a caption, d width of an attention head, p patch size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_dist.config import ModelConfig
from diffmoe_dist.model.mlp import Mlp, SwiGLU
from diffmoe_dist.model.moe import MoELayer, made_again
from diffmoe_dist.model.routing import Routing


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(N, T, D) with shift and scale, (N, D), of each image."""
    return x * (1 + scale[:, None]) + shift[:, None]


class HeadNorm(nn.Module):
    """(..., d) to (..., d): layer norm or RMS norm of the queries or keys of each head, computed in fp32."""

    def __init__(self, head_dim: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))
        self.bias = nn.Parameter(torch.empty(head_dim)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        shape, weight = self.weight.shape, self.weight.float()
        if self.bias is None:
            normed = F.rms_norm(x.float(), shape, weight, eps=1e-6)
        else:
            normed = F.layer_norm(x.float(), shape, weight, self.bias.float(), eps=1e-5)
        return normed.to(x.dtype)


def _add_head_norms(attention: Any, model: ModelConfig) -> None:
    of_kind = model.qk_norm != "none"
    attention.q_norm = HeadNorm(model.head_dim, model.qk_norm) if of_kind else None
    attention.k_norm = HeadNorm(model.head_dim, model.qk_norm) if of_kind else None


class Attention(nn.Module):
    """(N, T, D) to (N, T, D): multi-head self-attention over the tokens of each image."""

    q_norm: HeadNorm | None
    k_norm: HeadNorm | None

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.num_heads = model.num_heads
        self.qkv = nn.Linear(model.hidden_size, 3 * model.num_heads * model.head_dim)
        self.proj = nn.Linear(model.num_heads * model.head_dim, model.hidden_size)
        _add_head_norms(self, model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # each (N, T, heads, d)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (values.transpose(1, 2) for values in (q, k, v))  # so that they lie in memory by token
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """(N, T, D) to (N, T, D): multi-head attention from the tokens of each image to those of its caption."""

    q_norm: HeadNorm | None
    k_norm: HeadNorm | None

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.num_heads = model.num_heads
        inner = model.num_heads * model.head_dim
        self.q = nn.Linear(model.hidden_size, inner)
        self.kv = nn.Linear(model.hidden_size, 2 * inner)
        self.proj = nn.Linear(inner, model.hidden_size)
        _add_head_norms(self, model)

    def forward(self, x: Tensor, text_NLD: Tensor, mask_NL: Tensor) -> Tensor:
        """`mask_NL` is bool, false for padding."""

        def heads(values: Tensor) -> Tensor:
            return values.unflatten(-1, (self.num_heads, -1))  # (N, T or L, heads, d)

        q, (k, v) = heads(self.q(x)), map(heads, self.kv(text_NLD).chunk(2, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (values.transpose(1, 2) for values in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_NL[:, None, None])
        return self.proj(mixed.transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    """Attention, then a feed-forward layer that is dense or a mixture of experts. The condition modulates both.

    A model of captions has cross-attention between the two. Its output is initialised to zero.
    """

    def __init__(self, model: ModelConfig, mlp: Mlp | SwiGLU | MoELayer) -> None:
        super().__init__()
        hidden_size = model.hidden_size
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(model)
        self.cross_attn = CrossAttention(model) if model.condition == "text" else None
        if self.cross_attn is not None:
            self.norm_cross = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, x: Tensor, condition: Tensor, null_N: Tensor, text: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Routing | None]:
        """
        Args:
            x: (N, T, D).
            condition: (N, D), the embedded time plus the embedded label or pooled caption.
            null_N: bool, true for unconditional images (null label or null caption).
            text: (N, L, D) the embedded captions and their mask (N, L) bool, false for padding.

        Returns:
            (N, T, D), and the routing where the feed-forward layer is a mixture of experts.
        """
        if not isinstance(self.mlp, MoELayer):
            return self.dense(x, condition, *(text or ())), None
        x, gate, h = self.enter(x, condition, *(text or ()))
        h, routing = self.mlp(h, null_N)
        with made_again(h):
            return self.add(x, gate, h), routing

    def dense(self, x: Tensor, condition: Tensor, *text: Tensor) -> Tensor:
        """(N, T, D), a whole block whose feed-forward layer is dense."""
        x, shift, scale, gate = self.attend(x, condition, *text)
        return self.add(x, gate, self.feed(x, shift, scale))

    def enter(self, x: Tensor, condition: Tensor, *text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A block before its mixture of experts: the residual stream, that layer's gate (N, D), and its input."""
        x, shift, scale, gate = self.attend(x, condition, *text)
        return x, gate, self.normalize(x, shift, scale)

    def attend(self, x: Tensor, condition: Tensor, *text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The half before the feed-forward layer: (N, T, D), and shift, scale and gate of that layer, (N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm_cross(x), *text)
        return x, shift_m, scale_m, gate_m

    def normalize(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """(N, T, D), the input of the feed-forward layer."""
        return modulate(self.norm2(x), shift, scale)

    def feed(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """(N, T, D), what the dense feed-forward layer adds before its gate."""
        return self.mlp(self.normalize(x, shift, scale))

    def add(self, x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
        """(N, T, D), the residual stream after the block."""
        return x + gate[:, None] * h


class FinalLayer(nn.Module):
    """(N, T, D) to (N, T, p * p * channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
