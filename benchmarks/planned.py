"""Writes what the planner says into the pages that show it; the text around it stays.

    python -m benchmarks.planned            # after a change of the planner's constants or formulas

Tables stand between `<!-- NAME -->` and `<!-- /NAME -->`; README and docs/imagenet.md show lines of one plan each;
the training scripts of slurm/ have as many nodes as the planner chooses. `tests/test_benchmarks.py` fails where a page
shows what the planner no longer says.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from diffmoe_dist.config import Config, load_config
from diffmoe_dist.planning import table
from diffmoe_dist.planning.accelerators import ACCELERATORS
from diffmoe_dist.planning.estimate import Plan, make_plan
from diffmoe_dist.planning.step_time import HOST, transfer_seconds
from diffmoe_dist.planning.sweep import by_speed, choose, days, gpu_hours, plans_on, sweep
from diffmoe_dist.planning.workload import Cluster

H100 = ACCELERATORS["H100-80"]
UNUSED = ("run_dir=unused", "data.shards=unused")

SIZES = ("s", "b", "l", "xl")
SCRIPTS = {f"slurm/train_{size}.sh": f"configs/imagenet256/global_pool_{size}.yaml" for size in SIZES}
DAYS = 2  # the scripts take the fewest GPU-hours that end in it: two jobs of 24 hours


def plans_up_to(nodes: int, path: str) -> list[Plan]:
    """Every plan that fits on up to so many nodes of eight H100s, in the configuration's precision."""
    return list(sweep(load_config(path, UNUSED), nodes, 8, H100, {"precision"}))


def sizes() -> list[str]:
    """Of each size the fastest plan on 1, 2 and 4 nodes; in bold the one of its script."""
    lines = [
        "| size | nodes | `parallel.expert` | GiB | images/s | MFU | days | GPU-hours | bound by |",
        f"|{'---|' * 9}",
    ]
    for path in SCRIPTS.values():
        config, plans = load_config(path, UNUSED), plans_up_to(4, path)
        chosen = choose(plans, config, DAYS)
        for nodes in (1, 2, 4):
            plan = by_speed([plan for plan in plans if plan.cluster.nodes == nodes])[0]
            bold = "**" if plan is chosen else ""
            cells = [config.model.size, nodes, plan.config.parallel.expert, f"{plan.memory / 2**30:.1f}"]
            cells += [f"{plan.images_per_second:.0f}", f"{plan.mfu:.0%}", f"{days(plan):.2f}", f"{gpu_hours(plan):.0f}"]
            lines.append(f"| {' | '.join(f'{bold}{cell}{bold}' for cell in [*cells, plan.bound_by])} |")
    return lines


XL = SCRIPTS["slurm/train_xl.sh"]
OF_16B = ("model.size=null", "model.depth=28", "model.hidden_size=2688", "model.num_heads=24", "precision=bf16")
MODELS = {"XL-E16": (), "16 B": OF_16B}
NODES = (1, 2, 4, 8, 16, 32, 64, 128)


@cache
def loaded(*overrides: str) -> Config:
    return load_config(XL, [*UNUSED, *overrides])


def config_of(overrides: Sequence[str], images: int) -> Config:
    config = loaded(*overrides)
    return replace(config, train=replace(config.train, global_batch_size=images))


def best(config: Config, nodes: int, expert: int = 0) -> Plan | None:
    """The fastest plan on so many nodes, in the configuration's precision. No layers are cut: it is never faster here.

    Args:
        expert: with so many GPUs in an expert-parallel group; 0: any number.
    """
    given = {"precision", "parallel.tensor"}
    if expert:
        given.add("parallel.expert")
        config = replace(config, parallel=replace(config.parallel, expert=expert))
    return next(iter(by_speed(list(plans_on(config, Cluster(nodes, 8, H100), given)))), None)


def scaling_of(images: Callable[[int], int]) -> list[str]:
    """Of both models, the fastest plan of each number of GPUs."""
    lines = [
        "| model | GPUs | images a step | `parallel.expert` | `train.recompute` | GiB | step (ms) | images/s "
        "| efficiency | MFU | bound by |",
        f"|{'---|' * 11}",
    ]
    for model, overrides in MODELS.items():
        first: Plan | None = None
        for nodes in NODES:
            config = config_of(overrides, images(8 * nodes))
            plan = best(config, nodes)
            if plan is None:
                lines.append(f"| {model} | {8 * nodes} | {config.train.global_batch_size} | none fits |{' |' * 7}")
                continue
            first = first or plan
            efficiency = plan.images_per_second / plan.cluster.ranks / (first.images_per_second / first.cluster.ranks)
            chosen = plan.config
            cells = [model, plan.cluster.ranks, chosen.train.global_batch_size, chosen.parallel.expert]
            cells += [chosen.train.recompute, f"{plan.memory / 2**30:.1f}", f"{plan.step_seconds * 1e3:.0f}"]
            cells += [f"{plan.images_per_second:.0f}", f"{efficiency:.2f}", f"{plan.mfu:.0%}", plan.bound_by]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def strong() -> list[str]:
    return scaling_of(lambda gpus: 4096)


def weak() -> list[str]:
    return scaling_of(lambda gpus: 32 * gpus)


def inside_or_across() -> list[str]:
    """Milliseconds of a step with the experts over 8 GPUs of a node and over 16 of two, by images of a GPU."""
    each = (4, 8, 16, 32)
    heads = " | ".join(f"{images} images, 8 | {images} images, 16" for images in each)
    lines = [f"| model | GPUs | {heads} |", f"|{'---|' * (2 + 2 * len(each))}"]
    for model, overrides in {**MODELS, "XL-E16, bf16": ("precision=bf16",)}.items():
        for nodes in (2, 4, 16, 64):
            cells = []
            for images in each:
                config = config_of(overrides, 8 * nodes * images)
                plans = [best(config, nodes, expert) for expert in (8, 16)]
                times = [plan.step_seconds if plan else math.inf for plan in plans]
                marks = ["**" if time == min(times) else "" for time in times]
                cells += [f"{mark}{time * 1e3:.0f}{mark}" for time, mark in zip(times, marks, strict=True)]
            lines.append(f"| {model} | {8 * nodes} | {' | '.join(cells)} |")
    return lines


def pool_seconds(plan: Plan) -> float:
    """Of a step, what the routing of all layers exchanges beside the tokens."""
    names = ("scores", "scores and cutoffs", "scores of the groups", "row counts")
    return sum(transfer_seconds(transfer, H100) for transfer in plan.transfers if transfer.name in names)


def pools() -> list[str]:
    """XL-E16, experts over 16 GPUs, 32 images a GPU: what scores cost by how they travel and how large a pool is."""
    ways = {
        "a pool of each group": ("moe.pool=expert_parallel",),
        "the whole batch, to the owners": ("parallel.score_exchange=all_to_all",),
        "the whole batch, two levels": ("parallel.score_exchange=two_level",),
    }
    lines = [
        "| GPUs | " + " | ".join(f"{way}: MB sent | MB of the busiest | ms" for way in ways) + " |",
        f"|{'---|' * (1 + 3 * len(ways))}",
    ]
    for nodes in NODES[1:]:
        cells = []
        for overrides in ways.values():
            plan = make_plan(config_of(["parallel.expert=16", *overrides], 8 * nodes * 32), Cluster(nodes, 8, H100))
            scores = [transfer for transfer in plan.transfers if transfer.name.startswith("scores")]
            sent, busiest = (sum(t.sent * factor(t) for t in scores) for factor in (lambda t: 1, lambda t: t.busiest))
            cells += [f"{sent / 1e6:.0f}", f"{busiest / 1e6:.0f}", f"{pool_seconds(plan) * 1e3:.1f}"]
        lines.append(f"| {8 * nodes} | {' | '.join(cells)} |")
    return lines


def parts() -> list[str]:
    """Where the milliseconds of a step go: XL-E16, 4,096 images."""
    names = ("arithmetic", "activations", "token exchange", "other routing and report", "gradients beyond backward",
             "parameter gather", "optimizer", HOST)  # fmt: skip
    lines = [f"| GPUs | {' | '.join(names)} | step |", f"|{'---|' * (2 + len(names))}"]
    for nodes in NODES[3:]:
        plan = best(config_of((), 4096), nodes)
        assert plan is not None
        cells = [f"{plan.seconds.get(name, 0.0) * 1e3:.1f}" for name in names]
        lines.append(f"| {8 * nodes} | {' | '.join(cells)} | {plan.step_seconds * 1e3:.1f} |")
    return lines


def week() -> list[str]:
    """XL-E16 with 4,096 images a step, 700K steps: days and GPU-hours by nodes; in bold the cheapest within a week."""
    config = config_of((), 4096)
    plans = [plan for nodes in NODES for plan in [best(config, nodes)] if plan is not None]
    chosen = choose(plans, config, 7)
    lines = ["| nodes | GPUs | `parallel.expert` | `train.recompute` | days | GPU-hours |", f"|{'---|' * 6}"]
    for plan in plans:
        bold = "**" if plan is chosen else ""
        cells = [str(plan.cluster.nodes), str(plan.cluster.ranks), str(plan.config.parallel.expert)]
        cells += [plan.config.train.recompute]
        cells += [f"{days(plan):.1f}", f"{gpu_hours(plan):.0f}"]
        lines.append(f"| {' | '.join(f'{bold}{cell}{bold}' for cell in cells)} |")
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "sizes": sizes, "strong": strong, "weak": weak, "inside or across": inside_or_across, "pools": pools,
    "parts": parts, "week": week,
}  # fmt: skip
PAGES = ("README.md", "docs/cluster.md", "docs/imagenet.md", "docs/scaling.md")


def with_nodes(script: str, path: str) -> str:
    """A script of slurm/ with the number of nodes that the planner chooses for a configuration."""
    config = load_config(path, UNUSED)
    nodes = choose(plans_up_to(4, path), config, DAYS).cluster.nodes
    return re.sub(r"(?m)^#SBATCH --nodes=\d+", f"#SBATCH --nodes={nodes}", script)


def with_plans(page: str) -> str:
    """The page with what the planner says now."""
    for name, rows in TABLES.items():
        markers = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if markers.search(page):
            written = "\n".join(["", *rows(), "", ""])
            page = markers.sub(lambda match, written=written: match[1] + written + match[2], page)  # type: ignore[misc]
    return re.sub(
        r"```sh\npython -m diffmoe_dist\.plan (.*?)\n```.*?```text\n(.*?)```", _with_lines, page, flags=re.DOTALL
    )


def _with_lines(shown: re.Match[str]) -> str:
    """A command and some lines of the plan that it prints, which are known by how they begin."""
    words = shown[1].split()
    of = dict(itertools.pairwise(words))
    cluster = Cluster(int(of["--nodes"]), int(of["--gpus-per-node"]), H100)
    config = load_config(of["--config"], [*UNUSED, *(word for word in words if "=" in word)])
    printed, lines = table.as_text(make_plan(config, cluster), of["--config"]).splitlines(), []
    for line in shown[2].splitlines():
        if line.strip() in ("", "..."):
            lines.append(line)
            continue
        places = [place for place, new in enumerate(printed) if _name(new) == _name(line)]
        if places:  # else it was a part of the step that takes no time now
            lines.append(printed[places[0]])
            printed = printed[places[0] + 1 :]
    start = shown.start(2) - shown.start()
    return shown[0][:start] + "\n".join([*lines, "```"])


def _name(line: str) -> str:
    """What a line of a plan is about."""
    return re.split(r"  +[\d.]+%?(?: |$)|,|:", line)[0]


def main() -> None:
    for name in PAGES:
        path = Path(name)
        path.write_text(with_plans(path.read_text()))
    for name, config in SCRIPTS.items():
        path = Path(name)
        path.write_text(with_nodes(path.read_text(), config))


if __name__ == "__main__":
    main()
