"""The whole training step of a mixture of experts against that of a dense model, and against layers by others.

What is measured. `Trainer.train_step` on one rank: noising, forward, losses, backward, clipping, AdamW, weight average;
all but reading the data, which is the same random batch again and again. The models, of one depth and width, every
second block a mixture of 16 experts:

- dense: without experts, its MLPs widened until it has as many parameters as a token activates in `ours`. The fair one.
- ours: DiffMoE's global pool with its capacity predictor.
- published: the layer of DiffMoE restated from the paper (other_layers.py): a loop over experts, a scatter to (N T, D).
- deepspeed: DeepSpeed's own MoE layer, token choice, top-1, capacity 1; it has no capacity predictor.

Settings may follow a name: `ours,train.recompute=mlp` is one more model. All run in the same trainer.

How. Each model has a process of its own; they take turns (A B C D A B C D ...) after a warm-up, so that drift treats
all alike. A turn is one step, on CUDA four. Columns, of the rounds' medians, with half the distance of the quartiles as
the spread:

- process: seconds of the process's own time, which other processes' work enters little; wall: of the clock.
- / dense: the median of the rounds' ratios to the first model, of process time on one CPU thread, else of wall time.
- peak: the most memory that forward and backward hold at one moment beyond weights and gradients (each gradient is
  freed once complete), of the model alone, without DeepSpeed.
- step: the most that the whole step holds beyond what is there before it, with gradients and DeepSpeed's buffers.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --sizes B --tokens 2048 --models dense ours
    python -m benchmarks.train_step --device cuda --precision bf16 --sizes B --tokens 65536
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch
import yaml

from benchmarks.measuring import (
    circumstances,
    free_gradients,
    in_turn,
    peak_bytes,
    process_and_wall_seconds,
    ratio,
    spread,
    told,
)
from diffmoe_dist.config import Config, build_config, for_world, pool_samples
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.class_names import NO_NAMES
from diffmoe_dist.launch import detect_launch
from diffmoe_dist.model.accounting import account

if TYPE_CHECKING:
    from diffmoe_dist.engine.trainer import Trainer
    from diffmoe_dist.model.dit import DiT

MODELS = ("dense", "ours", "published", "deepspeed")
EXPERTS = 16
IN_A_ROW = {"cpu": 1, "cuda": 4}  # steps of a turn: on CUDA the host works on the next one while the device is busy
# Depth, width, heads, input size; two pixels a side make a token.
SIZES = {
    "tiny": (2, 64, 1, 8),
    "XS": (4, 256, 4, 32),
    "S": (12, 384, 6, 32),
    "B": (12, 768, 12, 32),
    "L": (24, 1024, 16, 32),
}


def config_for(model: str, size: str, tokens: int, device: str, precision: str, ranks: int = 1) -> Config:
    """`model` is a name of `MODELS`, and settings after it, each after a comma; `tokens` are those of all ranks."""
    name, *settings = model.split(",")
    depth, width, heads, input_size = SIZES[size]
    shape = {"depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": 2, "input_size": input_size}
    common: dict[str, Any] = {
        "run_dir": "unused",
        "device": device,
        "precision": precision,
        "model": {**shape, "in_channels": 4, "num_classes": 1000},
        "train": {"steps": 10**6, "global_batch_size": tokens // tokens_of_image(size), "hang_timeout": 0},
        "optim": {"clip_grad_norm": 1.0},
        "data": {"shards": "unused"},
    }
    layers: list[dict[str, Any]] = [common, {"moe": {"router": "global_pool", "num_experts": EXPERTS}}]
    if name == "dense":
        activated = account(build_config(*layers)).activated()
        layers[1:] = [{"moe": {"router": "dense"}}]
        missing = activated - account(build_config(*layers)).total
        hidden = 4 * width + 8 * round(missing / (depth * (2 * width + 1)) / 8)  # the sizes that a GPU is fast for
        layers.append({"model": {"mlp_ratio": (hidden + 0.5) / width}})  # rounded down when the model is built
    return for_world(build_config(*layers, *map(_setting, settings)), ranks)


def tokens_of_image(size: str) -> int:
    return (SIZES[size][3] // 2) ** 2


def _setting(text: str) -> dict[str, Any]:
    """`train.recompute=mlp` as a file of settings would have it."""
    key, value = text.split("=")
    nested: Any = yaml.safe_load(value)
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return cast(dict[str, Any], nested)


def random_batch(config: Config) -> Batch:
    generator = torch.Generator().manual_seed(0)
    model, count = config.model, config.train.micro_batch_size
    assert count is not None

    def normal() -> torch.Tensor:
        return torch.randn(count, model.in_channels, model.input_size, model.input_size, generator=generator)

    return Batch(
        images=normal(),
        labels=torch.randint(model.num_classes, (count,), generator=generator),
        noise=normal(),
        time_uniform=torch.rand(count, dtype=torch.float64, generator=generator),
        drop_uniform=torch.rand(count, dtype=torch.float64, generator=generator),
        sample_ids=torch.arange(count),
        epochs=torch.zeros(count, dtype=torch.int64),
        bad=torch.zeros(count, dtype=torch.int64),
    )


class SameBatch:
    """In the place of a loader."""

    class_names = NO_NAMES

    def __init__(self, config: Config) -> None:
        self.batch = random_batch(config)

    def __iter__(self) -> SameBatch:
        return self

    def __next__(self) -> Batch:
        return self.batch

    def close(self) -> None:
        pass


def make_model(name: str, config: Config) -> DiT:
    """On the device that is torch's default: the trainer's is the meta device."""
    from benchmarks.other_layers import put_into
    from diffmoe_dist.model.dit import DiT

    model = DiT(config)
    if name in ("published", "deepspeed"):
        put_into(model, name, config)
    return model


def make_trainer(name: str, config: Config, folder: Path) -> Trainer:
    """The trainer of a run, with this model and without data; it sets up torch.distributed, as launched. Collective."""
    from diffmoe_dist.parallel.topology import choose_device, start_process_group

    device = choose_device(config.device, detect_launch())
    launch = start_process_group(device)

    from benchmarks.other_layers import deepspeed_groups
    from diffmoe_dist.engine import build
    from diffmoe_dist.engine.progress import Progress
    from diffmoe_dist.engine.resume import Start
    from diffmoe_dist.parallel.expert_parallel import create_topology

    topology = create_topology(launch, device, config.parallel.expert)
    pool = pool_samples(config, launch.world_size)
    progress = Progress(0, 0, seed=config.seed, data_fingerprint="", pool_samples=pool, micro_steps=1)
    patches: dict[str, Any] = {"DiT": partial(make_model, name), "_open_loader": lambda config, *_: SameBatch(config)}
    if name == "deepspeed":
        patches["parameter_groups"] = deepspeed_groups
    with mock.patch.multiple(build, **patches):
        config = replace(config, run_dir=str(folder))
        trainer = build.build_trainer(config, topology, cast(Any, None), Start(None, progress))
    _leave_zero(trainer)
    return trainer


def _leave_zero(trainer: Trainer) -> None:
    """As initialised, the blocks are the identity, and most gradients zero."""
    for master in trainer.state.flat["master"]:
        generator = torch.Generator(master.device).manual_seed(0)
        master.add_(torch.randn(master.shape, generator=generator, device=master.device), alpha=0.02)
    trainer.state.after_load(0)


def peak_of_model(name: str, config: Config, device: torch.device) -> int:
    """Of forward and backward, beyond weights and gradients."""
    from diffmoe_dist.diffusion.objectives import build_objective
    from diffmoe_dist.engine.noising import noisy_inputs
    from diffmoe_dist.model.compiled import apply_compile
    from diffmoe_dist.model.dit import initialize
    from diffmoe_dist.model.recompute import apply_recompute

    model = make_model(name, config)
    initialize(model, 0)
    if config.train.compile:
        apply_compile(model, config.train.recompute)
    apply_recompute(model, config.train.recompute)
    model.to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    objective = build_objective(config)
    batch = random_batch(config).to(device)
    free_gradients(model)

    def step() -> None:
        z, t, y = noisy_inputs(batch, objective, config)
        output = model(z, objective.model_time(t), y)
        loss = objective.losses(output.prediction, output.variance, batch.images, batch.noise, t)
        torch.stack([value.mean() for value in [*loss.values(), *output.losses.values()]]).sum().backward()

    if device.type == "cuda":
        step()  # which makes workspaces that stay
    return peak_bytes(step, device)


def _serve(connection: Connection, model: str, config: Config) -> None:
    """A process with one model: answers `step`, `memory`, `end`."""
    name, steps = model.split(",")[0], IN_A_ROW[config.device]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(name, config, Path(folder))
        device = trainer.topology.device
        while (asked := connection.recv()) != "end":  # EOFError: the benchmark has been stopped
            if asked == "step":
                process, wall = process_and_wall_seconds(lambda: [trainer.train_step() for _ in range(steps)], device)
                connection.send((process / steps, wall / steps))
            else:
                step = peak_bytes(trainer.train_step, device)
                peak = peak_of_model(name, config, device)
                connection.send((peak, step))
        trainer.close()


def processes(device: str) -> Any:
    """Where new processes come from: on a CPU forks of one that has imported torch and deepspeed, for that is slow."""
    if device == "cuda":  # deepspeed's import asks for the GPU, which a fork cannot use then
        return multiprocessing.get_context("spawn")
    os.environ["DS_ACCELERATOR"] = "cpu"  # as `choose_device` would say, too late for the import
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffmoe_dist.engine.build", "benchmarks.other_layers", "deepspeed.moe.layer"])
    return context


class Served:
    """A model in a process of its own."""

    def __init__(self, model: str, config: Config) -> None:
        context = processes(config.device)
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, model, config), daemon=True)
        self.process.start()
        other.close()

    def ask(self, what: str) -> Any:
        self.connection.send(what)
        return self.connection.recv()  # EOFError: the process has failed, and has said why

    def end(self) -> None:
        self.connection.send("end")
        self.process.join()


def measure(size: str, tokens: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a model."""
    models: list[str] = arguments.models
    configs = {model: config_for(model, size, tokens, arguments.device, arguments.precision) for model in models}
    served = {model: Served(model, config) for model, config in configs.items()}
    steps: dict[str, Callable[[], Any]] = {model: partial(of.ask, "step") for model, of in served.items()}
    seconds = in_turn(steps, arguments.rounds, warm_up=1 if arguments.rounds < 5 else 2)
    rows: list[dict[str, Any]] = []
    for model, of in served.items():
        peak, step = of.ask("memory")
        of.end()
        process, wall = ([round_[place] for round_ in seconds[model]] for place in (0, 1))
        of_first = seconds[models[0]]
        rows.append(
            {
                "size": size,
                "tokens": tokens,
                "model": model,
                "activated": account(configs[model]).activated(),
                "clock": "process" if arguments.device == "cpu" and torch.get_num_threads() == 1 else "wall",
                "process_seconds": process,
                "wall_seconds": wall,
                "process_over_first": ratio(process, [round_[0] for round_ in of_first]),
                "wall_over_first": ratio(wall, [round_[1] for round_ in of_first]),
                "peak_bytes": peak,
                "step_peak_bytes": step,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown. Of a row's ratios the one of process time is shown on one CPU thread, else that of wall time."""
    first = rows[0]["model"]
    lines = [
        f"| size | tokens | model | process (s) | wall (s) | spread | / {first} | peak (GiB) | / {first} | step |",
        f"|{'---|' * 10}",
    ]
    for row in rows:
        base = next(r for r in rows if all(r[key] == row[key] for key in ("size", "tokens")))
        kind = row["clock"]
        cells = [row["size"], str(row["tokens"]), row["model"].replace(",", ", ")]
        cells += [f"{statistics.median(row[f'{clock}_seconds']):.3f}" for clock in ("process", "wall")]
        cells += [f"{spread(row[f'{kind}_seconds']):.1%}", f"**{row[f'{kind}_over_first']:.3f}**"]
        cells += [f"{row['peak_bytes'] / 2**30:.2f}", f"{row['peak_bytes'] / base['peak_bytes']:.2f}"]
        cells += [f"{row['step_peak_bytes'] / 2**30:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=_first_line())
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu", help="%(default)s here")
    parser.add_argument("--precision", "--dtype", default="fp32", help="of every model; default: fp32")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["S"], help="default: S")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 8192], help="default: 1024 2048 8192")
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        metavar="NAME[,SETTING=VALUE]",
        help=f"of {', '.join(MODELS)} (the default); ratios are to the first",
    )
    parser.add_argument("--rounds", type=int, default=7, help="to take the median of; default: 7")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there, too")
    arguments = parser.parse_args()
    for model in arguments.models:
        if model.split(",")[0] not in MODELS:
            parser.error(f"--models {model}: choose of {', '.join(MODELS)}")
    for size in arguments.sizes:
        for tokens in arguments.tokens:
            if tokens < EXPERTS or tokens % tokens_of_image(size):
                parser.error(
                    f"--tokens {tokens}: choose a multiple of {tokens_of_image(size)}, an image of size {size}"
                )
    return arguments


def _first_line() -> str:
    assert __doc__ is not None
    return __doc__.splitlines()[0]


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    found: dict[str, Any] = {"benchmark": "train_step", **circumstances(device), "precision": arguments.precision}
    found |= {"device": arguments.device, "rows": []}
    print(f"{told(found)}, {arguments.precision}, {arguments.rounds} rounds\n")
    for size in arguments.sizes:
        for tokens in arguments.tokens:
            rows = measure(size, tokens, arguments)
            print("\n".join(table(rows)[0 if not found["rows"] else 2 :]), flush=True)
            found["rows"] += rows
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
