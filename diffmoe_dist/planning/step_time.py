"""Seconds of a step, from what one GPU achieved of its data sheet's numbers: estimates.

The device computes, moves activations and state through its memory, one after the other; a host starts the kernels.
The slower of the two decides. Collectives come on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from diffmoe_dist.config import Config
from diffmoe_dist.model.accounting import Accounting
from diffmoe_dist.model.on_meta import meta_model
from diffmoe_dist.planning.accelerators import Accelerator, matmul_format
from diffmoe_dist.planning.memory import (
    activation_bytes,
    mixture_activation_bytes,
    rounded_weight_bytes,
    weight_bytes,
    wire_bytes,
    zero_groups,
)
from diffmoe_dist.planning.traffic import CUT_LAYERS, GRADIENTS, PARAMETERS, ROW_GRADIENTS, ROWS, Transfer
from diffmoe_dist.planning.workload import Workload

# Fractions of the data sheet's numbers, and times that saved activations are moved, with their gradients and what is
# not saved: of one H100 and one H200 in bf16, 2026-11-26, sizes B and L (docs/performance.md, "On a GPU"). TF32 is
# assumed to be like bf16; fp32 is an assumption.
COMPUTE_FRACTION = {"bf16": 0.68, "tf32": 0.68, "fp32": 0.7}
MEMORY_FRACTION = 0.8
OPTIMIZER_FRACTION = 0.85  # of the bandwidth, in AdamW
ACTIVATION_RATE = 2.7e12  # bytes a second at most: a faster memory did not make an H200 faster than an H100
ACTIVATION_PASSES = 7.5
MIXTURE_PASSES = 12  # more, of what mixture-of-experts layers save
ROUNDING_PASSES = 3  # of the copies of fp32 weights in mixed precision: read in fp32, written in bf16
# Kernels that a step launches, counted there, and what one costs the host with all the Python around it.
LAUNCH = 29e-6
BLOCK_LAUNCHES, MIXTURE_LAUNCHES = 60, 95  # forward and backward of a block; more, of one with experts
SPREAD_LAUNCHES = 50  # more, of a mixture whose experts or pool are on several ranks
PARAMETER_LAUNCHES = 2.2  # norm, AdamW, average
ROUNDING_LAUNCHES = 1.2  # more, of each parameter in mixed precision
RECOMPUTED_LAUNCHES = 30  # of a part of a block that is computed again
LINK_FRACTION = 0.75
CALL_LATENCY = 30e-6  # seconds of a collective beside its bytes
# Seconds of a step of a collective (`Transfer.steps`): NCCL's own figures for rings with its protocol LL128. A message
# of an all-to-all is an assumption: several travel at once.
NVLINK_HOP, NETWORK_HOP, MESSAGE = 1.9e-6, 4e-6, 1e-6
HOST = "waiting for the host"


def step_seconds(
    config: Config,
    accelerator: Accelerator,
    accounting: Accounting,
    work: Workload,
    transfers: Sequence[Transfer],
    ranks: int,
) -> dict[str, float]:
    """Seconds of each part of a step, which follow one another.

    Gradients are reduced while the backward pass computes the next ones, so of their reduction only the time beyond
    the backward pass is a part of the step.
    """
    device = device_seconds(config, accelerator, accounting, work)
    optimizer = optimizer_seconds(config, accelerator, ranks)
    waiting = max(0.0, LAUNCH * launches(config, work, ranks) - sum(device.values()) - optimizer)
    backward = 2 / 3 * (sum(device.values()) + waiting)
    collectives = {transfer.name: transfer_seconds(transfer, accelerator) for transfer in transfers}
    reduction = sum(seconds for name, seconds in collectives.items() if name.startswith(GRADIENTS))
    gather = sum(seconds for name, seconds in collectives.items() if name.startswith(PARAMETERS))
    tokens = sum(collectives.get(name, 0.0) for name in (ROWS, ROW_GRADIENTS))
    cut = sum(seconds for name, seconds in collectives.items() if name.startswith(CUT_LAYERS))
    return {
        **device,
        "token exchange": tokens,
        **({"cut layers": cut} if config.parallel.tensor > 1 else {}),
        "other routing and report": sum(collectives.values()) - tokens - reduction - gather - cut,
        "gradients beyond backward": max(0.0, reduction - backward),
        "parameter gather": gather,
        "optimizer": optimizer,
        HOST: waiting,
    }


def device_seconds(
    config: Config, accelerator: Accelerator, accounting: Accounting, work: Workload
) -> dict[str, float]:
    """Of forward and backward of all micro-steps, where no kernel waits for the host or for other ranks."""
    kind = matmul_format(config)
    of_image = accounting.training_flops(work.capacity) + recomputed_flops(config, accounting, work.capacity)
    flops = work.images * work.micro_steps * of_image
    once = replace(config, train=replace(config.train, recompute="none"))  # forward and backward without any more
    whole = replace(once, train=replace(once.train, freeze=[]))

    def saved(of: Config) -> float:
        return activation_bytes(of, work) - rounded_weight_bytes(of)

    # A third of the passes is the forward one: of what backward leaves out, and of what it computes again.
    moved = ACTIVATION_PASSES * (saved(once) + (saved(whole) - saved(config)) / 3)
    moved += MIXTURE_PASSES * mixture_activation_bytes(once, work) + ROUNDING_PASSES * rounded_weight_bytes(once)
    return {
        "arithmetic": flops / (accelerator.peak_flops[kind] * COMPUTE_FRACTION[kind]),
        "activations": moved * work.micro_steps / min(accelerator.memory_bandwidth * MEMORY_FRACTION, ACTIVATION_RATE),
    }


def optimizer_seconds(config: Config, accelerator: Accelerator, ranks: int) -> float:
    """From the gradients of the last backward pass to the average, collectives apart."""
    traffic = state_traffic(config, ranks)
    others = sum(traffic.values()) - traffic["AdamW"]
    return (traffic["AdamW"] / OPTIMIZER_FRACTION + others / MEMORY_FRACTION) / accelerator.memory_bandwidth


def launches(config: Config, work: Workload, ranks: int) -> float:
    """Kernels of a step, and what else its host does in numbers of them; without `train.compile`."""
    layers, mixtures, recompute = config.model.depth, len(config.moe_blocks), config.train.recompute
    parameters = sum(1 for _ in meta_model(config).parameters())
    of_mixture = MIXTURE_LAUNCHES
    if config.parallel.expert > 1 or (
        config.experts is not None and ranks > 1 and config.experts.pool_kind() == "global"
    ):
        of_mixture += SPREAD_LAUNCHES
    micro_step: float = layers * BLOCK_LAUNCHES + mixtures * of_mixture
    if recompute != "none":
        micro_step += RECOMPUTED_LAUNCHES * (layers + mixtures + (layers if recompute == "block" else 0))
    if config.precision == "bf16_mixed":
        micro_step += ROUNDING_LAUNCHES * parameters
    return work.micro_steps * micro_step + PARAMETER_LAUNCHES * parameters


def recomputed_flops(config: Config, accounting: Accounting, capacity: float) -> float:
    """Floating-point operations that backward does again for one image; MFU counts them as none of the model's.

    Of an MLP that is its first product, or two with SwiGLU: the last one's result is not needed.
    """
    mode, macs = config.train.recompute, accounting.macs(capacity)
    if mode == "none":
        return 0.0
    first = {"gelu": 1 / 2, "swiglu": 2 / 3}
    again = macs["dense MLP"] * first[config.model.activation]
    if config.experts is not None:
        again += macs["routed experts"] * first[config.experts.activation]
        again += macs["shared experts"] * first[config.experts.shared_activation]
    if mode == "block":
        again += macs["attention"] + macs["cross-attention"] + macs["adaLN"] + accounting.attention_macs
    return 2 * again


def state_traffic(config: Config, ranks: int, kernels: bool = True) -> dict[str, int]:
    """Bytes that a rank reads and writes of gradients, weights and optimizer state in a step, by pass.

    From the gradients of the last backward pass on, collectives apart.

    Args:
        kernels: AdamW is that of `adamw_kernels`, as on CUDA. torch's wants gradients in fp32, leaves the bf16 weights
            to a copy, and writes the gradients, 4 bytes more, in a step that clips.
    """
    e, wire = weight_bytes(config), wire_bytes(config)
    passes: Counter[str] = Counter()
    for group in zero_groups(config, ranks):
        owned = group.elements // group.ranks
        made, summed = (e, e) if group.ranks == 1 else (wire, 4)
        if group.ranks > 1:
            passes["copies to be reduced"] += group.elements * (e + wire)
        passes["norm"] += owned * summed
        rounded = e if e < 4 else 0
        if kernels:
            passes["AdamW"] += owned * (summed + 24 + rounded)  # reads gradient, weight and moments, writes the latter
        else:
            passes["fp32 gradients"] += owned * (made + 4) if made < 4 else 0
            passes["AdamW"] += owned * 28
            passes["model's weights"] += group.partition * (4 + e) if rounded else 0
        passes["EMA"] += config.ema.count * group.partition * 12
    return dict(passes)


def transfer_seconds(transfer: Transfer, accelerator: Accelerator) -> float:
    """Seconds of all calls of a collective; NVLink and the network carry their parts at the same time."""
    links = max(transfer.intra_node / accelerator.nvlink, transfer.inter_node / accelerator.network)
    step = MESSAGE
    if transfer.kind != "all-to-all":
        step = (transfer.intra_node * NVLINK_HOP + transfer.inter_node * NETWORK_HOP) / transfer.sent
    return transfer.busiest * links / LINK_FRACTION + transfer.calls * (CALL_LATENCY + transfer.steps * step)
