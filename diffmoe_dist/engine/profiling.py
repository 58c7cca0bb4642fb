"""Where the time goes: seconds of each part of a step, a trace of chosen steps, and memory when it runs out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from diffmoe_dist.config import ProfileConfig
from diffmoe_dist.logs import logger

# all_to_all is the exchange of tokens: a part of forward and backward, with the wait for slower ranks in it.
ON_DEVICE = ("forward", "backward", "all_to_all", "optimizer")
ON_HOST = ("data", "checkpoint")  # what the host waits for; of a checkpoint, what it keeps training from going on


class Timings:
    """Seconds a step spends in its parts, on average since the last question.

    On CUDA the parts on the device are timed by events, which are read when they are asked for. None waits: a part that
    the device has not come to the end of counts the next time.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.cuda and name in ON_DEVICE:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.events.append((name, begin, end))
            return
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What is done meanwhile is no part of a step."""
        seconds, events = dict(self.seconds), len(self.events)
        yield
        self.seconds = defaultdict(float, seconds)
        del self.events[events:]

    def mean_since_last(self, steps: int) -> dict[str, float]:
        """`seconds_<part>` for each part."""
        events, self.events = self.events, []
        for name, begin, end in events:
            if end.query():
                self.seconds[name] += begin.elapsed_time(end) / 1000
            else:
                self.events.append((name, begin, end))
        means = {f"seconds_{name}": self.seconds[name] / steps for name in (*ON_HOST, *ON_DEVICE)}
        self.seconds.clear()
        return means


class Profiler:
    """A trace of the steps `profile.steps`, and a snapshot of CUDA's memory when it runs out, in run_dir/profile."""

    def __init__(self, settings: ProfileConfig, run_dir: Path, rank: int, device: torch.device) -> None:
        self.steps = settings.steps
        self.snapshots = settings.memory_snapshot
        self.folder = run_dir / "profile"
        self.rank = rank
        self.device = device
        self.trace: torch.profiler.profile | None = None
        if self.snapshots:
            torch.cuda.memory._record_memory_history(max_entries=200_000)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around optimizer step `step`, counted from 1."""
        if self.steps is not None and self.trace is None and self.steps[0] <= step <= self.steps[1]:
            self._start()
        try:
            yield
        except torch.OutOfMemoryError:
            self._save_memory(step)
            raise
        if self.steps is not None and step >= self.steps[1]:
            self._save_trace(self.steps)

    def close(self) -> None:
        """A run that ends within the chosen steps keeps what it has."""
        if self.steps is not None:
            self._save_trace(self.steps)

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.trace = torch.profiler.profile(activities=activities, record_shapes=True)
        self.trace.start()

    def _save_trace(self, steps: tuple[int, int]) -> None:
        if self.trace is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.trace.stop()
        path = self.folder / f"steps-{steps[0]}-{steps[1]}-rank-{self.rank}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.trace.export_chrome_trace(str(path))
            logger.info("the trace is in %s (chrome://tracing, ui.perfetto.dev)", path)
        except OSError as error:
            logger.warning("%s cannot be written (%s); the trace is lost", path, error.strerror)
        self.trace = None

    def _save_memory(self, step: int) -> None:
        if self.snapshots:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"out-of-memory-step-{step}-rank-{self.rank}.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            logger.error("step %d ran out of memory; the snapshot is in %s (pytorch.org/memory_viz)", step, path)
