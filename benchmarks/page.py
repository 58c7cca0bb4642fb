"""Writes the tables of results into a page, each between its markers; the text around them stays.

    python -m benchmarks.page docs/performance.md build/bench/*.json

Between `<!-- train_step -->` and `<!-- /train_step -->` come a line that says when and where, and the table of the
results in `train_step*.json`, whose benchmark is `train_step`; several of them are one table.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import moe_layer, scaling, train_step

Rows = list[dict[str, Any]]
TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "train_step": train_step.table,
    "moe_layer": moe_layer.table,
    "scaling": scaling.table,
    "collectives": scaling.collectives_table,
}
_FROM = {"collectives": "scaling"}  # where the results of a table are another benchmark's


def with_tables(page: str, results: list[dict[str, Any]]) -> str:
    """The page with those tables that there are results for.

    Raises:
        ValueError: the page has no place for a result.
    """
    by_benchmark: dict[str, Rows] = defaultdict(list)
    for result in results:
        by_benchmark[result["benchmark"]].append(result)
    placed = set()
    for name, table in TABLES.items():
        benchmark = _FROM.get(name, name)
        markers = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if benchmark not in by_benchmark or not markers.search(page):
            continue
        placed.add(benchmark)
        heads = "\n".join(dict.fromkeys(map(_head, by_benchmark[benchmark])))
        rows = [row for result in by_benchmark[benchmark] for row in result["rows"]]
        written = "\n".join(["", heads, "", *table(rows), "", ""])
        page = markers.sub(lambda match, written=written: match[1] + written + match[2], page)  # type: ignore[misc]
    if missing := by_benchmark.keys() - placed:
        raise ValueError(f"no <!-- {' -->, <!-- '.join(sorted(missing))} --> in the page")
    return page


def _head(result: dict[str, Any]) -> str:
    threads = f"{result['threads']} thread{'s' if result['threads'] != 1 else ''}"
    precision = f", {result['precision']}" if "precision" in result else ""
    what = f"{result['date']}, commit {result['commit']}, {result['machine']}"
    return textwrap.fill(f"{what}, torch {result['torch']}, {threads}{precision}.", 100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("results", type=Path, nargs="+", help="what the benchmarks wrote with --json")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text()) for path in arguments.results]
    arguments.page.write_text(with_tables(arguments.page.read_text(), results))


if __name__ == "__main__":
    main()
