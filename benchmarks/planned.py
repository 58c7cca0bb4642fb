"""Writes what the planner says into the pages that show it; the text around it stays.

    python -m benchmarks.planned            # after a change of the planner's constants or formulas

Tables stand between `<!-- NAME -->` and `<!-- /NAME -->`; README shows lines of one plan.
`tests/test_benchmarks.py` fails where a page shows what the planner no longer says.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

from diffmoe_dist.config import load_config
from diffmoe_dist.planning import table
from diffmoe_dist.planning.accelerators import ACCELERATORS
from diffmoe_dist.planning.estimate import make_plan
from diffmoe_dist.planning.workload import Cluster

H100 = ACCELERATORS["H100-80"]
UNUSED = ("run_dir=unused", "data.shards=unused")

TABLES: dict[str, Callable[[], list[str]]] = {}
PAGES = ("README.md",)


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


if __name__ == "__main__":
    main()
