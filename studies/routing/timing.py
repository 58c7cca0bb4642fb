"""Seconds of process time that a training step of each system takes.

The study's own runs share their cores with whatever else runs there, so their wall times mean little. Here the systems
take turns, and of each round the process time of a run with few steps is taken from that of one with more: what is
left is steps. Process time is that of all threads, of which there is one.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from studies.routing.driver import Workplace, training_arguments
from studies.routing.systems import MAIN_SYSTEMS, Run

ROUNDS = 3
FEW, MORE = 5, 30  # steps


def time_steps(place: Workplace) -> dict[str, Any]:
    """Seconds a step of each system, by round."""
    place.pack()
    seconds: dict[str, list[float]] = {system: [] for system in MAIN_SYSTEMS}
    for _ in range(ROUNDS):
        for system in MAIN_SYSTEMS:
            few, more = (_process_seconds(system, steps, place) for steps in (FEW, MORE))
            seconds[system].append(round((more - few) / (MORE - FEW), 5))
    return {"rounds": ROUNDS, "steps": MORE - FEW, "seconds_per_step": seconds}


def _process_seconds(system: str, steps: int, place: Workplace) -> float:
    """Of a whole training command, too short for a validation."""
    before = _children()
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(Run(system, 0, 1e-3), Path(folder) / "run", place)
        command = [sys.executable, "-m", "diffmoe_dist.train", *arguments, f"train.steps={steps}"]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    return _children() - before


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
