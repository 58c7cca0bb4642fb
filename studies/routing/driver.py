"""Makes the runs of the study one after another, two at a time, and writes a result of each that is finished.

It may be stopped and started again at any time: a run goes on from its newest checkpoint, samples from the last block.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from diffmoe_dist.engine.run_log import read_metrics
from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.metrics import Statistics
from diffmoe_dist.logs import logger
from studies.routing import classifier as network
from studies.routing import measure
from studies.routing.images import read_images
from studies.routing.results import LEVELS, by_learning_rate, keep_conditions, read_results, write_result
from studies.routing.systems import BASE_CONFIG, CONSTANT, SYSTEMS, Run, chosen_learning_rate, next_runs

SAMPLES = 5000
SAMPLER_STEPS = 16
FIRST_STEPS = 40  # whose losses a result has one by one
CURVE_STEPS = 50  # over which it has their means
SEARCH = "search/interval_search.json"
SEARCHED = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9)  # constant thresholds
_SAMPLER = ("--steps", str(SAMPLER_STEPS), "--batch-size", str(measure.BLOCK), "--device", "cpu")
_SECONDS_BETWEEN_LOOKS = 2.0
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
_IMAGES = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}


@dataclass(frozen=True)
class Workplace:
    """The folder that everything lies in which is not committed."""

    folder: Path

    def shards(self, part: str) -> Path:
        """Of "train" or "test"."""
        return self.folder / "shards" / part

    def run_dir(self, run: Run) -> Path:
        return self.folder / "runs" / run.name

    def samples(self, run: Run, rule: str) -> Path:
        return self.folder / "samples" / f"{run.name}-{rule}"

    @property
    def reference(self) -> Path:
        return self.folder / "reference.pt"

    def pack(self) -> None:
        """Pack the images that are not packed yet, by the project's own command."""
        for part, name in _IMAGES.items():
            source = FASHION_MNIST / name
            if not source.is_file():
                raise UserError(f"{source} is missing; install Debian's package dataset-fashion-mnist")
            if not (self.shards(part) / "index.json").is_file():
                command("data_tools", "pack", str(source), str(self.shards(part)), "--samples-per-shard", "4096")

    def look_at_training_images(self) -> None:
        """Keep the mean and covariance of their features, which samples are compared with."""
        if not self.reference.is_file():
            statistics, _ = network.look(network.load_classifier(), read_images(self.shards("train"))[0])
            partial = self.reference.with_suffix(".partial")
            torch.save({"mean": statistics.mean_F, "covariance": statistics.covariance_FF}, partial)
            partial.replace(self.reference)

    def statistics(self) -> Statistics:
        """Of the features of the training images."""
        tensors = torch.load(self.reference, weights_only=True)
        return Statistics(tensors["mean"], tensors["covariance"])


def command(*arguments: str) -> None:
    """Run a public command of the project. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def training_arguments(run: Run, run_dir: Path, place: Workplace, base_config: Path | None = None) -> list[str]:
    """Of the training command: what the run sets, and where things lie."""
    return [
        "--config", str(base_config or BASE_CONFIG), *run.overrides, f"run_dir={run_dir}",
        f"data.shards={place.shards('train')}", f"validation.shards={place.shards('test')}",
    ]  # fmt: skip


def drive(place: Workplace, results: Path, jobs: int) -> None:
    """Make all runs that have no result yet, `jobs` at a time, each in a process of its own with one thread."""
    keep_conditions(results, conditions())
    place.pack()
    place.look_at_training_images()
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: set[str] = set()
    while True:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    logger.error("%s ended with exit code %d", name, process.returncode)
                    failed.add(name)
        waiting = [run for run in to_do(results) if run.name not in running | dict.fromkeys(failed)]
        if not waiting and not running:
            break
        for run in waiting[: jobs - len(running)]:
            logger.info("%s begins; %d wait", run.name, len(waiting) - 1)
            running[run.name] = _start(run, place, results)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if failed:
        raise UserError(f"no result of {', '.join(sorted(failed))}; see the logs in {place.folder / 'logs'}")


def to_do(results: Path) -> list[Run]:
    """The runs without a result, the most important ones first."""
    found = read_results(results)
    return next_runs(found, chosen_learning_rate(by_learning_rate(found, "dense")))


def conditions() -> dict[str, Any]:
    """What all results share: beside it, a run has what its own system sets."""
    return {
        "base_config": OmegaConf.to_container(OmegaConf.load(BASE_CONFIG)),
        "samples": SAMPLES,
        "sampler": list(_SAMPLER),
        "searched_thresholds": list(SEARCHED),
        "held_out": {"seed": measure.SEED, "block": measure.BLOCK, "levels": LEVELS},
    }


def _start(run: Run, place: Workplace, results: Path) -> subprocess.Popen[bytes]:
    logs = place.folder / "logs"
    logs.mkdir(exist_ok=True)
    arguments = ["--system", run.system, "--seed", str(run.seed), "--lr", f"{run.lr:g}"]
    with (logs / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "studies.routing", "one", "--work", str(place.folder), "--results", str(results),
             *arguments],
            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def make_one(run: Run, place: Workplace, results: Path) -> None:
    """Train, measure, and write the result; what has been done already is not done again."""
    keep_conditions(results, conditions())
    run_dir = place.run_dir(run)
    if not (run_dir / "DONE").is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        commit = run_dir / "commit"
        commit.write_text(current_commit() if not commit.is_file() else commit.read_text())
        command("diffmoe_dist.train", *training_arguments(run, run_dir, place))
    for rule in SYSTEMS[run.system].rules:
        _sample(run, rule, place)
    write_result(results / f"{run.name}.json", describe(run, place))


def _sample(run: Run, rule: str, place: Workplace) -> None:
    out = place.samples(run, rule)
    if (out / "sampling.json").is_file():
        return
    if rule == CONSTANT and not (out / SEARCH).is_file():
        command(
            "diffmoe_dist.interval_search", "--checkpoint", str(place.run_dir(run)), "--out", str(out / "search"),
            "--thresholds", ",".join(map(str, SEARCHED)), "--num", str(measure.BLOCK), *_SAMPLER,
        )  # fmt: skip
    command(
        "diffmoe_dist.sample", "--checkpoint", str(place.run_dir(run)), "--out", str(out), "--num", str(SAMPLES),
        *_SAMPLER, *measure.rule_settings(rule, constant_threshold(out, rule)),
    )  # fmt: skip


def constant_threshold(samples: Path, rule: str) -> float | None:
    """The one that the search in a folder of samples found; None for the other rules."""
    if rule != CONSTANT:
        return None
    return measure.threshold_of_capacity_1(json.loads((samples / SEARCH).read_text()))


def describe(run: Run, place: Workplace) -> dict[str, Any]:
    """The result of a run that is trained and sampled from."""
    images, labels = read_images(place.shards("test"))
    run_dir, rated = place.run_dir(run), network.load_classifier()
    measures = {}
    for rule in SYSTEMS[run.system].rules:
        samples = place.samples(run, rule)
        threshold = constant_threshold(samples, rule)
        measures[rule] = {
            "constant_threshold": threshold,
            "held_out": measure.held_out(run_dir, measure.rule_settings(rule, threshold), images, labels),
            "samples": measure.sampled(samples, rated, place.statistics()),
        }
    lines, load = read_metrics(run_dir / "metrics.jsonl"), run_dir / "expert_load.jsonl"
    return {
        "name": run.name,
        "system": run.system,
        "seed": run.seed,
        "lr": run.lr,
        "settings": run.overrides,
        "steps": lines[-1]["step"],
        "commit": (run_dir / "commit").read_text().strip(),
        "curve": curve(lines),
        "training_load": read_metrics(load)[-1] if load.stat().st_size else None,
        "measures": measures,
    }


def curve(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The losses of a run, from the lines of its metrics.jsonl: the first ones, means, and those of validation."""
    first = {str(line["step"]): line["loss"] for line in lines if line["step"] <= FIRST_STEPS}
    groups: dict[int, list[float]] = {}
    for line in lines:
        groups.setdefault(-(-line["step"] // CURVE_STEPS) * CURVE_STEPS, []).append(line["loss_diffusion"])
    means = {str(step): round(sum(losses) / len(losses), 6) for step, losses in groups.items()}
    validation = {str(line["step"]): round(line["loss_val"], 7) for line in lines if "loss_val" in line}
    return {"first": first, "training": means, "validation": validation}


def current_commit() -> str:
    found = subprocess.run(
        ["git", "-C", str(BASE_CONFIG.parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
