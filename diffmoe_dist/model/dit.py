"""The diffusion transformer (DiT), whose blocks have a dense or a mixture-of-experts feed-forward layer.

Shape legend: N images, C channels, H = W input size, p patch size, T tokens an image, D width, L blocks.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe_dist.config import Config, ModelConfig
from diffmoe_dist.model.blocks import DiTBlock, FinalLayer, HeadNorm
from diffmoe_dist.model.condition import Condition, TextCondition, is_null
from diffmoe_dist.model.embeddings import LabelEmbedder, PatchEmbed, TextEmbedder, TimestepEmbedder, position_table
from diffmoe_dist.model.mlp import Mlp, SwiGLU
from diffmoe_dist.model.moe import Experts, MoELayer
from diffmoe_dist.model.precision import MIXED, mixed_precision
from diffmoe_dist.model.routers import build_router
from diffmoe_dist.model.routing import Router, RoutingStats


@dataclass(frozen=True)
class DiTOutput:
    prediction: Tensor  # (N, C, H, W) fp32
    variance: Tensor | None  # (N, C, H, W) fp32, the learned variance channels, where the model has them
    losses: dict[str, Tensor]  # named, unweighted () fp32; the layers' losses added up
    routing: list[RoutingStats]  # one for each mixture-of-experts layer, in order


class DiT(nn.Module):
    """Predicts the objective's target from a noisy image, a time, and a class label or an encoded caption.

    Parameters and buffers are undefined until `initialize` or a checkpoint fills them.
    """

    pos_embed: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.in_channels = model.in_channels
        self.patch_size = model.patch_size
        self.grid_size = model.input_size // model.patch_size
        self.num_classes = model.num_classes
        self.mixed = config.precision == MIXED
        width = model.hidden_size
        self.x_embedder = PatchEmbed(model.patch_size, model.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = _condition_embedder(model)
        self.register_buffer("pos_embed", torch.zeros(1, self.grid_size**2, width))
        self.blocks = nn.ModuleList(DiTBlock(model, _feed_forward(config, block)) for block in range(model.depth))
        self.final_layer = FinalLayer(width, model.patch_size, model.in_channels * (2 if model.learn_sigma else 1))

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MoELayer)]

    def forward(self, x: Tensor, t: Tensor, y: Condition) -> DiTOutput:
        """
        Args:
            x: (N, C, H, W) noisy images or latents.
            t: (N,) the objective's `model_time`.
            y: (N,) int64 class labels, of which `num_classes` is the null label, or N encoded captions.
        """
        with mixed_precision(x.device, self.mixed):
            return self._forward(x, t, y)

    def _forward(self, x: Tensor, t: Tensor, y: Condition) -> DiTOutput:
        stream_type = self.x_embedder.proj.weight.dtype  # of the residual stream, whatever products are computed in
        x = self.x_embedder(x.to(stream_type)) + self.pos_embed.to(stream_type)  # (N, T, D)
        text: tuple[Tensor, Tensor] | None = None
        if isinstance(y, TextCondition):
            tokens, embedded = self.y_embedder(y)  # (N, L, D), (N, D)
            text = (tokens, y.mask)
        else:
            embedded = self.y_embedder(y)
        null_N = is_null(y, self.num_classes or -1)  # without classes no image is another's unconditional twin
        condition = self.t_embedder(t) + embedded  # (N, D)
        routings = []
        for block in self.blocks:
            x, routing = block(x, condition, null_N, text)  # (N, T, D)
            if routing is not None:
                routings.append(routing)
        channels = self._unpatchify(self.final_layer(x, condition)).float()  # (N, C or 2 C, H, W)
        prediction, variance = channels[:, : self.in_channels], None
        if channels.shape[1] > self.in_channels:
            variance = channels[:, self.in_channels :]
        names = routings[0].losses if routings else {}
        losses = {name: torch.stack([routing.losses[name] for routing in routings]).sum() for name in names}
        return DiTOutput(prediction, variance, losses, [routing.stats for routing in routings])

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, p * p * C) to (N, C, H, W)."""
        images, grid, p = len(x), self.grid_size, self.patch_size
        x = x.view(images, grid, grid, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(images, -1, grid * p, grid * p)


def _condition_embedder(model: ModelConfig) -> LabelEmbedder | TextEmbedder:
    if model.condition == "text":
        return TextEmbedder(model.text_hidden_size, model.text_pooled_size, model.hidden_size)
    return LabelEmbedder(model.num_classes, model.hidden_size)


_DENSE: dict[str, type[Mlp | SwiGLU]] = {"gelu": Mlp, "swiglu": SwiGLU}


def _feed_forward(config: Config, block: int) -> Mlp | SwiGLU | MoELayer:
    width, settings = config.model.hidden_size, config.experts
    if settings is None or block not in config.moe_blocks:
        return _DENSE[config.model.activation](width, int(width * config.model.mlp_ratio))
    hidden = int(width * settings.expert_mlp_ratio)
    shared = settings.shared_hidden_size(width)  # experts that always run together are one wider layer
    return MoELayer(
        build_router(config),
        Experts(settings.num_experts, width, hidden, settings.activation),
        shared=_DENSE[settings.shared_activation](width, shared) if shared else None,
        unconditional=_DENSE[settings.activation](width, hidden) if settings.unconditional_expert else None,
    )


@torch.no_grad()
def initialize(model: DiT, seed: int) -> None:
    """Fill every parameter and buffer; each parameter is a function of (seed, its name, its expert) alone.

    So a device with some of the experts gives them the same values as a device with all of them. The rules are DiT's:
    linear layers Xavier-uniform with zero bias; label table and time MLP normal with standard deviation 0.02; zero for
    the adaLN layers, the final layer and the output of cross-attention, so that every block starts as the identity;
    one for the weights of QK-norms. A router's own matrices start as `Router.initial_weights` says.
    """
    for name, parameter in model.named_parameters():
        _initialize_parameter(model, name, parameter, seed)
    for buffer in model.buffers():
        buffer.zero_()
    model.pos_embed.copy_(position_table(model.pos_embed.shape[-1], model.grid_size))


def _initialize_parameter(model: DiT, name: str, parameter: Tensor, seed: int) -> None:
    def generator(expert: int = 0) -> torch.Generator:
        digest = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def normal(std: float) -> Tensor:
        return torch.randn(parameter.shape, generator=generator()) * std

    def xavier_uniform(fan_in: int, fan_out: int, shape: torch.Size, expert: int = 0) -> Tensor:
        bound = math.sqrt(6 / (fan_in + fan_out))
        return (torch.rand(shape, generator=generator(expert)) * 2 - 1) * bound

    owner: Any = model.get_submodule(name.rpartition(".")[0])
    zero = ("adaLN_modulation", "cross_attn.proj.", "final_layer.")
    if parameter.ndim == 1 or any(part in name for part in zero):
        parameter.fill_(float(isinstance(owner, HeadNorm) and name.endswith(".weight")))
    elif _is_stack_of_experts(name):
        parameter.zero_()
        if name.endswith((".w1", ".w2")):
            _, fan_in, columns = parameter.shape
            fan_out = columns // 2 if owner.activation == "swiglu" and name.endswith(".w1") else columns
            for local, expert in enumerate(range(owner.first, owner.first + len(parameter))):
                parameter[local].copy_(xavier_uniform(fan_in, fan_out, parameter[local].shape, expert))
    elif isinstance(owner, Router):
        parameter.copy_(owner.initial_weights(parameter.shape, generator()))
    elif name.startswith(("t_embedder.", "y_embedder.embedding_table.")):
        parameter.copy_(normal(0.02))
    else:  # nn.Linear, and the patch embedding as the linear map that it is
        fan_out, fan_in = parameter.flatten(1).shape
        parameter.copy_(xavier_uniform(fan_in, fan_out, parameter.shape))


def _is_stack_of_experts(name: str) -> bool:
    return name.rpartition(".")[0].endswith(".experts")
