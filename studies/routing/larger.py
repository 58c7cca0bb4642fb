"""Dense and DiffMoE at sixteen times the size, on one GPU: does the learning rate decide who is ahead there too?

All runs train at once. A run that is not at its end when the minutes are over is stopped and leaves its curve; of the
others 5,000 samples are drawn as in the study itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from diffmoe_dist.engine.run_log import read_metrics
from diffmoe_dist.logs import logger
from studies.routing import classifier as network
from studies.routing import measure
from studies.routing.driver import (
    SAMPLER_STEPS,
    SAMPLES,
    Workplace,
    current_commit,
    curve,
    training_arguments,
)
from studies.routing.results import Result, keep_conditions, write_result
from studies.routing.systems import Run

LARGER_CONFIG = Path(__file__).parent / "larger.yaml"
LARGER_SYSTEMS = ("dense", "global_pool")
LARGER_RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # the first is that of both papers
_SAMPLER = ("--steps", str(SAMPLER_STEPS), "--batch-size", str(measure.BLOCK))
_SECONDS_BETWEEN_LOOKS = 0.5

Commands = Mapping[Run, Sequence[str]]


def larger_runs() -> list[Run]:
    return [Run(system, 0, lr) for lr in LARGER_RATES for system in LARGER_SYSTEMS]


def train_and_sample(place: Workplace, results: Path, minutes: float) -> None:
    """Make the results of all runs.

    Args:
        minutes: after which no run trains on.
    """
    config = OmegaConf.load(LARGER_CONFIG)
    shared = {"config": OmegaConf.to_container(config), "samples": SAMPLES, "sampler": list(_SAMPLER)}
    keep_conditions(results, shared)
    place.pack()
    training = {
        run: ["diffmoe_dist.train", *training_arguments(run, place.run_dir(run), place, LARGER_CONFIG)]
        for run in larger_runs()
    }
    processes = _start(training, place, "train")
    place.look_at_training_images()  # beside them, on the CPU
    _wait(processes, time.monotonic() + 60 * minutes)
    finished = [run for run, process in processes.items() if process.returncode == 0]
    sampling = {
        run: ["diffmoe_dist.sample", "--checkpoint", str(place.run_dir(run)), "--out", str(place.samples(run, "own")),
              "--num", str(SAMPLES), "--device", config.device, *_SAMPLER]
        for run in finished
    }  # fmt: skip
    _wait(_start(sampling, place, "sample"), None)
    for run in larger_runs():
        write_result(results / f"{run.name}.json", describe(run, place, with_samples=run in finished))


def _start(commands: Commands, place: Workplace, kind: str) -> dict[Run, subprocess.Popen[bytes]]:
    logs = place.folder / "logs"
    logs.mkdir(exist_ok=True)
    processes = {}
    for run, command in commands.items():
        with (logs / f"{run.name}-{kind}.log").open("ab") as log:
            processes[run] = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
    return processes


def _wait(processes: Mapping[Run, subprocess.Popen[bytes]], until: float | None) -> None:
    """Until all have ended, or are ended at that time of the monotonic clock."""
    while any(process.poll() is None for process in processes.values()):
        if until is not None and time.monotonic() > until:
            for process in processes.values():
                process.kill()
            until = None
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    for run, process in processes.items():
        if process.returncode:
            logger.error("%s ended with exit code %d", run.name, process.returncode)


def describe(run: Run, place: Workplace, with_samples: bool) -> Result:
    lines = read_metrics(place.run_dir(run) / "metrics.jsonl")
    samples = None
    if with_samples:
        samples = measure.sampled(place.samples(run, "own"), network.load_classifier(), place.statistics())
    return {
        "name": run.name,
        "system": run.system,
        "seed": run.seed,
        "lr": run.lr,
        "settings": run.overrides,
        "steps": lines[-1]["step"],
        "commit": current_commit(),
        "curve": curve(lines),
        "samples": samples,
    }
