"""A plan as a table to read, and as a dictionary for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from diffmoe_dist.planning.accelerators import matmul_format
from diffmoe_dist.planning.dense import all_macs, equal_dense_models
from diffmoe_dist.planning.estimate import Plan
from diffmoe_dist.planning.step_time import (
    CALL_LATENCY,
    COMPUTE_FRACTION,
    LAUNCH,
    LINK_FRACTION,
    MEMORY_FRACTION,
    NETWORK_HOP,
    NVLINK_HOP,
    OPTIMIZER_FRACTION,
)
from diffmoe_dist.planning.traffic import Transfer

Unit = tuple[str, float]  # its name, and how many of the base unit it is
PARAMETERS: tuple[Unit, ...] = (("millions", 1e6), ("thousands", 1e3))
MACS: tuple[Unit, ...] = (("10^9", 1e9), ("10^6", 1e6))
MEMORY: tuple[Unit, ...] = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
BYTES: tuple[Unit, ...] = (("MB", 1e6), ("kB", 1e3), ("bytes", 1))
STEP: tuple[Unit, ...] = (("ms", 1e-3), ("us", 1e-6))
DURATION: tuple[Unit, ...] = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything in the plan, with the unit in each name. Scripts read it: its keys and values keep their names."""
    return {
        "settings": _settings_dict(plan),
        "parameters": _parameters_dict(plan),
        "macs_per_image": _macs_dict(plan),
        "memory_per_gpu": {
            "held_bytes": plan.persistent,
            "passing_bytes": {name: round(number) for name, number in plan.peak.items()},
            "total_bytes": round(plan.memory),
            "usable_bytes": round(plan.usable_memory),
            "fits": plan.fits,
            "largest_micro_batch_size": plan.largest_micro_batch(),
        },
        "wire_per_gpu_and_step": {
            "transfers": [_transfer_dict(transfer) for transfer in plan.transfers],
            "inside_node_bytes": sum(transfer.intra_node for transfer in plan.transfers),
            "across_nodes_bytes": sum(transfer.inter_node for transfer in plan.transfers),
        },
        "step": {
            "parts_seconds": plan.seconds,
            "seconds": plan.step_seconds,
            "images_per_second": plan.images_per_second,
            "mfu": plan.mfu,
            "bound_by": "wire" if plan.bound_by == "communication" else plan.bound_by,
        },
    }


def _settings_dict(plan: Plan) -> dict[str, Any]:
    work, cluster, config = plan.work, plan.cluster, plan.config
    return {
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "ranks": cluster.ranks,
        "accelerator": cluster.accelerator.name,
        "router": config.moe.router,
        "precision": config.precision,
        "zero_stage": config.parallel.zero_stage,
        "expert_parallel": config.parallel.expert,
        "tensor_parallel": config.parallel.tensor,
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": work.images,
        "micro_steps": work.micro_steps,
        "capacity": work.capacity,
    }


def _parameters_dict(plan: Plan) -> dict[str, Any]:
    counts, C = plan.accounting, plan.work.capacity
    eq40 = counts.activated_eq40(C)
    return {
        "total_millions": _millions(counts.total),
        "activated_millions": _millions(counts.activated(C)),
        "activated_eq40_millions": None if eq40 is None else _millions(eq40),
        "parts_millions": {part: _millions(number) for part, number in counts.parameters.items()},
    }


def _macs_dict(plan: Plan) -> dict[str, Any]:
    macs = plan.accounting.macs(plan.work.capacity)
    return {
        "linear_giga": sum(macs.values()) / 1e9,
        "attention_products_giga": plan.accounting.attention_macs / 1e9,
        "parts_giga": {part: number / 1e9 for part, number in macs.items()},
    }


def _transfer_dict(transfer: Transfer) -> dict[str, Any]:
    return {
        "name": transfer.name,
        "kind": transfer.kind,
        "ranks": transfer.group_size,
        "calls": transfer.calls,
        "payload_bytes": transfer.payload,
        "inside_node_bytes": transfer.intra_node,
        "across_nodes_bytes": transfer.inter_node,
    }


def _millions(number: float) -> float:
    return round(number / 1e6, 2)


def as_text(plan: Plan, path: str) -> str:
    """The plan as a table; each section is in the unit that suits its total.

    Args:
        path: of the configuration, for the heading.
    """
    sections = [
        _heading(plan, path), _parameters(plan), _arithmetic(plan), _memory(plan), _communication(plan), _step(plan),
        _assumptions(plan),
    ]  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in sections)


def _heading(plan: Plan, path: str) -> list[str]:
    config, cluster, work = plan.config, plan.cluster, plan.work
    lines = [
        f"{path} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.accelerator.name}: {cluster.ranks} ranks, "
        f"{config.precision}, ZeRO {config.parallel.zero_stage}",
        f"{config.train.global_batch_size} images a step: {cluster.ranks} ranks x {work.images} images x "
        f"{work.micro_steps} micro-steps; {work.tokens} tokens of a rank at once",
    ]
    if config.parallel.tensor > 1:
        lines.append(
            f"attention and dense layers are cut over {config.parallel.tensor} ranks "
            f"({cluster.ranks // config.parallel.tensor} such groups)"
        )
    if config.experts is not None:
        groups = cluster.ranks // config.parallel.expert
        lines.append(
            f"moe.router={config.moe.router}: {config.experts.num_experts} experts over {config.parallel.expert} ranks"
            f" ({groups} such groups), C = {work.capacity:.4g} experts per token"
        )
    return lines


def _parameters(plan: Plan) -> list[str]:
    counts, C = plan.accounting, plan.work.capacity
    unit, size = _unit(counts.total, PARAMETERS)
    rows = [_row(part, f"{number / size:.2f}") for part, number in counts.parameters.items() if number]
    rows.append(_row("total", f"{counts.total / size:.2f}", "the frozen position table included"))
    if counts.num_experts:
        note = f"all that a token passes through at C = {C:.4g}"
        rows.append(_row("activated", f"{counts.activated(C) / size:.2f}", note))
        eq40 = counts.activated_eq40(C)
        if eq40 is not None:
            note = "as DiffMoE's tables count: hides the capacity predictor"
            rows.append(_row("activated, eq. 40", f"{eq40 / size:.2f}", note))
    return [f"PARAMETERS, {unit} (exact)", *rows]


def _arithmetic(plan: Plan) -> list[str]:
    macs, products = plan.accounting.macs(plan.work.capacity), plan.accounting.attention_macs
    linear = sum(macs.values())
    unit, size = _unit(linear, MACS)
    times = plan.accounting.training_flops(plan.work.capacity) / (2 * (linear + products))
    return [
        f"ARITHMETIC, {unit} multiply-accumulates of one image forward (exact); a training step does {times:.3g} times "
        "that",
        *(_row(part, f"{number / size:.3f}") for part, number in macs.items() if number),
        _row("linear layers", f"{linear / size:.3f}", "what the papers print"),
        _row("attention products", f"{products / size:.3f}", "queries x keys, weights x values"),
    ]


def _memory(plan: Plan) -> list[str]:
    notes = {
        "weights": "persistent: the model's own, whole but for other ranks' experts",
        "fp32 master weights": "persistent: this rank's ZeRO partition, as the next two",
        "frozen weights": "persistent: the model's own, of what train.freeze names",
        "fp32 frozen weights": "persistent: this rank's part, for checkpoints",
        "gradients": "peak: those made by then, with the buffers that reduce them",
        "activations": "peak: still saved for backward by then, and one layer's backward",
    }
    unit, size = _unit(plan.memory, MEMORY)

    def rows(parts: Mapping[str, float], certainty: str, kind: str) -> Iterable[str]:
        for name, number in parts.items():
            yield _row(name, f"{number / size:.3f}", f"{certainty:8}  {notes.get(name, kind)}")

    accelerator = plan.cluster.accelerator
    usable = f"usable {plan.usable_memory / 2**30:.3f} GiB of an {accelerator.name}"
    return [
        f"MEMORY, {unit} of each GPU",
        *rows(plan.persistent, "exact", "persistent"),
        *rows(plan.peak, "estimate", "peak"),
        _row("total", f"{plan.memory / size:.3f}", f"{'fits' if plan.fits else 'DOES NOT FIT'} in the {usable}"),
        _row("largest micro-batch", f"{plan.largest_micro_batch()}", "images of a rank that fit at once"),
    ]


def _communication(plan: Plan) -> list[str]:
    intra = sum(transfer.intra_node for transfer in plan.transfers)
    inter = sum(transfer.inter_node for transfer in plan.transfers)
    unit, size = _unit(intra + inter, BYTES)
    title = f"COMMUNICATION, {unit} that a GPU sends in a step"
    if not plan.transfers:
        return [title, "  nothing: one rank"]

    def row(name: str, intra_node: float, inter_node: float, note: str = "") -> str:
        return f"  {name:28} {intra_node / size:12.3f} {inter_node / size:13.3f}  {note}".rstrip()

    return [
        title,
        f"  {'':28} {'intra-node':>12} {'inter-node':>13}  collective",
        *(
            row(t.name, t.intra_node, t.inter_node, f"{t.calls} x {t.kind} of {t.group_size} ranks")
            for t in plan.transfers
        ),
        row("total", intra, inter),
    ]


def _step(plan: Plan) -> list[str]:
    unit, size = _unit(plan.step_seconds, STEP)
    speed = f"{plan.images_per_second:.0f} images/s, {plan.images_per_second / plan.cluster.ranks:.0f} of each GPU"
    steps = plan.config.train.steps
    duration = plan.step_seconds * steps
    duration_unit, duration_size = _unit(duration, DURATION, least=1)
    return [
        f"STEP, {unit} (estimate)",
        *(_row(name, f"{seconds / size:.1f}") for name, seconds in plan.seconds.items() if seconds),
        _row("step", f"{plan.step_seconds / size:.1f}", f"bound by {plan.bound_by}; {speed}"),
        _row("model FLOP utilization", f"{plan.mfu:.0%}", "of the peak"),
        _row(f"{steps} steps", f"{duration / duration_size:{'.1f' if duration >= 0.1 else '.2g'}}", duration_unit),
    ]


def _assumptions(plan: Plan) -> list[str]:
    accelerator, kind = plan.cluster.accelerator, matmul_format(plan.config)
    return [
        f"ASSUMPTIONS: {COMPUTE_FRACTION[kind]:.0%} of {accelerator.peak_flops[kind] / 1e12:g} TFLOP/s ({kind});"
        f" {LINK_FRACTION:.0%} of {accelerator.nvlink / 1e9:g} GB/s NVLink and {accelerator.network / 1e9:g}"
        f" GB/s network a GPU;",
        f"  {MEMORY_FRACTION:.0%} of {accelerator.memory_bandwidth / 1e12:g} TB/s memory, {OPTIMIZER_FRACTION:.0%} in"
        f" AdamW; {LAUNCH * 1e6:g} us of the host for each kernel;",
        f"  {CALL_LATENCY * 1e6:g} us for each collective, and {NVLINK_HOP * 1e6:g} or {NETWORK_HOP * 1e6:g} a hop;"
        " ranks fill nodes in order;",
        *(
            ["  train.compile=true is not counted: it keeps and moves less, and hardly spares the host;"]
            if plan.config.train.compile
            else []
        ),
        "  docs/planning.md has the formulas.",
    ]


def dense_models(plan: Plan) -> list[str]:
    """Lines of the dense models that are equal to the mixture of experts in something."""
    C = plan.work.capacity
    total, macs = plan.accounting.activated(C), all_macs(plan.accounting, C)
    lines = [
        "",
        f"DENSE MODELS that equal it, with moe.router=dense and no other moe.* (exact); itself, at C = {C:.4g}: "
        f"{total / 1e6:.2f} M, {macs / 1e9:.2f} GMAC",
    ]
    for model in equal_dense_models(plan.config, C):
        settings = " ".join(f"{name}={'null' if value is None else value}" for name, value in model.settings.items())
        of = f"{model.parameters / 1e6:.2f} M, {model.macs / 1e9:.2f} GMAC"
        lines.append(f"  {model.equal:20}  {settings}: {of}")
    return lines


def dense_models_dict(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "equal": model.equal,
            "settings": model.settings,
            "parameters_millions": _millions(model.parameters),
            "macs_giga": model.macs / 1e9,
        }
        for model in equal_dense_models(plan.config, plan.work.capacity)
    ]


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:28} {value:>12}  {note}".rstrip()


def _unit(number: float, units: tuple[Unit, ...], least: float = 5) -> Unit:
    """The largest unit of which `number` has `least` or more; else the smallest."""
    return next((unit for unit in units if number >= least * unit[1]), units[-1])
