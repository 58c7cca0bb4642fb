"""Runs a function on several ranks, each a process of its own, and brings back what they return."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.machine import TIME_LIMIT

# Processes that have torch and deepspeed loaded already: forks of one process that imported them and did nothing else.
LOADED = multiprocessing.get_context("forkserver")
LOADED.set_forkserver_preload(
    ["torch", "torch.distributed.checkpoint", "torch.utils.tensorboard", "torch._dynamo", "deepspeed",
     "deepspeed.moe.layer", "deepspeed.runtime.zero.muon.original_muon", "omegaconf", "PIL.Image", "tqdm",
     "diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip"]
)  # fmt: skip

_GRACE_SECONDS = 2.0  # for the other ranks to end, and to tell why, once one has failed


class RankError(AssertionError):
    """A rank raised, died or hung; the message holds the tracebacks, the earliest first."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, time_limit: float = TIME_LIMIT) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` ranks that share a gloo process group.

    Args:
        function: of a module's top level, for the new processes import it by name.
        args: picklable.
        time_limit: seconds until ranks that have not ended are killed.

    Returns:
        What each rank returned, rank by rank: plain data and tensors.

    Raises:
        RankError: a rank raised, died, or was still running at the time limit.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = [
            LOADED.Process(target=_run_rank, args=(rank, world_size, folder, function, args), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            hung = _wait(processes, time.monotonic() + time_limit)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        errors = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        results = [Path(folder, f"{rank}.result") for rank in range(world_size)]
        missing = [rank for rank, path in enumerate(results) if not path.exists()]
        if errors or missing:
            codes = {rank: processes[rank].exitcode for rank in missing if rank not in hung}
            problem = f"ranks without a result, and their exit codes: {codes}"
            if hung and not errors:
                problem = f"ranks {hung} were still running after {time_limit:g} s and were killed; {problem}"
            raise RankError("\n\n".join([problem, *(path.read_text() for path in errors)]))
        return [torch.load(path, weights_only=False) for path in results]


def _wait(processes: list[Any], deadline: float) -> list[int]:
    """Wait until all have ended, or the deadline, or a while after one has failed; returns the ranks still alive."""
    running = {process.sentinel: process for process in processes}
    while running and time.monotonic() < deadline:
        for sentinel in multiprocessing.connection.wait(list(running), timeout=max(deadline - time.monotonic(), 0)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return [rank for rank, process in enumerate(processes) if process.sentinel in running]


def _run_rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # The variables that a launcher sets; DeepSpeed reads them.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        # A file as the meeting point takes no port, so tests may run side by side.
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        result = function(rank, world_size, *args)
        dist.barrier()
        dist.destroy_process_group()
        part = Path(folder, f"{rank}.part")
        torch.save(result, part)
        part.rename(Path(folder, f"{rank}.result"))
        code = 0
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may still be unwinding, and would abort a process that ends the usual way
