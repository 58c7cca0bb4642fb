"""Plan a run before it starts: `python -m diffmoe_dist.plan --config FILE --nodes N --gpus-per-node G`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.config import load_config
from diffmoe_dist.errors import UserError

DESCRIPTION = """\
Say what a training run will need: parameters, arithmetic, memory of each GPU, communication, the time of a step and
what bounds it. It needs no GPU, no data and no other process, and refuses what the training command would refuse.

  python -m diffmoe_dist.plan --config configs/imagenet256/global_pool_l.yaml --nodes 1 --gpus-per-node 8
  python -m diffmoe_dist.plan --config configs/imagenet256/global_pool_l.yaml --nodes 4 --gpus-per-node 8 \\
      parallel.expert=8 precision=bf16 --accelerator H200-141
  python -m diffmoe_dist.plan --config FILE --nodes 1 --gpus-per-node 8 --json
  python -m diffmoe_dist.plan --config FILE --nodes 4 --gpus-per-node 8 --sweep --days 7

How to read it. "exact" numbers are what the engine holds and sends, checked by its tests; "estimate" numbers rest on
the assumptions that the last lines print, and are for comparing settings, not for promises.

- Does it fit? See MEMORY. Optimizer state and average are sharded over the ranks (of the experts: over the ranks that
  hold the same ones), so more ranks hold less of it each. A larger parallel.expert divides the experts' weights. A
  smaller train.micro_batch_size divides the activations, and the token pool with them.
- What bounds it? See STEP. Communication: give each GPU more images; --sweep says whether an expert group
  inside a node (parallel.expert at most --gpus-per-node) is faster. Compute and memory (its bandwidth): more GPUs;
  precision=bf16 makes both faster. Host: the GPU waits for kernels to be started, so more GPUs do not help; give each
  more images, or take fewer GPUs.
- Which settings, and how many machines? --sweep plans every expert- and tensor-parallel size, precision and, where no
  pool depends on it, micro-batch size on 1 to N machines, with recomputation where memory asks for it. It prints the
  command of the best. Settings given here stay as they are.
- What to compare it with? --dense adds the dense models with as many activated parameters, and with as much
  arithmetic, by the ratio of their MLPs and by their width.
- C, the capacity, is the mean number of experts per token; a run logs the measured one as `capacity`. Give it as
  --capacity to plan with it.
"""

# A plan reads no data and writes no run.
_UNUSED = ("run_dir=unused", "data.shards=unused")


def main() -> None:
    arguments = _parse()
    config = load_config(arguments.config, [*_UNUSED, *arguments.overrides])
    if config.experts is None:
        if arguments.capacity is not None:
            raise UserError(f"--capacity {arguments.capacity} has no effect with moe.router=dense; remove it")
        if arguments.dense:
            raise UserError("--dense has no effect with moe.router=dense; give a mixture of experts")

    if arguments.dense and config.train.freeze:
        raise UserError("--dense compares with models that train whole; remove train.freeze")

    from diffmoe_dist.planning import sweep
    from diffmoe_dist.planning.accelerators import ACCELERATORS
    from diffmoe_dist.planning.estimate import make_plan
    from diffmoe_dist.planning.table import as_dict, as_text, dense_models, dense_models_dict
    from diffmoe_dist.planning.workload import Cluster

    if arguments.accelerator not in ACCELERATORS:
        raise UserError(f"--accelerator {arguments.accelerator}: choose from {', '.join(ACCELERATORS)}")
    accelerator = ACCELERATORS[arguments.accelerator]
    if arguments.sweep:
        given = {override.partition("=")[0] for override in arguments.overrides}
        plans = list(sweep.sweep(config, arguments.nodes, arguments.gpus_per_node, accelerator, given))
        best = sweep.choose(plans, config, arguments.days)
        as_json = json.dumps(sweep.as_dict(plans, best, config), indent=2)
        as_table = sweep.as_text(plans, best, config, [arguments.config, *arguments.overrides])
        sys.stdout.write((as_json if arguments.json else as_table) + "\n")
        return
    cluster = Cluster(arguments.nodes, arguments.gpus_per_node, accelerator)
    plan = make_plan(config, cluster, arguments.capacity)
    if arguments.json:
        dense_entries = {"dense_models": dense_models_dict(plan)} if arguments.dense else {}
        sys.stdout.write(json.dumps({**as_dict(plan), **dense_entries}, indent=2) + "\n")
    else:
        dense_lines = dense_models(plan) if arguments.dense else []
        sys.stdout.write("\n".join([as_text(plan, arguments.config), *dense_lines]) + "\n")


def _parse() -> argparse.Namespace:
    parser = CommandParser(prog="diffmoe_dist.plan", description=DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML settings; configs/ has examples")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--nodes", required=True, type=int, metavar="N", help="machines")
    parser.add_argument("--gpus-per-node", required=True, type=int, metavar="G", help="GPUs, each a rank, of a machine")
    parser.add_argument("--capacity", type=float, metavar="C", help="a measured capacity; default: the settings'")
    parser.add_argument(
        "--accelerator", default="H100-80", metavar="NAME", help="default H100-80; the choices are below"
    )
    parser.add_argument("--sweep", action="store_true", help="compare every way to run it on 1 to N of these machines")
    parser.add_argument("--days", type=float, metavar="D", help="with --sweep: the fewest GPU-hours within D days")
    parser.add_argument("--dense", action="store_true", help="also the dense models that equal it; see above")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object, in bytes and seconds")
    parser.epilog = "accelerators: A100-80 A800-80 H100-80 H800-80 H200-141 (data sheet numbers, SXM boards)"
    arguments = parser.parse_intermixed_args()
    for name in ("nodes", "gpus_per_node"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    if arguments.capacity is not None and not 0 <= arguments.capacity < float("inf"):
        raise UserError(f"--capacity {arguments.capacity}: must be 0 or more, such as 0.95")
    if arguments.capacity is not None and arguments.sweep:
        raise UserError(f"--capacity {arguments.capacity} has no effect with --sweep; remove one of them")
    if arguments.dense and arguments.sweep:
        raise UserError("--dense has no effect with --sweep; remove one of them")
    if arguments.days is not None and not arguments.sweep:
        raise UserError(f"--days {arguments.days} has no effect without --sweep; add it")
    if arguments.days is not None and not 0 < arguments.days < float("inf"):
        raise UserError(f"--days {arguments.days}: must be more than 0, such as 7")
    return arguments


def run() -> NoReturn:
    """`diffmoe-plan`."""
    run_command(main)


if __name__ == "__main__":
    run()
