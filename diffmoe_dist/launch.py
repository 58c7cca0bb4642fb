"""Which process of how many this is, read from the launcher's environment before anything heavy is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from diffmoe_dist.errors import UserError


@dataclass(frozen=True)
class Launch:
    rank: int
    world_size: int
    local_rank: int
    kind: Literal["environment", "mpi", "slurm", "single"]
    local_world_size: int = 1  # ranks on this node


def detect_launch() -> Launch:
    """torchrun and the `deepspeed` launcher set RANK and WORLD_SIZE; mpirun and srun have their own; else one process.

    Raises:
        UserError: a launcher's variable is missing, is not a number, or says what no launcher says.
    """
    try:
        launch = _detect()
    except (KeyError, ValueError) as error:
        raise UserError(
            f"a launcher's variable (RANK, WORLD_SIZE, ...) is missing or damaged: {error}; unset or repair it"
        ) from None
    if not 0 <= launch.rank < launch.world_size or launch.local_rank < 0 or launch.local_world_size < 1:
        raise UserError(
            f"the launcher's variables say rank {launch.rank} of {launch.world_size}, on this node {launch.local_rank} "
            f"of {launch.local_world_size}: ranks count from 0 and are below their number; unset or repair them"
        )
    return launch


def _detect() -> Launch:
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
    if "MPI_LOCALRANKID" in env:  # MPICH and its descendants
        return Launch(
            int(env["PMI_RANK"]),
            int(env["PMI_SIZE"]),
            int(env["MPI_LOCALRANKID"]),
            "mpi",
            int(env["MPI_LOCALNRANKS"]),
        )
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        local_size = int(env["SLURM_STEP_TASKS_PER_NODE"].split(",")[0].split("(")[0])
        return Launch(
            int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]), "slurm", local_size
        )
    for alone, missing, harmless in (("RANK", "WORLD_SIZE", "0"), ("WORLD_SIZE", "RANK", "1")):
        if env.get(alone, harmless) != harmless:  # else every process would be a run of its own
            raise UserError(f"{alone}={env[alone]} is set, but {missing} is not; set both, or unset it")
    return Launch(0, 1, 0, "single")
