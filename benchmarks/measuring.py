"""What the benchmarks share: turns, medians and their spread, memory of a step, and what was measured where."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

CPU_INFO = Path("/proc/cpuinfo")


def in_turn(steps: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[str, list[Any]]:
    """What each step returns in each round; the steps take turns (A B C A B C ...), so that drift treats all alike."""
    returned: dict[str, list[Any]] = {name: [] for name in steps}
    for round_ in range(-warm_up, rounds):
        for name, step in steps.items():
            value = step()
            if round_ >= 0:
                returned[name].append(value)
    return returned


def seconds_of(step: Callable[[], Any], device: torch.device) -> float:
    """On one CPU thread the process's own time, which other processes do not run."""
    own = device.type == "cpu" and torch.get_num_threads() == 1
    process, wall = process_and_wall_seconds(step, device)
    return process if own else wall


def process_and_wall_seconds(step: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    synchronize(device)
    process, wall = time.process_time(), time.perf_counter()
    step()
    synchronize(device)
    return time.process_time() - process, time.perf_counter() - wall


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios: a machine whose speed drifts cancels out."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def spread(values: Sequence[float]) -> float:
    """Half the distance of the quartiles over the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """The most bytes live at one moment of a step, beyond those before it.

    On CUDA as the caching allocator counts; on CPU the running sum of the profiler's memory events, which hold every
    tensor, but not the scratch space inside a math library.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def free_gradients(module: nn.Module) -> list[Any]:
    """From now on each parameter's gradient is freed as soon as it is complete. Returns the hooks, to remove."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    return [parameter.register_post_accumulate_grad_hook(free) for parameter in module.parameters()]


def saved_bytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass leaves for backward, each storage once, the input included, parameters left out."""
    storages: dict[int, tuple[StorageWeakRef, int]] = {}
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    # What a backward pass within this forward pass has used is gone already.
    kept = sum(size for storage, size in storages.values() if not storage.expired())
    del outputs
    return kept


def circumstances(device: torch.device) -> dict[str, Any]:
    """When, where and of which commit: the head of every result."""
    return {
        "date": str(datetime.date.today()),
        "commit": _commit(),
        "machine": machine(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def told(found: dict[str, Any]) -> str:
    """The head of a result as one line."""
    return "{date}, commit {commit}, torch {torch}, {threads} threads, {machine}".format(**found)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores"


def _commit() -> str:
    """Short, with a + where files differ from it; "unknown" outside of a checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"
