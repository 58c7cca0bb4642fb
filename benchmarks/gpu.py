"""What a GPU does against what the planner says: layer, training step, MFU, memory, sampling; in one table.

`make gpu` runs the tests marked `gpu` and then this, in under ten minutes. Every part has a process of its own, so that
its memory is its own and a part that fails loses its rows alone. A row is a prediction, made before by the code of
`diffmoe_dist.plan` for this accelerator, and the median of what was measured. Off by more than 10 % is said so.

- machine: a large matrix product and a copy within device memory against the data sheet. The planner assumes fractions
  of these.
- layer: forward and backward of the mixture-of-experts layer, and of the dense MLP with the same arithmetic.
- step: `Trainer.train_step` without reading data, one after the other as in a run; its MFU; memory held between steps,
  and at the peak of a step.
- sampling: the Euler sampler without guidance. The prediction is a third of what the planner says of a training step's
  forward and backward pass: on the device or, where that is slower, on the host.

    python -m benchmarks.gpu --out runs/gpu
    python -m benchmarks.gpu --device cpu --accelerator H100-80 --sizes tiny --images 4 --out /tmp/gpu
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import moe_layer, sampling
from benchmarks.measuring import circumstances, peak_bytes, process_and_wall_seconds, told
from benchmarks.train_step import EXPERTS, IN_A_ROW, SIZES, config_for, make_trainer, tokens_of_image
from diffmoe_dist.config import Config
from diffmoe_dist.planning.accelerators import ACCELERATORS, Accelerator, matmul_format, model_flop_utilization
from diffmoe_dist.planning.estimate import Plan, make_plan
from diffmoe_dist.planning.step_time import COMPUTE_FRACTION, LAUNCH, device_seconds, launches
from diffmoe_dist.planning.workload import Cluster

TOLERANCE = 0.1  # of a prediction
MODELS = ("dense", "ours")
VARIANTS = (
    "ours,train.recompute=mlp",
    "ours,train.compile=true",
    "ours,precision=bf16_mixed",
)  # of one size alone: minutes are few
GIB = 2**30


@dataclass(frozen=True)
class Row:
    part: str
    what: str
    unit: str
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        return self.measured / self.predicted - 1


@dataclass(frozen=True)
class Setting:
    """What all parts share."""

    device: str
    accelerator: Accelerator
    precision: str
    images: int  # at once
    rounds: int

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def seconds(self, step: Callable[[], Any], warm_up: int = 3, in_a_row: int = 1) -> float:
        """The median wall time of some rounds after a warm-up; of one of the steps that a round takes in a row."""

        def some() -> None:
            for _ in range(in_a_row):
                step()

        rounds = [process_and_wall_seconds(some, self.torch_device)[1] for _ in range(warm_up + self.rounds)]
        return statistics.median(rounds[warm_up:]) / in_a_row


def machine_rows(setting: Setting) -> list[Row]:
    size, device = (8192, setting.torch_device) if setting.device == "cuda" else (512, setting.torch_device)
    work = 2 * size**3
    a, b = torch.randn(2, size, size, device=device, dtype=setting.dtype)
    source = torch.empty(size * size * 8, device=device)
    target = torch.empty_like(source)
    product = setting.seconds(lambda: a @ b)
    copied = setting.seconds(lambda: target.copy_(source))
    peak, bandwidth = setting.accelerator.peak_flops, setting.accelerator.memory_bandwidth
    kind = "fp32" if setting.dtype == torch.float32 else "bf16"
    moved = 2 * source.numel() * source.element_size()
    return [
        Row("machine", f"product of {size} x {size} in {kind}", "TFLOP/s", peak[kind] / 1e12, work / product / 1e12),
        Row("machine", "copy within device memory", "TB/s", bandwidth / 1e12, moved / copied / 1e12),
    ]


def layer_rows(setting: Setting, size: str) -> list[Row]:
    width, tokens = SIZES[size][1], setting.images * moe_layer.TOKENS_PER_IMAGE
    like = torch.empty(0, device=setting.device, dtype=setting.dtype)
    found = moe_layer.measure(width, tokens, EXPERTS, like, setting.rounds)
    kind = "fp32" if setting.dtype == torch.float32 else "bf16"
    rate = setting.accelerator.peak_flops[kind] * COMPUTE_FRACTION[kind]
    return [
        Row(
            "layer",
            f"{size}, {'mixture' if row['layer'] == 'moe' else 'dense'}, {tokens} tokens",
            "ms",
            row["flops"] / rate * 1e3,
            statistics.median(row["seconds"]) * 1e3,
        )
        for row in found
        if row["layer"] in ("moe", "widened")
    ]


def step_rows(setting: Setting, size: str, model: str) -> list[Row]:
    config = config_for(model, size, setting.images * tokens_of_image(size), setting.device, setting.precision)
    plan = plan_of(config, setting)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model.split(",")[0], config, Path(folder))
        device = trainer.topology.device
        seconds = setting.seconds(trainer.train_step, in_a_row=IN_A_ROW[setting.device])
        held = held_bytes(device)
        peak = held + peak_bytes(trainer.train_step, device)
        trainer.close()
    flops, kind = plan.accounting.training_flops(plan.work.capacity), matmul_format(config)
    mfu = model_flop_utilization(flops, setting.images / seconds, 1, setting.accelerator.peak_flops[kind])
    name = f"{size}, {model}"
    return [
        Row("step", name, "ms", plan.step_seconds * 1e3, seconds * 1e3),
        Row("MFU", name, "%", plan.mfu * 100, mfu * 100),
        Row("memory, held", name, "GiB", sum(plan.persistent.values()) / GIB, held / GIB),
        Row("memory, peak", name, "GiB", plan.memory / GIB, peak / GIB),
    ]


def plan_of(config: Config, setting: Setting) -> Plan:
    return make_plan(config, Cluster(1, 1, setting.accelerator))


def held_bytes(device: torch.device) -> int:
    """Of all tensors, now; on CUDA as its allocator counts, on a CPU those that Python can see."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device == device}
    return sum(storages.values())


def sampling_rows(setting: Setting, size: str, rule: str) -> list[Row]:
    config = config_for("ours", size, setting.images * tokens_of_image(size), setting.device, setting.precision)
    model = sampling.random_model(config, setting.torch_device)
    sampling.find_thresholds(model, setting.images)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(setting.dtype)
    for layer in model.moe_layers:
        layer.router.inference = rule  # type: ignore[assignment]
    steps, capacity = 4, 1.0

    def sample() -> None:
        nonlocal capacity
        capacity = sampling.sample(model, config, setting.images, steps).capacity or 1.0

    seconds = setting.seconds(sample, warm_up=1)
    plan = make_plan(config, Cluster(1, 1, setting.accelerator), capacity)
    on_device = sum(device_seconds(config, setting.accelerator, plan.accounting, plan.work).values())
    predicted = steps * max(on_device, LAUNCH * launches(config, plan.work, 1)) / 3  # forward alone
    rate = setting.images * steps
    return [Row("sampling", f"{size}, {rule}", "evaluations/s", rate / predicted, rate / seconds)]


def parts(
    setting: Setting, sizes: Sequence[str], models: Sequence[str]
) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """The cheap ones first: where the time is up, the largest are left out."""
    yield "machine", partial(machine_rows, setting)
    for size in sizes:
        yield f"layer {size}", partial(layer_rows, setting, size)
        for model in [*models, *(VARIANTS if size == "B" else ())]:
            yield f"step {size} {model}", partial(step_rows, setting, size, model)
        for rule in ("static", "threshold"):
            yield f"sampling {size} {rule}", partial(sampling_rows, setting, size, rule)


def start_process(device: str) -> ProcessPoolExecutor:
    """That loads torch, deepspeed and the device's libraries while another one measures."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    pool.submit(load, device)
    return pool


def load(device: str) -> None:
    import diffmoe_dist.engine.build  # noqa: F401  (takes seconds)

    torch.zeros(1, device=device)


def run(part: Callable[[], list[Row]], pool: ProcessPoolExecutor) -> list[Row] | str:
    """In a process that ends then. A text is why it failed."""
    with pool:
        try:
            return pool.submit(part).result()
        except Exception as error:  # whatever it is, the other parts are worth their time
            traceback.print_exception(error)
            return f"{type(error).__name__}: {error}".splitlines()[0]


def table(rows: Sequence[Row]) -> list[str]:
    lines = ["| part | what | predicted | measured | | measured / predicted |", f"|{'---|' * 6}"]
    for row in rows:
        verdict = f"{row.measured / row.predicted:.2f}"
        if not abs(row.off) <= TOLERANCE:
            verdict = f"**{verdict}, off**"
        lines.append(f"| {row.part} | {row.what} | {row.predicted:.4g} | {row.measured:.4g} | {row.unit} | {verdict} |")
    return lines


def parse() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--accelerator", choices=tuple(ACCELERATORS), help="default: the one that CUDA names")
    parser.add_argument("--precision", default="bf16", help="default: bf16")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["S", "B", "L"], help="default: S B L")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME[,SETTING=VALUE]")
    parser.add_argument("--images", type=int, default=64, help="of a batch; default: 64")
    parser.add_argument("--rounds", type=int, default=9, help="to take the median of; default: 9")
    parser.add_argument("--minutes", type=float, default=5, help="after which no part is begun; default: 5")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for gpu.md and gpu.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device; --device cpu only tries the program out")
    if arguments.accelerator is None:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else "a CPU"
        known = [accelerator.name for accelerator in ACCELERATORS.values() if name in accelerator.device_names]
        if not known:
            parser.error(f"{name} is not in the planner's table; name one to compare with, by --accelerator")
        arguments.accelerator = known[0]
    return arguments


def main() -> None:
    arguments = parse()
    accelerator = ACCELERATORS[arguments.accelerator]
    setting = Setting(arguments.device, accelerator, arguments.precision, arguments.images, arguments.rounds)
    begun, rows, left_out = time.monotonic(), [], []
    ready = start_process(arguments.device)
    for name, part in parts(setting, arguments.sizes, arguments.models):
        elapsed = time.monotonic() - begun
        if elapsed < arguments.minutes * 60:
            pool, ready = ready, start_process(arguments.device)
            found = run(part, pool)
        else:
            found = f"not begun: {elapsed:.0f} s are over"
        print(f"{name}: {found if isinstance(found, str) else 'measured'}", flush=True)
        if isinstance(found, str):
            left_out.append(f"{name}: {found}")
        else:
            rows += found
    ready.shutdown()
    write(arguments, rows, left_out)
    if any("not begun" not in line for line in left_out):
        sys.exit(1)


def write(arguments: argparse.Namespace, rows: list[Row], left_out: list[str]) -> None:
    head = circumstances(torch.device(arguments.device))
    compared = f"{arguments.accelerator}, {arguments.precision}, {arguments.images} images, {EXPERTS} experts"
    lines = [told(head), f"Predicted for {compared}.", "", *table(rows)]
    off = [row for row in rows if not abs(row.off) <= TOLERANCE]
    lines += ["", f"{len(off)} of {len(rows)} predictions are off by more than {TOLERANCE:.0%}."]
    lines += [f"Left out: {line}." for line in left_out]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu.md").write_text("\n".join(lines) + "\n")
    numbers = [{**asdict(row), "off": row.off if math.isfinite(row.off) else None} for row in rows]
    found = {"benchmark": "gpu", **head, "accelerator": arguments.accelerator, "precision": arguments.precision}
    found |= {"rows": numbers, "left_out": left_out}
    (arguments.out / "gpu.json").write_text(json.dumps(found, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
