"""Memory of a GPU in bytes: what persists is exact, what exists only at the peak of a step is an estimate.

Legend: D width, H hidden width of an expert, N routed experts, e bytes of an operand of a product, r bytes of an
element of the residual stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from diffmoe_dist.config import Config, RouterSettings
from diffmoe_dist.model.accounting import account, meta_model
from diffmoe_dist.parallel.slices import is_cut
from diffmoe_dist.planning.workload import Workload

REDUCTION_CHUNK = 32 * 2**20  # gradients that are reduced together, elements
CHUNKS_AT_ONCE = 3  # two that are being reduced, and the one that is copied
USABLE_MEMORY = 0.92  # fraction of the device; the rest is for CUDA's context, NCCL's buffers and fragmentation

_DENSE_TENSORS = {"gelu": 2, "swiglu": 4}  # of its hidden width that a dense feed-forward layer keeps for backward
_MLPS = ("dense MLP", "routed experts", "shared experts", "unconditional expert")
# The parts of the model that `train.recompute` computes again.
RECOMPUTED_PARTS = {"none": (), "mlp": _MLPS, "block": (*_MLPS, "attention", "cross-attention", "adaLN")}

RankGroup = Literal["world", "expert", "expert data", "tensor", "tensor data"]  # process groups of `parallel.topology`


@dataclass(frozen=True)
class ZeroGroup:
    """Parameters that a rank has, and the ranks that have the same ones: ZeRO cuts their state over these ranks."""

    name: str
    group: RankGroup
    elements: int
    largest: int  # elements of its largest parameter
    aligned: int  # elements with the gaps between parameters, each of which begins at 16 bytes
    ranks: int

    @property
    def padded(self) -> int:
        """Elements in the flat buffer: DeepSpeed rounds up to two elements a rank."""
        return math.ceil(self.aligned / (2 * self.ranks)) * 2 * self.ranks

    @property
    def partition(self) -> int:
        """Elements whose optimizer state one rank holds."""
        return self.padded // self.ranks

    @property
    def chunk(self) -> int:
        """Elements that are reduced together: one rank owns them."""
        return min(self.partition, REDUCTION_CHUNK)


def zero_groups(config: Config, ranks: int) -> list[ZeroGroup]:
    """Parameters by the number of ranks that hold different ones: of a shard of the experts, of a slice of a layer."""
    expert, tensor = config.parallel.expert, config.parallel.tensor
    sizes: dict[int, list[int]] = {1: []}
    for name, parameter in meta_model(config).named_parameters():
        holders = expert if ".mlp.experts." in name else tensor if is_cut(name) else 1
        sizes.setdefault(holders, []).append(parameter.numel() // holders)
    return [_zero_group(config, holders, sizes[holders], ranks, len(sizes) == 1) for holders in sizes]


def _zero_group(config: Config, holders: int, sizes: list[int], ranks: int, is_only: bool) -> ZeroGroup:
    expert, tensor = config.parallel.expert, config.parallel.tensor
    group: RankGroup = "world" if holders == 1 else "expert data" if holders == expert else "tensor data"
    name = "all" if is_only else "dense"
    if holders > 1:
        name = " and ".join(kind for kind, size in (("experts", expert), ("slices", tensor)) if size == holders)
    unit = 16 // weight_bytes(config)
    gaps = sum(-size % unit for size in sizes[1:])  # the first parameter is flattened last
    return ZeroGroup(name, group, sum(sizes), max(sizes), sum(sizes) + gaps, ranks // holders)


def weight_bytes(config: Config) -> int:
    """Bytes of one of the model's weights or gradients, and of an element of its norms and residual stream."""
    return 2 if config.precision == "bf16" else 4


def product_bytes(config: Config) -> int:
    """Bytes of an operand or a result of matrix products."""
    return 4 if config.precision == "fp32" else 2


def wire_bytes(config: Config) -> int:
    """Bytes of a gradient as ranks exchange it."""
    return 2 if config.parallel.gradient_dtype == "bf16" else 4


def persistent_bytes(config: Config, ranks: int) -> dict[str, int]:
    """Bytes that a rank holds from its first to its last step, by kind: exact."""
    groups = zero_groups(config, ranks)
    partitions = sum(group.partition for group in groups)
    buffers = list(meta_model(config).buffers())
    return {
        "weights": sum(group.padded for group in groups) * weight_bytes(config),
        "fp32 master weights": partitions * 4 if weight_bytes(config) < 4 else 0,  # else they are the model's own
        "AdamW moments": 2 * partitions * 4 + 4 * len(groups),  # and its step counts
        "EMA": config.ema.count * partitions * 4,
        "buffers": sum(buffer.numel() * buffer.element_size() for buffer in buffers),
    }


def peak_bytes(config: Config, ranks: int, work: Workload) -> dict[str, float]:
    """Bytes that a rank holds at the peak of a step beside the persistent ones, by kind: estimates.

    Backward frees activations as it makes gradients; the peak is at one of the moments in `_moments`. It is that of
    the rank whose partition backward reaches first.
    """
    groups, saved = zero_groups(config, ranks), activation_bytes(config, work)
    beside = _largest_backward(config, work) + _gathered_bytes(config, work)

    def at(made: float) -> dict[str, float]:
        return {
            "gradients": gradient_bytes(config, groups, work.micro_steps, made),
            "activations": saved * (1 - made) + (beside if made < 1 else 0),
        }

    most = max((at(made) for made in _moments(groups)), key=lambda kinds: sum(kinds.values()))
    again = {"recomputed activations": recomputed_bytes(config, work)} if config.train.recompute != "none" else {}
    return {**most, **again}


def _moments(groups: list[ZeroGroup]) -> list[float]:
    """When memory may be at its peak, as the part of the gradients that is made: as one of the first chunks is copied,
    while buffers still become more, and at both ends of the backward pass."""
    chunks = [chunk * group.chunk / group.elements for group in groups for chunk in range(1, CHUNKS_AT_ONCE + 2)]
    return sorted({0.0, 1.0, *(part for part in chunks if part < 1)})


def gradient_bytes(config: Config, groups: list[ZeroGroup], micro_steps: int, made: float) -> float:
    """Bytes of gradients when backward has made a part of them: an estimate.

    A chunk that is complete is copied, and reduced while the next two are made; a gradient is freed once all chunks
    that have a part of it are copied. The owner keeps the fp32 sum. Where no other rank has the same parameters,
    gradients stay as they are, and AdamW makes fp32 copies of a chunk at a time.

    Args:
        made: of the last micro-step's gradients, between 0 and 1.
    """
    element, accumulates = weight_bytes(config), micro_steps > 1
    held = travelling = 0.0
    for group in groups:
        so_far = made * group.elements
        if group.ranks == 1:
            held += element * (group.elements if accumulates else so_far)
            held += 4 * group.chunk if element < 4 and made == 1 else 0
            continue
        waiting = min(so_far, group.chunk + group.largest)
        owned = min(group.partition, max(0.0, so_far - CHUNKS_AT_ONCE * group.chunk))
        if accumulates and config.parallel.zero_stage == 1:
            waiting = max(waiting, group.elements - so_far)
        elif accumulates:
            owned = group.partition
        held += waiting * element + owned * 4
        travelling = max(travelling, min(so_far, CHUNKS_AT_ONCE * group.chunk) * wire_bytes(config))
    return held + travelling


def activation_bytes(config: Config, work: Workload) -> float:
    """Bytes that a forward pass saves for backward: an estimate, within 3 % of what autograd keeps.

    With `train.recompute` it is within 10 %; `recomputed_bytes` come on top.
    """
    model, mode = config.model, config.train.recompute
    D, e, r = model.hidden_size, product_bytes(config), weight_bytes(config)
    layers, moe_layers = model.depth, len(config.moe_blocks)
    # Of each block: input, the residual stream in the middle, the feed-forward output; shifts, scales and gates. The
    # residual stream and the norms' outputs, before they are modulated, are no operands of products.
    block = work.tokens * (2 * r + e) * D + work.images * 6 * D * r
    # The norm before attention, modulated, and its statistics; attention's projection.
    heads = _head_bytes(config, tensors=4, normed=2) + 4 * model.num_heads
    attention = work.tokens * ((r + 2 * e) * D + 8 + heads) + work.images * 2 * D * r
    # The norm before the feed-forward layer; modulated, it is the layer's input, which a router keeps.
    norm = work.tokens * (r * D + 8) + work.images * D * r
    dense = work.tokens * (D + _DENSE_TENSORS[model.activation] * int(D * model.mlp_ratio)) * e
    moe = 0.0 if config.experts is None else work.tokens * D * e + _moe_activation_bytes(config, config.experts, work)
    kept = layers * block + moe_layers * moe
    if mode != "block":
        kept += layers * attention
    if mode == "none":
        kept += layers * norm + (layers - moe_layers) * dense
    if model.condition == "text":
        kept += _text_activation_bytes(config, work)
    last = work.tokens * (e + 2 * r) * D
    return kept + last + _rounded_weight_bytes(config)


def _head_bytes(config: Config, tensors: int, normed: int) -> float:
    """Of a token and all heads: so many of q, k, v and the output; of q and k, so many of them normed before.

    A norm keeps its input, in fp32 beside the input as it is, and its statistics; an RMS norm also its input normed
    without weights. Attention keeps the result.
    """
    model, e = config.model, product_bytes(config)
    copy = 0 if e == 4 else 4
    of_norm = {
        "none": 0,
        "layer": (copy + e) * model.head_dim + 8,
        "rms": (copy + 4 + e) * model.head_dim + 4,
    }[model.qk_norm]
    return model.num_heads * (tensors * model.head_dim * e + normed * of_norm)


def _rounded_weight_bytes(config: Config) -> float:
    """The copies of a rank's fp32 weights that mixed precision makes in each forward pass, and backward needs again."""
    if product_bytes(config) == weight_bytes(config):
        return 0
    parts = account(config).parameters
    parts["routed experts"] //= config.parallel.expert
    for part in ("attention", "cross-attention", "dense MLP", "shared experts"):
        parts[part] //= config.parallel.tensor
    return product_bytes(config) * sum(
        elements
        for part, elements in parts.items()
        if part not in (*RECOMPUTED_PARTS[config.train.recompute], "position table")
    )


def _text_activation_bytes(config: Config, work: Workload) -> float:
    """Of the captions' embedder, and of cross-attention in all blocks."""
    model, e, r = config.model, product_bytes(config), weight_bytes(config)
    D, text_tokens = model.hidden_size, work.images * model.text_max_length
    # The residual stream before it and its norm; q, the output; then k and v; statistics of the norm.
    heads = _head_bytes(config, tensors=2, normed=1)
    block = work.tokens * ((e + r) * D + 8 + heads + 4 * model.num_heads) + text_tokens * heads
    embedder = text_tokens * (model.text_hidden_size + 3 * D) * e
    return (0 if config.train.recompute == "block" else model.depth * block) + embedder


def _moe_activation_bytes(config: Config, experts: RouterSettings, work: Workload) -> float:
    """Of one mixture-of-experts layer, beyond its input and output."""
    D, e, r = config.model.hidden_size, product_bytes(config), weight_bytes(config)
    kept = int(config.train.recompute == "none")
    hidden = kept * _hidden_bytes(config, experts)
    shared = kept * _DENSE_TENSORS[experts.shared_activation] * experts.shared_hidden_size(D) * e
    unconditional = kept * _hidden_bytes(config, experts, dense=True)
    # A router reads the tokens of mixed precision before they are rounded for the experts.
    fp32_copy = 4 * D if e < 4 and (e < r or experts.keeps_fp32_tokens) else 0
    router = work.tokens * (4 * experts.num_experts + fp32_copy + experts.saved_bytes(D, e))
    # Out of the experts, where rows travel also into them (else backward picks them once more), and three indices.
    travel = config.parallel.expert > 1
    rows = work.assignments * ((2 if travel else 1) * D * e + hidden + 3 * 8)
    beside = work.tokens * shared + work.unconditional * (D * e + unconditional)
    # The layer's output, of the residual stream's type, is added up again in backward, unless more is in it.
    more = experts.shared_experts or experts.unconditional_expert
    summed = work.tokens * ((r if more else 0) - e) * D
    return router + rows + beside + summed


def _hidden_bytes(config: Config, experts: RouterSettings, dense: bool = False) -> float:
    """What an expert saves of each row beside its input; `dense`: the unconditional one."""
    hidden_size = int(config.model.hidden_size * experts.expert_mlp_ratio)
    tensors = _DENSE_TENSORS if dense else {"gelu": 2, "swiglu": 3}
    return tensors[experts.activation] * hidden_size * product_bytes(config)


def recomputed_bytes(config: Config, work: Workload) -> float:
    """Bytes that backward computes again of one part of a block, the largest: an estimate."""
    model, mode = config.model, config.train.recompute
    D, e = model.hidden_size, product_bytes(config)
    if mode == "none":
        return 0.0
    parts: list[float] = [work.tokens * (2 * D + _DENSE_TENSORS[model.activation] * int(D * model.mlp_ratio)) * e]
    if config.experts is not None:
        parts.append(work.assignments * _hidden_bytes(config, config.experts))
    if mode == "block":
        heads = (2 if model.condition == "text" else 1) * _head_bytes(config, tensors=4, normed=2)
        parts.append(work.tokens * (3 * D * e + heads))
    return max(parts)


def _gathered_bytes(config: Config, work: Workload) -> float:
    """Images of a whole tensor-parallel group, in backward of a cut layer: its input, two gradients of that size."""
    tensor = config.parallel.tensor
    return 0.0 if tensor == 1 else 3 * tensor * work.tokens * config.model.hidden_size * product_bytes(config)


def _largest_backward(config: Config, work: Workload) -> float:
    """Gradients of activations in the backward pass of one feed-forward layer."""
    D, e, r = config.model.hidden_size, product_bytes(config), weight_bytes(config)
    expert_ratio = 0.0 if config.experts is None else config.experts.expert_mlp_ratio
    rows = max(work.tokens * config.model.mlp_ratio, work.assignments * expert_ratio)
    return (2 * rows * e + 4 * work.tokens * r) * D
