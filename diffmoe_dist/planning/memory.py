"""Memory of a GPU in bytes: what persists is exact, what exists only at the peak of a step is an estimate.

Legend: D width, H hidden width of an expert, N routed experts, e bytes of an operand of a product, r bytes of an
element of the residual stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from diffmoe_dist.config import Config, RouterSettings
from diffmoe_dist.model.accounting import part_of
from diffmoe_dist.model.freezing import GradientFlow, frozen_parameters
from diffmoe_dist.model.on_meta import meta_model
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
    """What trains, by the number of ranks that hold different parts: shards of the experts, slices of a layer."""
    frozen = frozen_parameters(config)
    sizes: dict[int, list[int]] = {1: []}
    for name, parameter in meta_model(config).named_parameters():
        if name not in frozen:
            holders = _holders(config, name)
            sizes.setdefault(holders, []).append(parameter.numel() // holders)
    sizes = {holders: of_group for holders, of_group in sizes.items() if of_group}
    is_only = all(_holders(config, name) == 1 for name, _ in meta_model(config).named_parameters())
    return [_zero_group(config, holders, sizes[holders], ranks, is_only) for holders in sizes]


def _holders(config: Config, name: str) -> int:
    """How many ranks hold a parameter together."""
    expert, tensor = config.parallel.expert, config.parallel.tensor
    return expert if ".mlp.experts." in name else tensor if is_cut(name) else 1


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
    still = _frozen_bytes(config, ranks) if config.train.freeze else {}
    return {
        "weights": sum(group.padded for group in groups) * weight_bytes(config),
        "fp32 master weights": partitions * 4 if weight_bytes(config) < 4 else 0,  # else they are the model's own
        "AdamW moments": 2 * partitions * 4 + 4 * len(groups),  # and its step counts
        "EMA": config.ema.count * partitions * 4,
        "buffers": sum(buffer.numel() * buffer.element_size() for buffer in buffers),
        **still,
    }


def _frozen_bytes(config: Config, ranks: int) -> dict[str, int]:
    """Of parameters that do not train: as the model holds them, and what a rank keeps of their fp32 values."""
    model, element = meta_model(config), weight_bytes(config)
    sizes = [(model.get_parameter(name).numel(), _holders(config, name)) for name in frozen_parameters(config)]
    return {
        "frozen weights": element * sum(size // holders for size, holders in sizes),
        "fp32 frozen weights": 4 * sum(-(-size // ranks) for size, _ in sizes) if element < 4 else 0,
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
    flow, D = GradientFlow(config), config.model.hidden_size
    e, r = product_bytes(config), weight_bytes(config)
    kept = sum(_block_bytes(config, work, flow, block) for block in range(config.model.depth))
    if config.model.condition == "text":
        of_embedder = config.model.text_hidden_size + 2 * D if flow.trains("y_embedder.") else 0
        kept += work.images * config.model.text_max_length * (D + of_embedder) * e
    # The residual stream before the norm and the norm's output; modulated, it is the layer's input.
    modulates = flow.trains("t_embedder.", "y_embedder.", "final_layer.adaLN_modulation.")
    stream = flow.before(config.model.depth, "attn")
    last = work.tokens * (stream * r + modulates * r + flow.trains("final_layer.linear.") * e) * D
    return kept + last + rounded_weight_bytes(config, flow)


def _block_bytes(config: Config, work: Workload, flow: GradientFlow, block: int) -> float:
    """What a block keeps. A factor of a product is kept where the other one has a gradient."""
    model, mode, name = config.model, config.train.recompute, f"blocks.{block}."
    D, e, r = model.hidden_size, product_bytes(config), weight_bytes(config)
    modulates, before, middle = flow.modulates(block), flow.before(block, "attn"), flow.before(block, "mlp")
    # The residual stream before both norms, which are no operands of products; what the gate multiplies.
    # What is computed again has its inputs kept, with gradients or without.
    after = flow.before(block + 1, "attn")
    fed = mode != "none" and block not in config.moe_blocks and flow.trains(f"{name}mlp.")
    streams = (before or (middle and mode == "block")) + (middle or fed)
    kept: float = work.tokens * (streams * r + modulates * e) * D
    kept += work.images * 6 * D * r * after  # shifts, scales and gates
    if mode != "block":
        # The norm before attention, its statistics; modulated, the input of a product; attention's projection.
        attends, proj = flow.into(f"{name}attn.proj.weight"), flow.trains(f"{name}attn.proj.weight")
        kept += work.tokens * ((r + e) * modulates + flow.trains(f"{name}attn.qkv.weight") * e) * D
        kept += work.tokens * 8 * before + work.images * 2 * D * r * modulates
        kept += work.tokens * attends * (_head_bytes(config, tensors=4, normed=2) + 4 * model.num_heads)
        kept += work.tokens * (proj and not attends) * _head_bytes(config, tensors=1, normed=0)
    if model.condition == "text" and mode != "block":
        kept += _cross_attention_bytes(config, work, flow, block)
    if mode == "none":
        # The norm before the feed-forward layer, its statistics.
        kept += work.tokens * (r * D * modulates + 8 * middle) + work.images * D * r * modulates
    if config.experts is not None and block in config.moe_blocks:
        kept += _moe_activation_bytes(config, config.experts, work, flow, block)
    elif mode == "none":
        dense = _Reached.of(flow, f"{name}mlp.")
        kept += work.tokens * (dense.first * D + dense.tensors(model.activation) * int(D * model.mlp_ratio)) * e
    return kept


@dataclass(frozen=True)
class _Reached:
    """Which values of a feed-forward layer have gradients to be made by them."""

    first: bool  # the weights of its first layer, by its input
    middle: bool  # what comes out of that
    last: bool  # the weights of its last layer, by that layer's input

    @classmethod
    def of(cls, flow: GradientFlow, module: str) -> _Reached:
        first = flow.trains(*(module + layer for layer in ("fc1.weight", "gate_proj.", "up_proj.", "w1")))
        last = flow.trains(*(module + layer for layer in ("fc2.weight", "down_proj.", "w2")))
        return cls(first, flow.into(f"{module}fc2.weight"), last)

    def tensors(self, activation: str, dense: bool = True) -> int:
        """Of its hidden width that it keeps. Experts keep no SiLU of their gate."""
        before = {"gelu": 1, "swiglu": 3 if dense else 2}[activation]
        return before * self.middle + self.last


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


def mixture_activation_bytes(config: Config, work: Workload) -> float:
    """Of that, what all mixture-of-experts layers save, with their inputs."""
    experts, flow = config.experts, GradientFlow(config)
    if experts is None:
        return 0.0
    return sum(_moe_activation_bytes(config, experts, work, flow, block) for block in config.moe_blocks)


def rounded_weight_bytes(config: Config, flow: GradientFlow | None = None) -> float:
    """The copies of a rank's fp32 weights that mixed precision makes in each forward pass, and backward needs again."""
    if product_bytes(config) == weight_bytes(config):
        return 0
    flow = flow or GradientFlow(config)
    again = RECOMPUTED_PARTS[config.train.recompute]
    return product_bytes(config) * sum(
        parameter.numel() // _holders(config, name)
        for name, parameter in meta_model(config).named_parameters()
        if part_of(name) not in again and flow.reaches(name)
    )


def _cross_attention_bytes(config: Config, work: Workload, flow: GradientFlow, block: int) -> float:
    model, e, r, name = config.model, product_bytes(config), weight_bytes(config), f"blocks.{block}.cross_attn."
    before, attends = flow.before(block, "cross_attn"), flow.into(f"{name}proj.weight")
    # The residual stream before it and its norm; q, the output; then k and v; statistics of the norm.
    heads = attends * _head_bytes(config, tensors=2, normed=1)
    kept = (e * flow.trains(f"{name}q.") + r * before) * model.hidden_size + 8 * before
    of_tokens = work.tokens * (kept + heads + attends * 4 * model.num_heads)
    return of_tokens + work.images * model.text_max_length * heads


def _moe_activation_bytes(
    config: Config, experts: RouterSettings, work: Workload, flow: GradientFlow, block: int
) -> float:
    """Of one mixture-of-experts layer."""
    D, e, r = config.model.hidden_size, product_bytes(config), weight_bytes(config)
    module, kept = f"blocks.{block}.mlp.", int(config.train.recompute == "none")
    routed, shared, unconditional = (
        _Reached.of(flow, f"{module}{part}.") for part in ("experts", "shared", "unconditional")
    )
    scored = flow.trains(f"{module}router.") or flow.into(f"{module}experts.w1")
    hidden = kept * _hidden_bytes(config, experts, routed)
    of_shared = kept * shared.tensors(experts.shared_activation) * experts.shared_hidden_size(D) * e
    of_unconditional = kept * _hidden_bytes(config, experts, unconditional, dense=True)
    # A router reads the tokens of mixed precision before they are rounded for the experts.
    fp32_copy = 4 * D if e < 4 and (e < r or experts.keeps_fp32_tokens) else 0
    router = work.tokens * scored * (4 * experts.num_experts + fp32_copy + experts.saved_bytes(D, e))
    # Out of the experts, where rows travel also into them (else backward picks them once more), and three indices.
    travel = routed.first and config.parallel.expert > 1
    rows = work.assignments * ((scored + travel) * D * e + hidden + 3 * 8)
    beside = work.tokens * of_shared + work.unconditional * (unconditional.first * D * e + of_unconditional)
    # The layer's output, of the residual stream's type, is added up again in backward, unless more is in it.
    more = experts.shared_experts or experts.unconditional_expert
    summed = work.tokens * flow.modulates(block) * ((r if more else 0) - e) * D
    layer_input = work.tokens * D * e * (routed.first or shared.first or flow.trains(f"{module}router."))
    return layer_input + router + rows + beside + summed


def _hidden_bytes(config: Config, experts: RouterSettings, reached: _Reached, dense: bool = False) -> float:
    """What an expert saves of each row beside its input; `dense`: the unconditional one."""
    hidden_size = int(config.model.hidden_size * experts.expert_mlp_ratio)
    return reached.tensors(experts.activation, dense) * hidden_size * product_bytes(config)


def recomputed_bytes(config: Config, work: Workload) -> float:
    """Bytes that backward computes again of one part of a block, the largest: an estimate."""
    model, mode = config.model, config.train.recompute
    D, e = model.hidden_size, product_bytes(config)
    if mode == "none":
        return 0.0
    parts: list[float] = [work.tokens * (2 * D + _DENSE_TENSORS[model.activation] * int(D * model.mlp_ratio)) * e]
    if config.experts is not None:
        every = _Reached(first=True, middle=True, last=True)
        parts.append(work.assignments * _hidden_bytes(config, config.experts, every))
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
