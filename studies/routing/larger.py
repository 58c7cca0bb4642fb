"""Dense and DiffMoE at 17 times the size, on one GPU: does the learning rate change who is ahead there too?

All runs train at once. One that is not at its end when the minutes are over is stopped and leaves its curve, as does
one that fails; of the others 5,000 samples are drawn as in the study itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf

from diffmoe_dist.engine.run_log import read_metrics
from diffmoe_dist.logs import logger
from studies.routing import classifier as network
from studies.routing import measure
from studies.routing.driver import SAMPLER_STEPS, SAMPLES, Workplace, current_commit, curve, training_arguments
from studies.routing.results import keep_conditions, write_result
from studies.routing.systems import OWN, Run, larger_runs

LARGER_CONFIG = Path(__file__).parent / "larger.yaml"
_SAMPLER = ("--steps", str(SAMPLER_STEPS), "--batch-size", str(measure.BLOCK))
_SECONDS_BETWEEN_LOOKS = 0.5


def train_and_sample(place: Workplace, results: Path, minutes: float) -> None:
    """Write the results of all runs.

    Args:
        minutes: after which no run trains on.
    """
    config, commit = OmegaConf.load(LARGER_CONFIG), current_commit()
    shared = {"config": OmegaConf.to_container(config), "samples": SAMPLES, "sampler": list(_SAMPLER)}
    keep_conditions(results, shared)
    place.folder.mkdir(parents=True, exist_ok=True)
    place.pack()
    place.look_at_training_images()
    training = {
        run: ["diffmoe_dist.train", *training_arguments(run, place.run_dir(run), place, LARGER_CONFIG)]
        for run in larger_runs()
    }
    finished = _run_all(training, place, "train", 60 * minutes)
    sampling = {
        run: ["diffmoe_dist.sample", "--checkpoint", str(place.run_dir(run)), "--out", str(place.samples(run, OWN)),
              "--num", str(SAMPLES), "--device", config.device, *_SAMPLER]
        for run in finished
    }  # fmt: skip
    sampled = _run_all(sampling, place, "sample")
    for run in training:
        lines = read_metrics(place.run_dir(run) / "metrics.jsonl")
        if lines:
            result = {"name": run.name, "system": run.system, "seed": run.seed, "lr": run.lr}
            result |= {"settings": run.overrides, "steps": lines[-1]["step"], "commit": commit, "curve": curve(lines)}
            samples = None
            if run in sampled:
                samples = measure.sampled(place.samples(run, OWN), network.load_classifier(), place.statistics())
            write_result(results / f"{run.name}.json", {**result, "samples": samples})


def _run_all(
    commands: Mapping[Run, Sequence[str]], place: Workplace, kind: str, seconds: float = float("inf")
) -> list[Run]:
    """Run them at once, none for longer than that; those that came to their end."""
    logs, processes = place.folder / "logs", {}
    logs.mkdir(exist_ok=True)
    for run, command in commands.items():
        with (logs / f"{run.name}-{kind}.log").open("ab") as log:
            processes[run] = _start(command, log)
    try:
        end = time.monotonic() + seconds
        while any(process.poll() is None for process in processes.values()) and time.monotonic() < end:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        for process in processes.values():
            process.kill()
    codes = {run: process.wait() for run, process in processes.items()}
    for run, code in codes.items():
        if code:
            logger.error("%s ended with exit code %d; see %s", run.name, code, logs / f"{run.name}-{kind}.log")
    return [run for run, code in codes.items() if code == 0]


def _start(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log, env=environment)
