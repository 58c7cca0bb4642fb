"""End the ranks of a run that cannot go on: a rank that hangs, and every rank once one of them has failed.

A collective whose peer is stuck or gone blocks until its timeout, or for ever inside a library. So each rank has two
threads that watch it:

- `Watchdog` ends this process with exit code 124 when a deadline has passed, and writes the stacks of its threads.
- `abort_all_on_failure` polls the store of the process group for the failure of another rank, and ends this process
  with that rank's exit code. (With gloo the peers of a dead process fail by themselves, as its connections close;
  with NCCL they wait.)
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from diffmoe_dist.errors import HANG_EXIT_CODE, USER_ERROR_EXIT_CODE, UserError
from diffmoe_dist.logs import logger

SLOW_FACTOR = 3  # start-up, sampling and saving may take this many times train.hang_timeout

_FAULT = "diffmoe_dist/fault"  # key in the store: EXIT_CODE RANK MESSAGE
_POLL_SECONDS = 0.5
# Between the first sign of trouble and this process's end: meanwhile the other ranks write their own stacks or errors.
_GRACE_SECONDS = 2.0


def collective_timeout(hang_timeout: float) -> timedelta:
    """The timeout of collectives: later than any deadline of the watchdog, whose message says more."""
    return timedelta(seconds=2 * SLOW_FACTOR * hang_timeout if hang_timeout else 7 * 24 * 3600)


class Watchdog:
    """Ends this process when a deadline has passed.

    The stacks go to `log`, or to standard error as long as its folder is not there.
    """

    def __init__(self, hang_timeout: float, log: Path) -> None:
        """
        Args:
            hang_timeout: seconds that one step may take; 0: no limit.
        """
        self.hang_timeout = hang_timeout
        self.log = log
        self._what, self._allowed, self._deadline = "", 0.0, float("inf")
        self._ended, self._leaving = threading.Event(), threading.Event()
        if hang_timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @classmethod
    def off(cls) -> Watchdog:
        return cls(0, Path())

    def set_deadline(self, what: str, factor: float = 1) -> None:
        """Replace the deadline: what begins now may take `factor` times the hang timeout."""
        if self.hang_timeout:
            self._what, self._allowed = what, factor * self.hang_timeout
            self._deadline = time.monotonic() + self._allowed
            # In C, for a thread that keeps Python's lock while it hangs. It cannot choose the exit code.
            faulthandler.dump_traceback_later(self._allowed + 5 * _GRACE_SECONDS, exit=True)

    def stop(self) -> None:
        self._ended.set()
        if self.hang_timeout:
            faulthandler.cancel_dump_traceback_later()

    def wait_if_ending(self) -> None:
        """After an error: wait for the exit if the watchdog is ending this process already.

        The error is then a consequence: another rank hung too, and its watchdog ended it a moment earlier.
        """
        if self._leaving.is_set():
            threading.Event().wait()  # for the exit

    def _watch(self) -> None:
        while not self._ended.wait(min(_POLL_SECONDS, self.hang_timeout / 10)):
            if time.monotonic() > self._deadline:
                self._end()

    def _end(self) -> None:
        self._leaving.set()
        message = f"{self._what} has not ended after {self._allowed:g} seconds (train.hang_timeout): leaving\n"
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # a full disk must not keep it from leaving
            file = stack.enter_context(open(self.log, "a")) if self.log.parent.is_dir() else sys.stderr
            file.write(message)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            if file is not sys.stderr:
                sys.stderr.write(f"{message.rstrip()}; the stacks are in {self.log}\n")
                sys.stderr.flush()
        time.sleep(_GRACE_SECONDS)
        os._exit(HANG_EXIT_CODE)


@contextlib.contextmanager
def abort_all_on_failure(watchdog: Watchdog) -> Iterator[None]:
    """An exception inside on one rank ends all ranks within seconds; the process group is initialised."""
    rank = dist.get_rank()
    if dist.get_world_size() == 1:
        yield
        return
    # A connection of its own: the other one may be waiting inside a call.
    default_store: Any = dist.distributed_c10d._get_default_store()
    store = default_store.clone()
    ended = threading.Event()
    threading.Thread(target=_watch_other_ranks, args=(store, rank, ended), name="watch others", daemon=True).start()
    try:
        yield
    except BaseException as error:
        watchdog.wait_if_ending()
        ended.set()
        first = _report_failure(store, rank, error)
        if logger.handlers:  # the logs are there: for those who look into this rank's
            logger.error("rank %d failed: %s: %s", rank, type(error).__name__, error)
        if first is not None:
            if logger.handlers:
                logger.error("%s had failed before", first[1])
            if first[0] == USER_ERROR_EXIT_CODE and not isinstance(error, UserError):
                raise UserError(first[1]) from error
        raise
    finally:
        ended.set()


def _report_failure(store: Any, rank: int, error: BaseException) -> tuple[int, str] | None:
    """Leave the error for the others, unless one of them has been first: then returns that one's."""
    code = USER_ERROR_EXIT_CODE if isinstance(error, UserError) else 1
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    mine = f"{code} rank {rank}: {kind}{error}"
    with contextlib.suppress(RuntimeError):  # the store has gone with its rank; the error at hand matters more
        found = store.compare_set(_FAULT, "", mine).decode()
        if found != mine:
            return _parse(found)
    return None


def _watch_other_ranks(store: Any, rank: int, ended: threading.Event) -> None:
    while not ended.wait(_POLL_SECONDS):
        try:
            if not store.check([_FAULT]):
                continue
            code, message = _parse(store.get(_FAULT).decode())
        except RuntimeError:
            code, message = 1, "the rank that keeps the store has ended"
        # Usually the fault reaches this rank's own collectives too, and its main thread has a longer message.
        if not ended.wait(_GRACE_SECONDS):
            logger.error("leaving because another rank failed: %s", message)
            if code == USER_ERROR_EXIT_CODE and rank == 0:
                sys.stderr.write(f"error: {message}\n")
            sys.stderr.flush()
            os._exit(code)


def _parse(fault: str) -> tuple[int, str]:
    code, _, message = fault.partition(" ")
    return int(code), message
