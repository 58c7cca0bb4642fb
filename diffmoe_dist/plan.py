"""Plan a run before it starts: `python -m diffmoe_dist.plan --config FILE --nodes N --gpus-per-node G`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.config import load_config
from diffmoe_dist.errors import UserError

if TYPE_CHECKING:
    from diffmoe_dist.planning.planning import Plan, Transfer

DESCRIPTION = """\
Say what a training run will need: parameters, arithmetic, memory of each GPU, bytes on the wire, the time of a step and
what bounds it. It needs no GPU, no data and no other process, and refuses what the training command would refuse.

  python -m diffmoe_dist.plan --config configs/imagenet256/global_pool_l.yaml --nodes 1 --gpus-per-node 8
  python -m diffmoe_dist.plan --config configs/imagenet256/global_pool_l.yaml --nodes 4 --gpus-per-node 8 \\
      parallel.expert=8 precision=bf16 --accelerator H200-141
  python -m diffmoe_dist.plan --config FILE --nodes 1 --gpus-per-node 8 --json

How to read it. "exact" numbers are what the engine holds and sends, checked by its tests; "estimate" numbers rest on
the assumptions that the last lines print, and are for comparing settings, not for promises.

- Does it fit? See MEMORY. Optimizer state and average are cut over the ranks (experts over those that hold the same
  ones): more ranks, less of it. A larger parallel.expert divides the experts' weights. A smaller
  train.micro_batch_size divides the activations, and the token pool with them.
- What bounds it? See STEP. Wire: keep an expert group inside a node (parallel.expert at most --gpus-per-node), or give
  each GPU more images. Compute: more GPUs. precision=bf16 makes arithmetic several times faster.
- C, the capacity, is the mean number of experts that a token visits; a run logs the measured one as `capacity`. Give it
  as --capacity to plan with it.
"""

# A plan reads no data and writes no run.
_UNUSED = ("run_dir=unused", "data.shards=unused")


def main() -> None:
    parser = CommandParser(prog="diffmoe_dist.plan", description=DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML settings; configs/ has examples")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--nodes", required=True, type=int, metavar="N", help="machines")
    parser.add_argument("--gpus-per-node", required=True, type=int, metavar="G", help="GPUs, each a rank, of a machine")
    parser.add_argument("--capacity", type=float, metavar="C", help="a measured capacity; default: the settings'")
    parser.add_argument(
        "--accelerator", default="H100-80", metavar="NAME", help="default H100-80; the choices are below"
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object, in bytes and seconds")
    parser.epilog = "accelerators: A100-80 A800-80 H100-80 H800-80 H200-141 (data sheet numbers, SXM boards)"
    arguments = parser.parse_intermixed_args()
    for name in ("nodes", "gpus_per_node"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    if arguments.capacity is not None and not 0 <= arguments.capacity < float("inf"):
        raise UserError(f"--capacity {arguments.capacity}: must be 0 or more, such as 0.95")
    config = load_config(arguments.config, [*_UNUSED, *arguments.overrides])
    if arguments.capacity is not None and config.experts is None:
        raise UserError(f"--capacity {arguments.capacity} has no effect with moe.router=dense; remove it")

    from diffmoe_dist.planning.accelerators import ACCELERATORS
    from diffmoe_dist.planning.planning import Cluster, make_plan

    if arguments.accelerator not in ACCELERATORS:
        raise UserError(f"--accelerator {arguments.accelerator}: choose from {', '.join(ACCELERATORS)}")
    cluster = Cluster(arguments.nodes, arguments.gpus_per_node, ACCELERATORS[arguments.accelerator])
    plan = make_plan(config, cluster, arguments.capacity)
    text = json.dumps(as_dict(plan), indent=2) if arguments.json else as_text(plan, arguments.config)
    sys.stdout.write(text + "\n")


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything in the plan, with the unit in each name."""
    from diffmoe_dist.planning import planning

    counts, work, cluster, config = plan.accounting, plan.work, plan.cluster, plan.config
    eq40 = counts.activated_eq40(work.capacity)
    return {
        "settings": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "ranks": cluster.ranks,
            "accelerator": cluster.accelerator.name,
            "router": config.moe.router,
            "precision": config.precision,
            "zero_stage": config.parallel.zero_stage,
            "expert_parallel": config.parallel.expert,
            "global_batch_size": config.train.global_batch_size,
            "micro_batch_size": work.images,
            "micro_steps": work.micro_steps,
            "capacity": work.capacity,
        },
        "parameters": {
            "total_millions": _millions(counts.total),
            "activated_millions": _millions(counts.activated(work.capacity)),
            "activated_eq40_millions": None if eq40 is None else _millions(eq40),
            "parts_millions": {part: _millions(number) for part, number in counts.parameters.items()},
        },
        "macs_per_image": {
            "linear_giga": sum(counts.macs(work.capacity).values()) / 1e9,
            "attention_products_giga": counts.attention_macs / 1e9,
            "parts_giga": {part: number / 1e9 for part, number in counts.macs(work.capacity).items()},
        },
        "memory_per_gpu": {
            "held_bytes": plan.held,
            "passing_bytes": {name: round(number) for name, number in plan.passing.items()},
            "total_bytes": round(plan.memory),
            "usable_bytes": round(planning.USABLE_MEMORY * cluster.accelerator.memory_bytes),
            "fits": plan.fits,
        },
        "wire_per_gpu_and_step": {
            "transfers": [_transfer_dict(transfer) for transfer in plan.transfers],
            "inside_node_bytes": sum(transfer.inside for transfer in plan.transfers),
            "across_nodes_bytes": sum(transfer.across for transfer in plan.transfers),
        },
        "step": {
            "parts_seconds": plan.seconds,
            "seconds": plan.step_seconds,
            "images_per_second": plan.images_per_second,
            "mfu": plan.mfu,
            "bound_by": plan.bound_by,
        },
    }


def _transfer_dict(transfer: Transfer) -> dict[str, Any]:
    return {
        "name": transfer.name,
        "kind": transfer.kind,
        "ranks": transfer.group,
        "calls": transfer.calls,
        "payload_bytes": transfer.payload,
        "inside_node_bytes": transfer.inside,
        "across_nodes_bytes": transfer.across,
    }


def _millions(number: float) -> float:
    return round(number / 1e6, 2)


def as_text(plan: Plan, path: str) -> str:
    """The plan as a table to read."""
    sections = [_heading(plan, path), _parameters(plan), _arithmetic(plan), _memory(plan), _wire(plan), _step(plan)]
    return "\n\n".join("\n".join(lines) for lines in [*sections, _assumptions(plan)])


def _heading(plan: Plan, path: str) -> list[str]:
    config, cluster, work = plan.config, plan.cluster, plan.work
    lines = [
        f"{path} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.accelerator.name}: {cluster.ranks} ranks, "
        f"{config.precision}, ZeRO {config.parallel.zero_stage}",
        f"{config.train.global_batch_size} images a step: {cluster.ranks} ranks x {work.images} images x "
        f"{work.micro_steps} micro-steps; {work.tokens} tokens of a rank at once",
    ]
    if config.experts is not None:
        groups = cluster.ranks // config.parallel.expert
        lines.append(
            f"moe.router={config.moe.router}: {config.experts.num_experts} experts over {config.parallel.expert} ranks"
            f" ({groups} such groups), C = {work.capacity:.4g} visits a token"
        )
    return lines


def _parameters(plan: Plan) -> list[str]:
    counts, C = plan.accounting, plan.work.capacity
    rows = [(part, number / 1e6, "") for part, number in counts.parameters.items() if number]
    rows.append(("total", counts.total / 1e6, "the frozen position table included"))
    if counts.num_experts:
        rows.append(("activated", counts.activated(C) / 1e6, f"all that a token passes through at C = {C:.4g}"))
        eq40 = counts.activated_eq40(C)
        if eq40 is not None:
            rows.append(("activated, eq. 40", eq40 / 1e6, "as DiffMoE's tables count: hides the capacity predictor"))
    return ["PARAMETERS, millions (exact)", *(_row(name, f"{number:.2f}", note) for name, number, note in rows)]


def _arithmetic(plan: Plan) -> list[str]:
    macs = plan.accounting.macs(plan.work.capacity)
    rows = [(part, number / 1e9, "") for part, number in macs.items() if number]
    rows.append(("linear layers", sum(macs.values()) / 1e9, "what the papers print"))
    rows.append(("attention products", plan.accounting.attention_macs / 1e9, "queries x keys, weights x values"))
    title = "ARITHMETIC, 10^9 multiply-accumulates of one image forward (exact); a training step does 3 times that"
    return [title, *(_row(name, f"{number:.3f}", note) for name, number, note in rows)]


def _memory(plan: Plan) -> list[str]:
    from diffmoe_dist.planning.planning import USABLE_MEMORY

    notes = {
        "weights": "the model's own, whole but for other ranks' experts",
        "fp32 master weights": "this rank's ZeRO partition, as the next two",
        "gradients": "at their peak, with the buffers that reduce them",
        "activations": "saved for backward, and one layer's backward",
    }
    rows = [_row(name, _gib(number), f"exact     {notes.get(name, '')}") for name, number in plan.held.items()]
    rows += [_row(name, _gib(number), f"estimate  {notes[name]}") for name, number in plan.passing.items()]
    accelerator = plan.cluster.accelerator
    usable = _gib(USABLE_MEMORY * accelerator.memory_bytes)
    verdict = f"{'fits' if plan.fits else 'DOES NOT FIT'} in the usable {usable} of an {accelerator.name}"
    return ["MEMORY, GiB of each GPU", *rows, _row("total", _gib(plan.memory), verdict)]


def _wire(plan: Plan) -> list[str]:
    title = "WIRE, MB that a GPU sends in a step"
    if not plan.transfers:
        return [title, "  nothing: one rank"]
    header = f"  {'':28} {'inside node':>12} {'across nodes':>13}  collective"
    rows = [_wire_row(t.name, t.inside, t.across, f"{t.calls} x {t.kind} of {t.group} ranks") for t in plan.transfers]
    inside, across = sum(t.inside for t in plan.transfers), sum(t.across for t in plan.transfers)
    return [title, header, *rows, _wire_row("total", inside, across, "")]


def _wire_row(name: str, inside: float, across: float, note: str) -> str:
    return f"  {name:28} {inside / 1e6:12.3f} {across / 1e6:13.3f}  {note}".rstrip()


def _step(plan: Plan) -> list[str]:
    rows = [_row(name, f"{seconds * 1e3:.1f}", "") for name, seconds in plan.seconds.items() if seconds]
    speed = f"{plan.images_per_second:.0f} images/s, {plan.images_per_second / plan.cluster.ranks:.0f} of each GPU"
    days = plan.step_seconds * plan.config.train.steps / 86400
    rows.append(_row("step", f"{plan.step_seconds * 1e3:.1f}", f"bound by {plan.bound_by}; {speed}"))
    rows.append(_row("model FLOP utilisation", f"{plan.mfu:.0%}", "of the peak"))
    rows.append(_row(f"{plan.config.train.steps} steps", f"{days:.1f}", "days"))
    return ["STEP, ms (estimate)", *rows]


def _assumptions(plan: Plan) -> list[str]:
    from diffmoe_dist.planning import planning
    from diffmoe_dist.planning.accelerators import matmul_format

    accelerator, kind = plan.cluster.accelerator, matmul_format(plan.config)
    peak = accelerator.peak_flops[kind] / 1e12
    return [
        f"ASSUMPTIONS: {planning.COMPUTE_FRACTION[kind]:.0%} of {peak:g} TFLOP/s ({kind});"
        f" {planning.WIRE_FRACTION:.0%} of {accelerator.nvlink / 1e9:g} GB/s NVLink and {accelerator.network / 1e9:g}"
        f" GB/s network a GPU;",
        f"  {planning.MEMORY_FRACTION:.0%} of {accelerator.memory_bandwidth / 1e12:g} TB/s memory;"
        f" {planning.CALL_LATENCY * 1e6:g} us for each collective; ranks fill nodes in order. docs/planning.md has the"
        " formulas.",
    ]


def _row(name: str, value: str, note: str) -> str:
    return f"  {name:28} {value:>12}  {note}".rstrip()


def _gib(number: float) -> str:
    return f"{number / 2**30:.3f}"


def run() -> NoReturn:
    """`diffmoe-plan`."""
    run_command(main)


if __name__ == "__main__":
    run()
