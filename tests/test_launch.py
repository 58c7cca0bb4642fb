from __future__ import annotations

import os

import pytest

from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch, detect_launch

ENVIRONMENTS = {
    "one process": ({}, Launch(0, 1, 0, "single")),
    "torchrun": (
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
        Launch(9, 16, 1, "environment", 8),
    ),
    "deepspeed": (
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"},
        Launch(9, 16, 1, "environment", 8),
    ),
    "Open MPI": (
        {
            "OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
        },
        Launch(9, 16, 1, "mpi", 8),
    ),
    "MPICH": (
        {"PMI_RANK": "9", "PMI_SIZE": "16", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8"},
        Launch(9, 16, 1, "mpi", 8),
    ),
    "srun": (
        {
            "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1",
            "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        },
        Launch(9, 16, 1, "slurm", 8),
    ),
    "the batch script of a Slurm job": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, Launch(0, 1, 0, "single")),
}  # fmt: skip


@pytest.mark.parametrize("launcher", ENVIRONMENTS)
def test_the_launch_is_read_from_the_environment_of(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, expected = ENVIRONMENTS[launcher]
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert detect_launch() == expected


def test_a_damaged_variable_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK, WORLD_SIZE"):
        detect_launch()


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "-1", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "3", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "0"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
    ],
    ids=str,
)
def test_variables_that_no_launcher_sets_are_a_users_error(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="unset (or repair|it)"):
        detect_launch()
