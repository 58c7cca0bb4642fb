"""The files that runs leave, which git keeps: a line of JSON for each run, and the conditions they share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffmoe_dist.errors import UserError
from diffmoe_dist.files import write_atomically
from studies.routing.systems import SEEDS, SYSTEMS

RESULTS = Path(__file__).parent / "results"
LEVELS = 10  # of noise, each as likely in training, that a result has losses of

Result = dict[str, Any]


def write_result(path: Path, result: Result) -> None:
    write_atomically(path, json.dumps(result, allow_nan=False) + "\n")


def read_result(path: Path) -> Result:
    """Empty where there is none."""
    found: Result = json.loads(path.read_text()) if path.is_file() else {}
    return found


def read_results(folder: Path) -> dict[str, Result]:
    """Those of the finished runs, by the name of the run."""
    return {path.stem: read_result(path) for path in sorted(folder.glob("*-seed*.json"))}


def keep_conditions(folder: Path, conditions: Result) -> None:
    """Write what all results of the folder share, or check that it is what they have shared so far.

    Raises:
        UserError: the results that are there were made otherwise.
    """
    path = folder / "conditions.json"
    found = read_result(path)
    changed = [name for name in conditions if found.get(name) != conditions[name]]
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        write_result(path, conditions)
    elif changed:
        raise UserError(
            f"{path}: the results there were made with another {', '.join(changed)}; write to another --results, "
            "or move them away and make them all again"
        )


def by_learning_rate(results: Mapping[str, Result], system: str) -> dict[float, float]:
    """The loss on held-out images of a system's runs with the first seed."""
    rule = SYSTEMS[system].rules[0]
    return {
        result["lr"]: result["measures"][rule]["held_out"]["loss"]
        for result in results.values()
        if result["system"] == system and result["seed"] == SEEDS[0]
    }
