"""Writes what the planner says into the pages that show it; the text around it stays.

    python -m benchmarks.planned            # after a change of the planner's constants or formulas

Tables stand between `<!-- NAME -->` and `<!-- /NAME -->`; README shows lines of one plan; the training scripts of
slurm/ have as many nodes as the planner chooses. `tests/test_benchmarks.py` fails where a page shows what the planner
no longer says.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

from diffmoe_dist.config import load_config
from diffmoe_dist.planning import table
from diffmoe_dist.planning.accelerators import ACCELERATORS
from diffmoe_dist.planning.estimate import Plan, make_plan
from diffmoe_dist.planning.sweep import by_speed, choose, days, gpu_hours, sweep
from diffmoe_dist.planning.workload import Cluster

H100 = ACCELERATORS["H100-80"]
UNUSED = ("run_dir=unused", "data.shards=unused")

SIZES = ("s", "b", "l", "xl")
SCRIPTS = {f"slurm/train_{size}.sh": f"configs/imagenet256/global_pool_{size}.yaml" for size in SIZES}
DAYS = 1  # of a job's time limit: the scripts take the fewest GPU-hours that end in it


def plans_on(path: str, nodes: int, *overrides: str) -> list[Plan]:
    """Every plan that fits on up to so many nodes of eight H100s, in the configuration's precision."""
    config = load_config(path, [*UNUSED, *overrides])
    given = {"precision", *(override.partition("=")[0] for override in overrides)}
    return list(sweep(config, nodes, 8, H100, given))


def sizes() -> list[str]:
    """Of each size the fastest plan on 1, 2 and 4 nodes; in bold the one of its script."""
    lines = [
        "| size | nodes | `parallel.expert` | GiB | images/s | MFU | days | GPU-hours | bound by |",
        f"|{'---|' * 9}",
    ]
    for path in SCRIPTS.values():
        config, plans = load_config(path, UNUSED), plans_on(path, 4)
        chosen = choose(plans, config, DAYS)
        for nodes in (1, 2, 4):
            plan = by_speed([plan for plan in plans if plan.cluster.nodes == nodes])[0]
            bold = "**" if plan is chosen else ""
            cells = [config.model.size, nodes, plan.config.parallel.expert, f"{plan.memory / 2**30:.1f}"]
            cells += [f"{plan.images_per_second:.0f}", f"{plan.mfu:.0%}", f"{days(plan):.2f}", f"{gpu_hours(plan):.0f}"]
            lines.append(f"| {' | '.join(f'{bold}{cell}{bold}' for cell in [*cells, plan.bound_by])} |")
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {"sizes": sizes}
PAGES = ("README.md", "docs/cluster.md")


def with_nodes(script: str, path: str) -> str:
    """A script of slurm/ with the number of nodes that the planner chooses for a configuration."""
    config = load_config(path, UNUSED)
    nodes = choose(plans_on(path, 4), config, DAYS).cluster.nodes
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
