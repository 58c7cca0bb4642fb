"""Jobs over processes or MPI ranks, or in this process: the same results, in whatever order they are done."""

from __future__ import annotations

import copy
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import detect_launch

_J = TypeVar("_J")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Workers:
    """Who does the jobs. Without an executor this process does them, one after the other."""

    executor: Executor | None = None
    count: int = 1

    def run(self, function: Callable[[_J], _R], jobs: Iterable[_J]) -> Iterator[_R]:
        """What `function(job)` returns, as the jobs get done. Jobs are taken when a worker is nearly free for them.

        An exception in a job is raised here; jobs that have not begun are then dropped.
        """
        if self.executor is None:
            yield from map(function, jobs)
            return
        pending: set[Future[_R]] = set()
        try:
            for job in jobs:
                pending.add(self.executor.submit(function, job))
                if len(pending) >= 2 * self.count:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in pending:
                future.cancel()


SERIAL = Workers()


@contextmanager
def make_workers(num_processes: int) -> Iterator[Workers | None]:
    """Processes of this machine, or the ranks of `mpirun -n N python -m mpi4py -m data_tools`.

    Under MPI rank 0 hands out the work and does its share; on the others this yields None when all of it is done.
    Raises UserError where the number of processes makes no sense.
    """
    if num_processes < 1:
        raise UserError(f"--workers={num_processes}: must be at least 1; one for each core is usual")
    if "mpi4py" in sys.modules:  # imported only by `-m mpi4py`
        if num_processes > 1:
            raise UserError(f"--workers={num_processes}: MPI ranks do the work; give mpirun more ranks instead")
        with _mpi_workers() as workers:
            yield workers
        return
    if detect_launch().world_size > 1:
        raise UserError(
            f"started {detect_launch().world_size} times, and each process would do all of the work; "
            "use: mpirun -n N python -m mpi4py -m data_tools ..."
        )
    if num_processes == 1:
        yield SERIAL
        return
    context = multiprocessing.get_context("spawn")  # not forked: this process may run threads
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_leave_signals) as executor:
        yield Workers(executor, num_processes)


@contextmanager
def _mpi_workers() -> Iterator[Workers | None]:
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    started = detect_launch().world_size
    try:
        if MPI.COMM_WORLD.size < started:
            raise UserError(
                f"started {started} times, but MPI connects {MPI.COMM_WORLD.size}: the launcher does not speak to this "
                "MPI library; with srun try --mpi=pmix or --mpi=pmi2, or use the library's own mpirun"
            )
        executor: Any
        with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
            if executor is None:
                yield None
            elif MPI.COMM_WORLD.size == 1:
                yield SERIAL
            else:
                with _WithThisRank(executor) as all_ranks:
                    yield Workers(all_ranks, MPI.COMM_WORLD.size)
    finally:
        MPI.Finalize()  # the command leaves through os._exit, which mpirun would take for a crash


class _WithThisRank(Executor):
    """The other MPI ranks and a thread of this one, which gets a job whenever it is idle: no GPU goes without."""

    def __init__(self, others: Executor) -> None:
        self._others = others
        self._thread = ThreadPoolExecutor(1)
        self._own: Future[Any] | None = None

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._own is not None and not self._own.done():
            return self._others.submit(function, *args, **kwargs)
        # A copy, as the other ranks get one: what a job holds, such as open files, is not the main thread's.
        args, kwargs = copy.deepcopy((args, kwargs))
        self._own = self._thread.submit(function, *args, **kwargs)
        return self._own

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._thread.shutdown(wait, cancel_futures=cancel_futures)  # the others end with their own executor


def _leave_signals() -> None:
    # Ctrl-C reaches every process; the first one ends the workers, which finish the shard they are writing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
