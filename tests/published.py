"""The published models of DiT, DiffMoE and ProMoE: state dicts of their names and shapes, and their forward passes.

The forward pass is the one of evaluation, slow and plain: one token and one expert at a time, in the precision of its
input. It shares no code with the package. Equation and algorithm numbers are those of the paper that a line names.

Shape legend: B images, C channels, H = W input size, p patch size, G = H / p patches a side, S = G^2 tokens an image,
D width, F hidden width of an expert, N routed experts, K experts a token takes, K' or n_i tokens an expert takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Assignment = tuple[int, int, int, Tensor]  # image, token of the image, expert, gate ()

# `dense` has no experts. In `diffmoe`, token_choice is TC-DiT, expert_choice EC-DiT and global_pool DiffMoE itself.
VARIANTS = {
    "dit": ("dense",),
    "diffmoe": ("dense", "token_choice", "expert_choice", "global_pool"),
    "promoe": ("token_choice", "expert_choice"),
}

# The sizes of every model here. A batch of a few images reaches every expert of every layer.
WIDTH, HEADS, PATCH, INPUT_SIZE, CLASSES, EXPERTS = 32, 4, 2, 8, 10, 4
DENSE_HIDDEN = 4 * WIDTH  # F is the same, but half of it in ProMoE
FREQUENCIES = 256


@dataclass(frozen=True)
class Router:
    """What the state dict of a model does not say about its experts."""

    variant: str = "dense"  # one of `VARIANTS`
    top_k: int = 1  # K, for both token_choice variants; the slots of ProMoE's expert_choice are int(S / N * K)
    capacity: float = 1.0  # C, for DiffMoE's expert_choice
    activation: str = "identity"  # of ProMoE's cosines: `identity`, `sigmoid` or `softmax`


@dataclass(frozen=True)
class Form:
    """The options of the code bases that change which tensors there are."""

    head_dim: int = WIDTH // HEADS
    qk_norm: str = "none"  # or `layer`, as DiffMoE and ProMoE have it, with weight and bias; or `rms`, weight alone
    swiglu: bool = False  # DiffMoE's use_swiglu: dense layers and routed experts without biases
    renamed: bool = False  # ProMoE's use_swiglu: dense layers are GELU all the same, under the experts' names
    every_block: bool = False  # interleave: false
    unconditional: bool = True  # ProMoE's use_uncond_expert
    shared: tuple[str, int] | None = None  # `gelu` or `swiglu` and hidden width; ProMoE has one of GELU by itself


def synthetic_state_dict(
    layout: str, variant: str = "dense", *, depth: int = 4, in_channels: int = 4, form: Form | None = None
) -> dict[str, Tensor]:
    """Random fp32 weights under the names of a published model with learned variances; `pos_embed` is the true table.

    No weight is zero.

    Args:
        layout: a key of `VARIANTS`. `promoe` has a shared expert besides the N routed ones.
        variant: one of its values.
    """
    assert variant in VARIANTS[layout], (layout, variant)
    D, p, form = WIDTH, PATCH, form or Form()
    inner = HEADS * form.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (D, in_channels, p, p),
        "x_embedder.proj.bias": (D,),
        **_linear_shapes("t_embedder.mlp.0", FREQUENCIES, D),
        **_linear_shapes("t_embedder.mlp.2", D, D),
        "y_embedder.embedding_table.weight": (CLASSES + 1, D),
    }
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= _linear_shapes(f"{block}.attn.qkv", D, 3 * inner)
        shapes |= _linear_shapes(f"{block}.attn.proj", inner, D)
        if form.qk_norm != "none":
            for place in ("q_norm", "k_norm"):
                shapes[f"{block}.attn.{place}.weight"] = (form.head_dim,)
                if form.qk_norm == "layer":
                    shapes[f"{block}.attn.{place}.bias"] = (form.head_dim,)
        # Both papers: every second block, those with an odd index counted from 0.
        if variant != "dense" and (i % 2 == 1 or form.every_block):
            shapes |= _moe_shapes(f"{block}.mlp", layout, variant, form)
        else:
            names = ("up_proj", "down_proj") if form.renamed else ("fc1", "fc2")
            shapes |= _mlp_shapes(f"{block}.mlp", DENSE_HIDDEN, form.swiglu, names)
        shapes |= _linear_shapes(f"{block}.adaLN_modulation.1", D, 6 * D)
    shapes |= _linear_shapes("final_layer.linear", D, 2 * in_channels * p * p)
    shapes |= _linear_shapes("final_layer.adaLN_modulation.1", D, 2 * D)

    generator = torch.Generator().manual_seed(0)
    state = {"pos_embed": position_table(D, INPUT_SIZE // p)}
    state |= {name: _random_weight(name, shape, generator) for name, shape in shapes.items()}
    return state


DENSE = Router()


def forward(layout: str, state: Weights, x: Tensor, t: Tensor, y: Tensor, router: Router = DENSE) -> Tensor:
    """The published forward pass in evaluation mode.

    Args:
        x: (B, C, H, W); its dtype is the one of all arithmetic but the sinusoids of `t`.
        t: (B,) what the published code feeds: DiffMoE a time in [0, 1], ProMoE 1000 sigma, DiT a step in [0, 1000).
        y: (B,) int64; the last row of the label table is the null label.

    Returns:
        (B, 2 C, H, W): the prediction, then the variance channels.
    """
    assert router.variant in VARIANTS[layout], (layout, router.variant)
    w = {name: tensor.to(x.dtype) for name, tensor in state.items()}
    is_null = [label == CLASSES for label in y.tolist()]

    condition_BD = _time_embedding(t, w) + w["y_embedder.embedding_table.weight"][y]
    h_BSD = _patch_embedding(x, w) + w["pos_embed"]
    for i in range(_depth(w)):
        block = f"blocks.{i}"
        # DiT, Sec. 3.2 (adaLN-Zero): shift, scale and gate of the attention, then those of the feed-forward layer.
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = _modulation(condition_BD, w, block, 6)
        h_BSD = h_BSD + gate_msa * _attention(_modulated_norm(h_BSD, shift_msa, scale_msa), w, block)
        u_BSD = _modulated_norm(h_BSD, shift_mlp, scale_mlp)
        if not any(name.startswith(f"{block}.mlp.experts.") for name in w):
            u_BSD = _mlp(u_BSD, w, f"{block}.mlp")
        elif layout == "diffmoe":
            u_BSD = _diffmoe_layer(u_BSD, w, f"{block}.mlp", router)
        else:
            u_BSD = _promoe_layer(u_BSD, is_null, w, f"{block}.mlp", router)
        h_BSD = h_BSD + gate_mlp * u_BSD
    shift, scale = _modulation(condition_BD, w, "final_layer", 2)
    return _unpatchify(_linear(_modulated_norm(h_BSD, shift, scale), w, "final_layer.linear"), w)


def position_table(hidden_size: int, grid_size: int) -> Tensor:
    """DiT's fixed table, (1, S, D) fp32, tokens row by row: of D, the first half is for the column, the second the row.

    Each half is sines, then cosines, of the place at D / 4 frequencies from 1 down to almost 1 / 10000.
    """
    quarter = hidden_size // 4
    assert quarter * 4 == hidden_size
    frequencies = [10_000.0 ** (-k / quarter) for k in range(quarter)]
    rows = []
    for row in range(grid_size):
        for column in range(grid_size):
            values = []
            for place in (column, row):
                values += [math.sin(place * frequency) for frequency in frequencies]
                values += [math.cos(place * frequency) for frequency in frequencies]
            rows.append(values)
    return torch.tensor([rows], dtype=torch.float32)


def _linear_shapes(name: str, fan_in: int, fan_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def _mlp_shapes(name: str, hidden: int, swiglu: bool, names: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    D = WIDTH
    if swiglu:
        gate_and_up = {f"{name}.{linear}.weight": (hidden, D) for linear in ("gate_proj", "up_proj")}
        return {**gate_and_up, f"{name}.down_proj.weight": (D, hidden)}
    return {**_linear_shapes(f"{name}.{names[0]}", D, hidden), **_linear_shapes(f"{name}.{names[1]}", hidden, D)}


def _moe_shapes(layer: str, layout: str, variant: str, form: Form) -> dict[str, tuple[int, ...]]:
    D, N, F = WIDTH, EXPERTS, DENSE_HIDDEN // 2 if layout == "promoe" else DENSE_HIDDEN
    shapes: dict[str, tuple[int, ...]] = {}
    if layout == "promoe":
        shapes[f"{layer}.cluster_centers"] = (N, D)
        names = "up_proj", "down_proj"
        experts = [f"experts.{e}" for e in range(N + form.unconditional)]  # expert N is the unconditional one
        hidden = F if form.shared is None else form.shared[1]
        shapes |= _mlp_shapes(f"{layer}.shared_expert", hidden, False, names)
    else:
        shapes[f"{layer}.gate.weight" if variant == "token_choice" else f"{layer}.gate_weight"] = (N, D)
        names = "fc1", "fc2"
        experts = [f"experts.{e}" for e in range(N)]
        if form.shared is not None:
            kind, hidden = form.shared
            shapes |= _mlp_shapes(f"{layer}.shared_experts", hidden, kind == "swiglu", names)
    for expert in experts:
        shapes |= _mlp_shapes(f"{layer}.{expert}", F, form.swiglu, names)
    if variant == "global_pool":
        shapes |= {f"{layer}.expert_threshold": (N,), f"{layer}.ema_decay": (1,)}
        shapes |= _linear_shapes(f"{layer}.capacity_predictor.0", D, D)
        shapes |= _linear_shapes(f"{layer}.capacity_predictor.2", D, N)
    return shapes


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Large enough that each weight shows in the output, small enough that activations keep their size."""
    if name.endswith(".ema_decay"):
        return torch.full(shape, 0.95)
    if name.endswith(".expert_threshold"):
        return 0.3 + 0.4 * torch.rand(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    if name.endswith("_norm.weight"):
        return 1 + 0.3 * values
    if name.endswith(".bias"):  # small: tokens of one direction would all go to one expert
        return (0.3 if "capacity_predictor" in name else 0.1) * values
    if name == "y_embedder.embedding_table.weight":
        return 0.5 * values
    if name.endswith("capacity_predictor.2.weight"):  # probabilities that lie on both sides of the thresholds
        values = 3 * values
    return values / math.sqrt(math.prod(shape[1:]))


def _depth(w: Weights) -> int:
    return 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))


def _linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    """Two linear layers with a tanh-approximated GELU between them; or SwiGLU, three of them without biases."""
    if f"{name}.gate_proj.weight" in w:
        h = _silu(x @ w[f"{name}.gate_proj.weight"].T) * (x @ w[f"{name}.up_proj.weight"].T)
        return h @ w[f"{name}.down_proj.weight"].T
    first, second = ("fc1", "fc2") if f"{name}.fc1.weight" in w else ("up_proj", "down_proj")
    h = _linear(x, w, f"{name}.{first}")
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return _linear(h, w, f"{name}.{second}")


def _time_embedding(t_B: Tensor, w: Weights) -> Tensor:
    """(B,) to (B, D). The sinusoids are fp32, as published: at t = 1000 their rounding is 3e-5."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
    angles = t_B.float()[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(w["t_embedder.mlp.0.weight"].dtype)
    return _linear(_silu(_linear(waves, w, "t_embedder.mlp.0")), w, "t_embedder.mlp.2")


def _patch_embedding(x: Tensor, w: Weights) -> Tensor:
    """(B, C, H, W) to (B, S, D), tokens row by row."""
    kernel = w["x_embedder.proj.weight"]  # (D, C, p, p)
    p, G = kernel.shape[-1], x.shape[-1] // kernel.shape[-1]
    tokens = []
    for i in range(G):
        for j in range(G):
            patch = x[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p]
            tokens.append(patch.flatten(1) @ kernel.flatten(1).T + w["x_embedder.proj.bias"])
    return torch.stack(tokens, dim=1)


def _unpatchify(values: Tensor, w: Weights) -> Tensor:
    """(B, S, p p 2C), pixel row, then pixel column, then channel, to (B, 2C, H, W)."""
    p, G = w["x_embedder.proj.weight"].shape[-1], math.isqrt(values.shape[1])
    patches = values.view(len(values), G, G, p, p, -1)
    image = values.new_empty(len(values), patches.shape[-1], G * p, G * p)
    for i in range(G):
        for j in range(G):
            for pixel_row in range(p):
                for pixel_column in range(p):
                    image[:, :, i * p + pixel_row, j * p + pixel_column] = patches[:, i, j, pixel_row, pixel_column]
    return image


def _modulation(condition_BD: Tensor, w: Weights, name: str, parts: int) -> Sequence[Tensor]:
    """(B, D) to `parts` tensors (B, 1, D)."""
    return _linear(_silu(condition_BD), w, f"{name}.adaLN_modulation.1")[:, None].chunk(parts, dim=2)


def _modulated_norm(x_BSD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A layer norm without weights, then shift and scale."""
    centred = x_BSD - x_BSD.mean(dim=-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-6)
    return normed * (1 + scale) + shift


def _attention(x_BSD: Tensor, w: Weights, block: str) -> Tensor:
    """Of the outputs of `qkv`, the order is q, k, v; within each, head by head."""
    B, S, _ = x_BSD.shape
    width = len(w[f"{block}.attn.qkv.weight"]) // 3 // HEADS
    qkv = _linear(x_BSD, w, f"{block}.attn.qkv").view(B, S, 3, HEADS, width)
    outputs = []
    for head in range(HEADS):
        q, k, v = qkv[:, :, 0, head], qkv[:, :, 1, head], qkv[:, :, 2, head]  # (B, S, width of a head)
        q, k = _head_norm(q, w, f"{block}.attn.q_norm"), _head_norm(k, w, f"{block}.attn.k_norm")
        weights_BSS = (q @ k.transpose(1, 2) / math.sqrt(width)).softmax(dim=-1)
        outputs.append(weights_BSS @ v)
    return _linear(torch.cat(outputs, dim=-1), w, f"{block}.attn.proj")


def _head_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """The one layer norm of all heads, torch's with its epsilon; an RMS norm where there is no bias."""
    if f"{name}.weight" not in w:
        return x
    if f"{name}.bias" not in w:
        return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]
    x = x - x.mean(dim=-1, keepdim=True)
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _diffmoe_layer(x_BSD: Tensor, w: Weights, layer: str, router: Router) -> Tensor:
    if router.variant == "token_choice":
        assignments = _token_choice(x_BSD, w[f"{layer}.gate.weight"], router.top_k)
    elif router.variant == "expert_choice":
        assignments = _expert_choice(x_BSD, w[f"{layer}.gate_weight"], router.capacity)
    else:
        assignments = _global_pool(x_BSD, w, layer)
    y_BSD = _sum_of_experts(x_BSD, assignments, w, layer)
    shared = f"{layer}.shared_experts"
    return y_BSD + _mlp(x_BSD, w, shared) if any(name.startswith(shared) for name in w) else y_BSD


def _sum_of_experts(x_BSD: Tensor, assignments: list[Assignment], w: Weights, layer: str) -> Tensor:
    """DiffMoE eq. 3, ProMoE eq. 5: a token's output is the sum of gate times expert; 0 for a token nobody took."""
    y_BSD = torch.zeros_like(x_BSD)
    for b, s, e, gate in assignments:
        y_BSD[b, s] += gate * _mlp(x_BSD[b, s], w, f"{layer}.experts.{e}")
    return y_BSD


def _token_choice(x_BSD: Tensor, gate_weight_ND: Tensor, top_k: int) -> list[Assignment]:
    assignments = []
    for b, x_SD in enumerate(x_BSD):
        for s, x_D in enumerate(x_SD):
            # DiffMoE eq. 1-2, Alg. 2: softmax over the experts; the K largest, unchanged, are the gates.
            scores_N = (gate_weight_ND @ x_D).softmax(dim=0)
            assignments += [(b, s, e, scores_N[e]) for e in _largest(scores_N, top_k)]
    return assignments


def _expert_choice(x_BSD: Tensor, gate_weight_ND: Tensor, capacity: float) -> list[Assignment]:
    S, N = x_BSD.shape[1], len(gate_weight_ND)
    assignments = []
    for b, x_SD in enumerate(x_BSD):
        # DiffMoE Sec. 2.1, Alg. 1: softmax over the experts; each takes its best K' tokens of the image.
        scores_SN = (x_SD @ gate_weight_ND.T).softmax(dim=1)
        for e in range(N):
            assignments += [(b, s, e, scores_SN[s, e]) for s in _largest(scores_SN[:, e], int(S / N * capacity))]
    return assignments


def _global_pool(x_BSD: Tensor, w: Weights, layer: str) -> list[Assignment]:
    S = x_BSD.shape[1]
    # DiffMoE eq. 4: all tokens of the batch are one pool.
    x_TD = x_BSD.flatten(0, 1)
    # DiffMoE Alg. 3: the affinity of eq. 5, with a softmax over the experts.
    scores_TN = (x_TD @ w[f"{layer}.gate_weight"].T).softmax(dim=1)
    # DiffMoE eq. 10: the capacity predictor.
    logits_TN = _linear(_silu(_linear(x_TD, w, f"{layer}.capacity_predictor.0")), w, f"{layer}.capacity_predictor.2")
    assignments = []
    for e in range(scores_TN.shape[1]):
        # DiffMoE eq. 14-15, Alg. 4: the threshold gives the number of tokens n_i only; which ones, the gate says.
        n_i = sum(p > w[f"{layer}.expert_threshold"][e].item() for p in logits_TN[:, e].sigmoid().tolist())
        assignments += [(token // S, token % S, e, scores_TN[token, e]) for token in _largest(scores_TN[:, e], n_i)]
    return assignments


def _promoe_layer(x_BSD: Tensor, is_null: list[bool], w: Weights, layer: str, router: Router) -> Tensor:
    top_k = router.top_k
    centers_ND = w[f"{layer}.cluster_centers"]
    S, N = x_BSD.shape[1], len(centers_ND)
    assignments: list[Assignment] = []
    for b, x_SD in enumerate(x_BSD):
        if is_null[b] and f"{layer}.experts.{N}.up_proj.weight" in w:
            # ProMoE Sec. 4.1: an image without a condition goes to the unconditional expert, the last, with weight 1.
            assignments += [(b, s, N, x_BSD.new_ones(())) for s in range(S)]
            continue
        # ProMoE eq. 4 with alpha = 1: cosines of tokens and prototypes.
        cosines_SN = _normalised(x_SD) @ _normalised(centers_ND).T
        # A score is both the choice and the gate.
        if router.variant == "token_choice":
            scores_SN = _activated(cosines_SN, router.activation, softmax_dim=1)
            assignments += [(b, s, e, scores_SN[s, e]) for s in range(S) for e in _largest(scores_SN[s], top_k)]
        else:
            scores_SN = _activated(cosines_SN, router.activation, softmax_dim=0)
            slots = max(1, min(int(S / N * top_k), S))
            assignments += [(b, s, e, scores_SN[s, e]) for e in range(N) for s in _largest(scores_SN[:, e], slots)]
    # ProMoE eq. 5: the shared expert sees every token.
    return _mlp(x_BSD, w, f"{layer}.shared_expert") + _sum_of_experts(x_BSD, assignments, w, layer)


def _normalised(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(dim=-1, keepdim=True).sqrt()


def _activated(cosines_SN: Tensor, activation: str, softmax_dim: int) -> Tensor:
    if activation == "softmax":
        return cosines_SN.softmax(dim=softmax_dim)
    assert activation in ("identity", "sigmoid"), activation
    return cosines_SN.sigmoid() if activation == "sigmoid" else cosines_SN


def _largest(scores: Tensor, count: int) -> list[int]:
    """Places of the `count` largest scores; of equal scores the first."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]
