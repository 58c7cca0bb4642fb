"""What a checkpoint costs training: written in the background, against synchronously.

One process trains a model of DiffMoE-S's size (depth 12, width 384, 16 experts) on a tiny batch, and saves every few
steps. Saves take turns (background, synchronous, background, ...), in one run, so that a machine whose speed drifts
treats both alike. Columns:

- blocked: seconds for which training stood still: the wait for the copy, for a save still going on, or for all of it.
- whole cost: the time of the interval of steps after a save, with the save, less that of as many steps without one:
  also what the writing thread takes away from the steps it runs beside.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --device cuda --micro-batch 64
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from data_tools.digits import DigitsSource
from data_tools.pack import pack
from diffmoe_dist.config import Config, build_config, for_world
from diffmoe_dist.data.open import open_data
from diffmoe_dist.engine.build import build_trainer
from diffmoe_dist.engine.resume import find_start
from diffmoe_dist.engine.trainer import Trainer
from diffmoe_dist.launch import detect_launch
from diffmoe_dist.parallel.expert_parallel import create_topology
from diffmoe_dist.parallel.topology import choose_device, start_process_group, stop_process_group


def settings(folder: Path, micro_batch: int, device: str) -> Config:
    return build_config(
        {
            "run_dir": str(folder / "run"),
            "device": device,
            "model": {"size": "S", "patch_size": 2, "input_size": 8, "in_channels": 1, "num_classes": 10},
            "moe": {"router": "global_pool", "num_experts": 16},
            "train": {"steps": 10**6, "global_batch_size": micro_batch, "hang_timeout": 0},
            "data": {"shards": str(folder / "digits")},
            "checkpoint": {"keep": 1},
        }
    )


def make_trainer(config: Config) -> Trainer:
    config = for_world(config, 1)
    device = choose_device(config.device, detect_launch())
    index = open_data(config)
    launch = start_process_group(device)
    topology = create_topology(launch, device, config.parallel.expert)
    return build_trainer(config, topology, index, find_start(config, index, 1))


def seconds(trainer: Trainer, steps: int, save: bool, wait: bool) -> tuple[float, float]:
    """Seconds of an interval of steps after a save (or none), and how many of them training was blocked."""
    trainer.timings.mean_since_last(1)
    begun = time.perf_counter()
    if save:
        trainer.save()
    if wait:
        trainer.save_now()
    for _ in range(steps):
        trainer.train_step()
    if trainer.topology.device.type == "cuda":
        torch.cuda.synchronize()
    whole = time.perf_counter() - begun
    return whole, trainer.timings.mean_since_last(1)["seconds_checkpoint"]


def measure(trainer: Trainer, rounds: int, interval: int) -> dict[str, list[tuple[float, float]]]:
    """Per way of saving: seconds of an interval, seconds blocked."""
    seconds(trainer, 2, True, True)  # warm-up: host memory for the copy, torch's caches
    ways = {
        "no save": partial(seconds, trainer, interval, False, False),
        "background": partial(seconds, trainer, interval, True, False),
        "synchronous": partial(seconds, trainer, interval, True, True),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
            trainer.checkpointer.wait(must_succeed=True)  # what the interval was too short for
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interval", type=int, default=8, help="steps after each save")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint-benchmark-") as name:
        folder = Path(name)
        pack(DigitsSource(), folder / "digits")
        trainer = make_trainer(settings(folder, arguments.micro_batch, arguments.device))
        found = measure(trainer, arguments.rounds, arguments.interval)
        size = sum(file.stat().st_size for file in (folder / "run/checkpoints").rglob("*") if file.is_file())
        trainer.close()
    stop_process_group()
    step = statistics.median(whole for whole, _ in found["no save"]) / arguments.interval
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{datetime.date.today()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rounds = f"{arguments.rounds} rounds of {arguments.interval} steps"
    print(f"checkpoint {size / 1e9:.2f} GB, a step {step:.3f} s, {rounds}\n")
    print("| save | blocked (s) | in steps | whole cost (s) | in steps |\n|---|---|---|---|---|")
    for name in ("background", "synchronous"):
        blocked = statistics.median(blocked for _, blocked in found[name])
        cost = statistics.median(a - b for (a, _), (b, _) in zip(found[name], found["no save"], strict=True))
        print(f"| {name} | {blocked:.2f} | {blocked / step:.2f} | {cost:.2f} | {cost / step:.2f} |")


if __name__ == "__main__":
    main()
