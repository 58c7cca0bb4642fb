"""Runs commands: `run` as a shell does, `start` in processes that have torch and deepspeed loaded already.

Those are forks of one process that imported them. What a command does there is what it does in a process of its own,
but it starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed import LOADED
from tests.machine import ROOT, TIME_LIMIT, free_port

# For a command in a process of its own. No CUDA device is visible, so that every machine tests the same.
ENV = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def run(*command: object, env: dict[str, str] = ENV) -> subprocess.CompletedProcess[str]:
    """Run a command from the root of the clone to its end, whatever its exit code."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIME_LIMIT)


class Command:
    """One process of a command."""

    def __init__(
        self,
        module: str,
        arguments: tuple[str, ...],
        folder: Path,
        environment: dict[str, str],
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        name = f"{environment.get('RANK', 0)}-{time.monotonic_ns()}"
        self.files = folder / f"{name}.out", folder / f"{name}.err"
        self.process = LOADED.Process(
            target=_run, args=(module, arguments, self.files, environment, prepare), daemon=True
        )
        self.process.start()

    @property
    def stdout(self) -> str:
        return self.files[0].read_text()

    @property
    def stderr(self) -> str:
        return self.files[1].read_text()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def running(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float = TIME_LIMIT) -> int:
        """Its exit code; it is killed if it has none in that time."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s: {self.stderr}")
        assert self.process.exitcode is not None
        return self.process.exitcode


def start(
    module: str,
    *arguments: Any,
    folder: Path,
    ranks: int = 1,
    prepare: Callable[[int], None] | None = None,
    **environment: str,
) -> list[Command]:
    """Start `python -m module arguments` on some ranks.

    Args:
        folder: for what they print.
        prepare: called with the rank in each process before its main function.
    """
    common = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
    launcher: list[dict[str, str]] = [{}]
    if ranks > 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        launcher = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    words = tuple(str(argument) for argument in arguments)
    return [Command(module, words, folder, {**common, **rank}, prepare) for rank in launcher]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = TIME_LIMIT) -> Any:
    """The condition's value, once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.002)
    return value


def _run(
    module: str,
    arguments: tuple[str, ...],
    files: tuple[Path, Path],
    environment: dict[str, str],
    prepare: Callable[[int], None] | None,
) -> None:
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(ValueError):  # multiprocessing ignores Ctrl-C in its children
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare is not None:
        prepare(int(environment.get("RANK", 0)))
    from diffmoe_dist.command import run_command

    run_command(importlib.import_module(module).main)
