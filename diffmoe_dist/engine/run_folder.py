"""Make a run folder; who may write to it, and the marks in it that scripts read and leave.

    RUN_DIR/lock      held by the first rank of the run that is going on
    RUN_DIR/attempt   which attempt that is; only it may publish checkpoints
    RUN_DIR/STOP      made by a script or a person: the run saves and leaves, as on a signal
    RUN_DIR/DONE      made by the run when train.steps is reached and saved

A lock alone is not enough: a node that the network has cut off holds its lock, or believes it does, while the scheduler
starts the job again elsewhere. So the newer attempt of the same job writes its name over the older one's, and the older
one finds that out before it publishes a checkpoint.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from diffmoe_dist.config import Config
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import lock_file, make_writable, refuse_irregular, write_atomically
from diffmoe_dist.parallel.topology import on_first_rank

ATTEMPT_VARIABLE = "DIFFMOE_ATTEMPT"  # JOB.RESTARTS of a scheduler that restarts jobs


def prepare_run_dir(config: Config) -> None:
    """Make the run folder, before anything is computed for it.

    Raises:
        UserError: it cannot be made or written to.
    """
    make_writable(Path(config.run_dir), f"run_dir={config.run_dir}")


class Claim(Protocol):
    """A run's right to its folder. The first rank has one; that of the others has nothing to do."""

    def stop_asked(self) -> bool:
        """Whether somebody has made the file STOP."""
        ...

    def check(self) -> None:
        """Raises UserError when a newer attempt has taken over."""
        ...

    def mark_going_on(self) -> None:
        """Take DONE away: there are steps to take."""
        ...

    def mark_done(self, step: int) -> None: ...

    def release(self) -> None: ...


class FolderClaim:
    def __init__(self, run_dir: Path, attempt: str, lock: int | None) -> None:
        self.run_dir = run_dir
        self.attempt = attempt
        self._lock = lock  # a file descriptor

    def stop_asked(self) -> bool:
        return (self.run_dir / "STOP").exists()

    def check(self) -> None:
        holder = _read_attempt(self.run_dir)
        if holder != self.attempt:
            raise UserError(
                f"run_dir={self.run_dir}: another attempt has taken over ({holder}, this is {self.attempt}); "
                "nothing more is written by this one"
            )
        if self._lock is None:  # an attempt before, which this one has taken over, may have ended since
            with suppress(BlockingIOError):
                self._lock = lock_file(self.run_dir / "lock")

    def mark_going_on(self) -> None:
        (self.run_dir / "DONE").unlink(missing_ok=True)

    def mark_done(self, step: int) -> None:
        self.check()
        write_atomically(self.run_dir / "DONE", json.dumps({"step": step}) + "\n")

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class NoClaim:
    """The claim of every rank but the first, and of runs that no other can take over."""

    def stop_asked(self) -> bool:
        return False

    def check(self) -> None: ...

    def mark_going_on(self) -> None: ...

    def mark_done(self, step: int) -> None: ...

    def release(self) -> None: ...


def claim_run_dir(run_dir: Path) -> Claim:
    """Make this run the one that writes to a run folder, which exists; collective.

    Raises:
        UserError: another run is using it; on every rank.
    """
    claims: list[Claim] = []
    on_first_rank(lambda: claims.append(_claim(run_dir)))
    return claims[0] if claims else NoClaim()


def _claim(run_dir: Path) -> FolderClaim:
    attempt = os.environ.get(ATTEMPT_VARIABLE) or secrets.token_hex(8)
    before = _read_attempt(run_dir)
    if _is_later_restart(before, attempt):
        raise UserError(f"run_dir={run_dir}: another attempt has taken over ({before}, this is {attempt})")
    lock = None
    try:
        lock = lock_file(run_dir / "lock")
    except BlockingIOError:
        if not _is_later_restart(attempt, before):
            raise UserError(
                f"run_dir={run_dir}: another run is using it (attempt {before}); wait for its end or choose another "
                "run_dir"
            ) from None
    write_atomically(run_dir / "attempt", attempt + "\n")
    return FolderClaim(run_dir, attempt, lock)


def _is_later_restart(attempt: str | None, before: str | None) -> bool:
    """Whether the first is a later restart of the same job: 4711.2 after 4711.1."""
    job, _, restart = (attempt or "").rpartition(".")
    other_job, _, other_restart = (before or "").rpartition(".")
    if not (job and job == other_job and restart.isdecimal() and other_restart.isdecimal()):
        return False
    return int(restart) > int(other_restart)


def _read_attempt(run_dir: Path) -> str | None:
    try:
        return refuse_irregular(run_dir / "attempt").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
