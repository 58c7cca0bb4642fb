"""Tensor parallelism: attention and dense feed-forward layers cut over consecutive ranks, by Megatron's linear layers.

Megatron's sequence-parallel linears gather and scatter dimension 0. Here dimension 0 is images, or tokens of images, so
each rank keeps its own images for everything else: norms, modulation, routing and experts see the ranks of a
tensor-parallel group as data-parallel ones. Only inside of a cut layer does a rank have the images of its whole group:
it computes some heads, or some hidden channels, of all of them.

The gradient of a slice is therefore a sum over the images of the group, and what remains is to add it up over the ranks
that hold the same slice. DeepSpeed does that for experts, and so for slices (`expert_parallel.parameter_groups`).

Megatron-core is imported here only, and this module only where `parallel.tensor` is more than 1.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe_dist.model.blocks import Attention, CrossAttention
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.mlp import Mlp, SwiGLU
from diffmoe_dist.model.moe import MoELayer
from diffmoe_dist.parallel.slices import Slice
from diffmoe_dist.parallel.topology import Topology, all_gather

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it misses Transformer Engine and Apex, of which nothing here has need
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*is deprecated", category=FutureWarning)


def apply_tensor_parallel(model: DiT, topology: Topology) -> None:
    """Edit an initialised single-device model in place: its wide linear layers become this rank's slices of them.

    Parameters keep their names. Whole stay what every token passes through thinly (embedders, adaLN, norms' scales, the
    final layer), the routed experts, which `apply_expert_parallel` shards, and the unconditional expert, whose tokens
    are not equally many on every rank.
    """
    _prepare_megatron(topology.device)
    blocks: Any = model.blocks
    for block in blocks:
        _cut_attention(block.attn, topology)
        if block.cross_attn is not None:
            _cut_cross_attention(block.cross_attn, topology)
        dense = block.mlp.shared if isinstance(block.mlp, MoELayer) else block.mlp
        if dense is not None:
            _cut_feed_forward(dense, topology)


def _prepare_megatron(device: torch.device) -> None:
    """What its linear layers need of a process: a place for gathered inputs, and a device to make buffers on."""
    if device.type != "cuda":
        torch.cuda.current_device = lambda: device  # type: ignore[assignment, return-value]  # they ask no other way
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS", category=UserWarning)
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def _cut_attention(attention: Attention, topology: Topology) -> None:
    attention.qkv = _Column(attention.qkv, topology, parts=3)
    attention.proj = _Row(attention.proj, topology)
    attention.num_heads //= topology.tensor


def _cut_cross_attention(attention: CrossAttention, topology: Topology) -> None:
    def gather_masks(module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, text_NLD, mask_NL = arguments
        whole = mask_NL.new_empty(len(mask_NL) * topology.tensor, mask_NL.shape[1])
        all_gather(whole, mask_NL.contiguous(), group=topology.tensor_group)
        return x, text_NLD, whole

    attention.q = _Column(attention.q, topology)
    attention.kv = _Column(attention.kv, topology, parts=2)
    attention.proj = _Row(attention.proj, topology)
    attention.num_heads //= topology.tensor
    attention.register_forward_pre_hook(gather_masks)


def _cut_feed_forward(layer: Mlp | SwiGLU | Any, topology: Topology) -> None:
    if isinstance(layer, SwiGLU):
        layer.gate_proj = _Column(layer.gate_proj, topology)
        layer.up_proj = _Column(layer.up_proj, topology)
        layer.down_proj = _Row(layer.down_proj, topology)
    else:
        layer.fc1 = _Column(layer.fc1, topology)
        layer.fc2 = _Row(layer.fc2, topology)


class _MixedPrecision:
    """Rounds the operands of a product before they travel; Megatron's own products take autocast on CUDA alone."""

    def _forward_impl(self, *, input: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
        if bias is not None and bias.requires_grad and not weight.requires_grad:
            # Megatron's product with a frozen weight has no gradient for the bias.
            product = self._forward_impl(input=input, weight=weight, bias=None, **settings)
            return product + bias.to(product.dtype)
        kind = input.device.type
        forward: Any = super()._forward_impl  # type: ignore[misc]
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return forward(input=input, weight=weight, bias=bias, **settings)
        dtype = torch.get_autocast_dtype(kind)
        rounded = {
            "input": input.to(dtype),
            "weight": weight.to(dtype),
            "bias": None if bias is None else bias.to(dtype),
        }
        with torch.autocast(kind, enabled=False):
            return forward(**rounded, **settings)


class _Column(_MixedPrecision, ColumnParallelLinear):
    """Some outputs of a linear layer, for the images of the whole group: (n, ..., D) to (n T, ..., outputs / T).

    A layer of several equal parts, such as queries, keys and values, is cut in each of them.
    """

    def __init__(self, whole: Any, topology: Topology, parts: int = 1) -> None:
        with whole.weight.device:
            super().__init__(**_like(whole, topology))
        cut = Slice(0, topology.tensor_rank, topology.tensor, parts)
        _take(self.weight, whole.weight, cut)
        if whole.bias is not None:
            _take(self.bias, whole.bias, cut)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _Row(_MixedPrecision, RowParallelLinear):
    """A linear layer of some inputs, added up over the group: (n T, ..., D / T) to (n, ..., outputs)."""

    def __init__(self, whole: Any, topology: Topology) -> None:
        with whole.weight.device:
            super().__init__(**_like(whole, topology), input_is_parallel=True, skip_bias_add=False)
        _take(self.weight, whole.weight, Slice(1, topology.tensor_rank, topology.tensor))
        if whole.bias is not None:  # added to a rank's own images, so it is no slice
            self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def _like(whole: Any, topology: Topology) -> dict[str, Any]:
    """What Megatron's layers are told: a layer of this size, whose values come later."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=topology.tensor,
        sequence_parallel=True,
        use_cpu_initialization=True,  # that is, on the device that torch is told
        perform_initialization=False,
    )
    return {
        "input_size": whole.in_features,
        "output_size": whole.out_features,
        "bias": whole.bias is not None,
        "config": config,
        "init_method": nn.init.zeros_,
        "tp_group": topology.tensor_group,
    }


@torch.no_grad()
def _take(parameter: Any, whole: Tensor, cut: Slice) -> None:
    parameter.copy_(cut.of(whole))
    parameter.slice = cut
    parameter.requires_grad_(whole.requires_grad)
