"""Seconds of a step, from what a GPU is assumed to achieve of its data sheet's numbers: estimates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from diffmoe_dist.config import Config
from diffmoe_dist.model.accounting import Accounting
from diffmoe_dist.planning.accelerators import Accelerator, matmul_format
from diffmoe_dist.planning.memory import activation_bytes, weight_bytes, wire_bytes, zero_groups
from diffmoe_dist.planning.traffic import CUT_LAYERS, GRADIENTS, PARAMETERS, ROW_GRADIENTS, ROWS, Transfer
from diffmoe_dist.planning.workload import Workload

# Fractions of the data sheet's numbers. ProMoE's Dense-L at 213 images a second on an A800 (from its Table 14) is 33 %
# of the bf16 peak.
COMPUTE_FRACTION = {"bf16": 0.35, "tf32": 0.35, "fp32": 0.7}
MEMORY_FRACTION = 0.8
LINK_FRACTION = 0.75
CALL_LATENCY = 30e-6  # seconds of a collective beside its bytes
# Seconds of a step of a collective (`Transfer.steps`): NCCL's own figures for rings with its protocol LL128. A message
# of an all-to-all is an assumption: several travel at once.
NVLINK_HOP, NETWORK_HOP, MESSAGE = 1.9e-6, 4e-6, 1e-6
ACTIVATION_PASSES = 4  # times that a saved activation crosses the memory bus, with its gradient and what is not saved


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
    kind = matmul_format(config)
    of_image = accounting.training_flops(work.capacity) + recomputed_flops(config, accounting, work.capacity)
    flops = work.images * work.micro_steps * of_image
    arithmetic = flops / (accelerator.peak_flops[kind] * COMPUTE_FRACTION[kind])
    bandwidth = accelerator.memory_bandwidth * MEMORY_FRACTION
    moved = ACTIVATION_PASSES * activation_bytes(config, work) * work.micro_steps / bandwidth
    optimizer = sum(state_traffic(config, ranks).values()) / bandwidth
    collectives = {transfer.name: transfer_seconds(transfer, accelerator) for transfer in transfers}
    reduction = sum(seconds for name, seconds in collectives.items() if name.startswith(GRADIENTS))
    gather = sum(seconds for name, seconds in collectives.items() if name.startswith(PARAMETERS))
    tokens = sum(collectives.get(name, 0.0) for name in (ROWS, ROW_GRADIENTS))
    cut = sum(seconds for name, seconds in collectives.items() if name.startswith(CUT_LAYERS))
    compute = {"arithmetic": arithmetic} if arithmetic >= moved else {"activations": moved}
    return {
        **compute,
        "token exchange": tokens,
        **({"cut layers": cut} if config.parallel.tensor > 1 else {}),
        "other routing and report": sum(collectives.values()) - tokens - reduction - gather - cut,
        "gradients beyond backward": max(0.0, reduction - 2 / 3 * max(arithmetic, moved)),
        "parameter gather": gather,
        "optimizer": optimizer,
    }


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


def state_traffic(config: Config, ranks: int) -> dict[str, int]:
    """Bytes that a rank reads and writes of gradients, weights and optimizer state in a step, by pass.

    From the gradients of the last backward pass on, collectives apart, and without clipping, which writes 4 bytes more.
    """
    e, wire = weight_bytes(config), wire_bytes(config)
    passes: Counter[str] = Counter()
    for group in zero_groups(config, ranks):
        owned = group.elements // group.ranks
        made, summed = (e, e) if group.ranks == 1 else (wire, 4)
        if group.ranks > 1:
            passes["copies to be reduced"] += group.elements * (e + wire)
        passes["fp32 gradients"] += owned * (made + 4) if made < 4 else 0
        passes["norm"] += owned * summed
        passes["AdamW"] += owned * 28  # reads gradient, weight and moments, writes the latter
        passes["model's weights"] += group.partition * (4 + e) if e < 4 else 0
        passes["EMA"] += config.ema.count * group.partition * 12
    return dict(passes)


def transfer_seconds(transfer: Transfer, accelerator: Accelerator) -> float:
    """Seconds of all calls of a collective; NVLink and the network carry their parts at the same time."""
    links = max(transfer.intra_node / accelerator.nvlink, transfer.inter_node / accelerator.network)
    step = MESSAGE
    if transfer.kind != "all-to-all":
        step = (transfer.intra_node * NVLINK_HOP + transfer.inter_node * NETWORK_HOP) / transfer.sent
    return transfer.busiest * links / LINK_FRACTION + transfer.calls * (CALL_LATENCY + transfer.steps * step)
