from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from data_tools.parallel import SERIAL, make_workers
from diffmoe_dist.errors import UserError
from tests.machine import ROOT, TIME_LIMIT, needs_mpirun

pytestmark = pytest.mark.slow


# What a rank of the real command does, with a job that goes wrong on one of them.
_PROGRAM = """
import os, sys
from data_tools.parallel import make_workers
from diffmoe_dist.command import run_command

def job(number):
    if number == 3 and sys.argv[1] == "raises":
        raise OSError("the disk of job 3 is gone")
    if number == 3:
        os.kill(os.getpid(), 9)
    return number

def main():
    with make_workers(1) as workers:
        if workers is not None:
            print("sum", sum(workers.run(job, range(10))))

if __name__ == "__main__":
    run_command(main)
"""


def _square(number: int) -> int:
    return number * number


def _fail(number: int) -> int:
    if number == 3:
        raise OSError("the disk of job 3 is gone")
    return number


def _die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), 9)
    return number


def test_every_job_is_done_once() -> None:
    with make_workers(2) as workers:
        assert workers is not None
        assert sorted(workers.run(_square, range(20))) == [number * number for number in range(20)]
    assert list(SERIAL.run(_square, range(3))) == [0, 1, 4]


def test_jobs_are_taken_as_workers_get_free_not_all_at_once() -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    with make_workers(2) as workers:
        assert workers is not None
        next(workers.run(_square, jobs()))
    assert len(taken) <= 5


def test_an_error_in_a_job_is_raised_and_a_process_that_dies_is_one() -> None:
    for function, kind in ((_fail, OSError), (_die, BrokenProcessPool)):
        with make_workers(2) as workers, pytest.raises(kind):
            assert workers is not None
            list(workers.run(function, range(50)))


def _mpirun(tmp_path: Path, how: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "program.py").write_text(_PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [
        "mpirun",
        "--oversubscribe",
        "-n",
        "3",
        sys.executable,
        "-m",
        "mpi4py",
        str(tmp_path / "program.py"),
        how,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)


@needs_mpirun
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_rank_that_fails_ends_the_mpi_job_with_its_error(tmp_path: Path, how: str) -> None:
    done = _mpirun(tmp_path, how)  # which ends within its time limit
    assert done.returncode != 0
    assert "sum" not in done.stdout
    assert ("the disk of job 3 is gone" if how == "raises" else "signal 9") in done.stderr


@needs_mpirun
def test_mpirun_without_mpi4py_is_refused_before_every_rank_writes_the_same_files(tmp_path: Path) -> None:
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, "-m", "data_tools", "pack", "digits"]
    done = subprocess.run(
        [*command, str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "use: mpirun -n N python -m mpi4py -m data_tools" in done.stderr
    assert not (tmp_path / "out").exists()


@needs_mpirun
def test_a_launcher_that_does_not_speak_to_the_mpi_library_is_refused(tmp_path: Path) -> None:
    # What srun with the wrong --mpi gives: every task is alone, and would pack everything.
    slurm = {"STEP_ID": "0", "STEP_NUM_TASKS": "4", "PROCID": "0", "LOCALID": "0", "STEP_TASKS_PER_NODE": "4"}
    done = subprocess.run(
        [sys.executable, "-m", "mpi4py", "-m", "data_tools", "pack", "digits", str(tmp_path / "out")],
        cwd=ROOT, env=os.environ | {f"SLURM_{name}": value for name, value in slurm.items()},
        capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "started 4 times, but MPI connects 1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_mpi4py_is_imported_only_when_asked_for() -> None:
    program = "import sys, data_tools.__main__; sys.exit('mpi4py' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=TIME_LIMIT, check=False).returncode == 0


def test_a_number_of_workers_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="--workers=0"), make_workers(0):
        pass
