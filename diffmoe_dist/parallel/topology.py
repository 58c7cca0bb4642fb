"""The ranks of a run: how they find each other, which of them share experts, and how they part."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch, detect_launch

Group = dist.ProcessGroup

# gathered, mine, group: torch renamed it in 2.13.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Topology:
    """The process groups of a run.

    Ranks are laid out experts first: an expert-parallel group is `expert` consecutive ranks that together hold one set
    of experts; an expert-data-parallel group is the ranks, `expert` apart, that hold the same share.
    """

    rank: int
    world_size: int
    device: torch.device
    expert: int  # size of an expert-parallel group
    world_group: Group
    expert_group: Group
    expert_data_group: Group

    @property
    def expert_rank(self) -> int:
        return self.rank % self.expert

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks, in fp64 (exact where all ranks agree)."""
        values = values.double()
        dist.all_reduce(values, group=self.world_group)
        return values / self.world_size


def choose_device(setting: str, launch: Launch, tf32: bool = False) -> torch.device:
    """The device of this rank for the setting `device`: auto, cpu or cuda. To be asked before deepspeed is imported.

    Args:
        tf32: let products of fp32 matrices on CUDA use TF32.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed takes a GPU that is there, and warns where none is
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
    # The patch embedding is a convolution, which would use TF32 unasked.
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return torch.device("cuda", launch.local_rank)


def set_deterministic(device: torch.device) -> None:
    """Let torch take only algorithms whose results are the same bits every time; to be asked before the first step.

    On CUDA that also costs cuBLAS a workspace, convolutions their benchmark, and operations without such an algorithm
    are refused. On a CPU nothing changes but that refusal: on the same ranks and threads its bits are the same anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it has not written, so new memory need not be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def start_process_group(device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> Launch:
    """Initialise torch.distributed for whichever launcher started this process.

    Args:
        timeout: after which a collective gives up.
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
    dist.init_process_group(backend, timeout=timeout)
    return launch


def stop_process_group() -> None:
    """Leave together: nobody tears down connections that another rank still uses."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _meet_over_mpi() -> Launch:
    """Exchange the address of rank 0 through mpi4py, and hand it to torch as its launchers would."""
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
    """srun tells ranks but no address: the first node of the step, and a port that follows from the job."""
    env = os.environ
    if "MASTER_ADDR" not in env:
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], check=True, capture_output=True, text=True
        )
        env["MASTER_ADDR"] = nodes.stdout.split()[0]
    env.setdefault("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 20_000))
    _publish(launch)


def from_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank: what each would find by itself may differ on a shared disk; collective."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_first_rank(function: Callable[[], Any], group: Group | None = None) -> Any:
    """Call it on the first rank alone; what it returns or raises, every rank returns or raises; collective."""
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
    """DeepSpeed reads these whatever initialised the process group."""
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
