"""Which process of how many this is, read from the launcher's environment before anything heavy is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Launch:
    rank: int
    world_size: int
    local_rank: int
    kind: Literal["environment", "mpi", "single"]
    local_world_size: int = 1  # ranks on this node


def detect_launch() -> Launch:
    """torchrun and the `deepspeed` launcher set RANK, WORLD_SIZE, LOCAL_RANK; mpirun sets its own; else one process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Launch(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", 0)),
            "environment",
            int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", 1))),
        )
    if "OMPI_COMM_WORLD_SIZE" in env:
        return Launch(
            int(env["OMPI_COMM_WORLD_RANK"]),
            int(env["OMPI_COMM_WORLD_SIZE"]),
            int(env["OMPI_COMM_WORLD_LOCAL_RANK"]),
            "mpi",
            int(env["OMPI_COMM_WORLD_LOCAL_SIZE"]),
        )
    if "PMI_SIZE" in env:  # MPICH and its descendants
        local_rank, local_size = env.get("MPI_LOCALRANKID", "0"), env.get("MPI_LOCALNRANKS", "1")
        return Launch(int(env["PMI_RANK"]), int(env["PMI_SIZE"]), int(local_rank), "mpi", int(local_size))
    return Launch(0, 1, 0, "single")
