"""The ranks of a run: devices, process groups, how ranks find each other under each launcher, and how they leave."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch, detect_launch
from diffmoe_dist.logs import logger
from diffmoe_dist.model.precision import set_tf32

Group = dist.ProcessGroup
_SECONDS_BEFORE_A_WORD = 20.0  # that a rank waits for the others without one


def all_gather(gathered: torch.Tensor, mine: torch.Tensor, group: Group | None = None) -> None:
    """Every rank's tensor, one after the other, on every rank. (torch renamed it in 2.13.)"""
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(gathered, mine, group)


@dataclass(frozen=True)
class Topology:
    """The process groups of a run.

    An expert-parallel group is `expert` consecutive ranks over which one set of experts is sharded. An
    expert-data-parallel group is the ranks, `expert` apart, that hold the same shard. A tensor-parallel group is
    `tensor` consecutive ranks that cut attention and dense layers among them; else they are ranks as any others.
    """

    rank: int
    world_size: int
    device: torch.device
    expert: int  # size of an expert-parallel group
    world_group: Group
    expert_group: Group
    expert_data_group: Group
    tensor: int  # size of a tensor-parallel group
    tensor_group: Group

    @property
    def expert_rank(self) -> int:
        return self.rank % self.expert

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks, fp64, of the shape of `values`; exact where all ranks agree. Collective."""
        values = values.double()
        dist.all_reduce(values, group=self.world_group)
        return values / self.world_size


def choose_device(setting: str, launch: Launch, tf32: bool = False) -> torch.device:
    """The device of this rank. Call it before deepspeed is imported.

    Args:
        setting: `auto`, `cpu` or `cuda`.
        tf32: let products of fp32 matrices on CUDA use TF32.

    Raises:
        UserError: there is no CUDA device, or fewer than the ranks of this node.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed takes a GPU that is there, and warns where none is
        keep_freed_memory()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device=cuda, but this machine has no usable CUDA device; use device=cpu or device=auto")
    devices = torch.cuda.device_count()
    if max(launch.local_world_size, launch.local_rank + 1) > devices:
        raise UserError(
            f"device={setting}: {launch.local_world_size} ranks on a node with {devices} CUDA devices; "
            "launch at most that many, or use device=cpu"
        )
    torch.cuda.set_device(launch.local_rank)
    set_tf32(tf32)
    return torch.device("cuda", launch.local_rank)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU, in whole GiB, so that equal boards agree; None: not known."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory) // 2**30 * 2**30


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    glibc gives large blocks back to the system when they are freed, and takes them anew, page by page and filled with
    zeros, for the next tensor of that size. A training step on a CPU frees what the next one takes, all of it.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)


def set_deterministic(device: torch.device) -> None:
    """Let torch use only algorithms whose results are the same bits every time. Call it before the first step.

    Operations without such an algorithm are refused. On CUDA, cuBLAS also gets a workspace, and convolutions are not
    benchmarked. On a CPU nothing else changes: with the same ranks and threads its bits are always the same.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it has not written, so new memory need not be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def start_process_group(device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> Launch:
    """Initialise torch.distributed under whichever launcher started this process.

    Args:
        timeout: how long a collective waits before it fails.

    Raises:
        UserError: mpirun started this process, and mpi4py does not load.
    """
    launch = detect_launch()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Threads of two ranks on one core spin against each other.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world_size))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launch.kind == "single":
        _publish(launch)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return launch
    if launch.kind == "mpi":
        launch = _meet_over_mpi()
    elif launch.kind == "slurm":
        _meet_under_slurm(launch)
    _meet(backend, timeout)
    return launch


def _meet(backend: str, timeout: timedelta) -> None:
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not (address and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: set them to the address of rank 0, or use a launcher"
        )
    try:
        socket.getaddrinfo(address, int(port))
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={address}: this machine does not know that address of rank 0 ({error.strerror}); give another"
        ) from None
    rank, ranks = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    word = ("rank %s waits for %s ranks to meet at %s:%s", rank, ranks, address, port)
    waiting = threading.Timer(_SECONDS_BEFORE_A_WORD, logger.warning, word)
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT={port} is in use on this machine, by another run for example; choose another, by "
            "--master_port of deepspeed or --master-port of torchrun"
        ) from None
    finally:
        waiting.cancel()


def stop_process_group() -> None:
    """Leave together, so that no rank closes connections that another one still uses. Collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _meet_over_mpi() -> Launch:
    """Broadcast the address of rank 0 with mpi4py, and set the variables that torch's launchers set."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpirun started this process, but mpi4py does not load: {error}; install an MPI library"
        ) from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_size = node.Get_rank(), node.Get_size()
    address = None
    if world.Get_rank() == 0:
        host = "127.0.0.1" if local_size == world.Get_size() else socket.gethostname()
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = (host, probe.getsockname()[1])
    host, port = world.bcast(address, root=0)
    rank, size = world.Get_rank(), world.Get_size()
    MPI.Finalize()  # its work is done, and mpirun calls a process that ends without this a failure
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    launch = Launch(rank, size, local_rank, "mpi", local_size)
    _publish(launch)
    return launch


def _meet_under_slurm(launch: Launch) -> None:
    """srun sets ranks but no address: take the first node of the step, and a port computed from the job's number."""
    env = os.environ
    if "MASTER_ADDR" not in env:
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], check=True, capture_output=True, text=True
        )
        env["MASTER_ADDR"] = nodes.stdout.split()[0]
    env.setdefault("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 20_000))
    _publish(launch)


def from_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank. Collective; for what ranks may see differently on a shared disk."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_first_rank(function: Callable[[], Any], group: Group | None = None) -> Any:
    """Call `function` on the group's first rank alone; every rank returns, or raises, what it does. Collective."""
    box: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            box[0] = function()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _publish(launch: Launch) -> None:
    """Set the variables that DeepSpeed reads, whatever initialised the process group."""
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
