"""Where the package's messages go: to the terminal of the first rank, and to a file of each rank."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger("diffmoe_dist")
SECONDS_BETWEEN_LINES = 10.0


def set_up_logging(run_dir: Path | None, rank: int) -> None:
    """Every rank logs to logs/rank-N.log; the first one also to the terminal, where a bar does not take its place.

    Args:
        run_dir: None for a command without log files.
    """
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = []
    if run_dir is not None:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(run_dir / "logs" / f"rank-{rank}.log"))
    if rank == 0 and not sys.stderr.isatty():
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def failed_log_lines() -> int:
    """How many lines could not be written to this rank's log file."""
    return sum(handler.failed for handler in logger.handlers if isinstance(handler, _LogFile))


class _LogFile(logging.FileHandler):
    """Counts the lines that it cannot write, and says so once, on standard error."""

    failed = 0

    def _open(self) -> io.TextIOWrapper:
        # No buffer: what is left in one after a failure would fail again at the close.
        raw = open(self.baseFilename, "ab", buffering=0)  # noqa: SIM115
        return io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.failed += 1
        if self.failed == 1:
            with contextlib.suppress(OSError):  # standard error may be a file on the same disk
                sys.stderr.write(f"{self.baseFilename}: {error.strerror}; lines are lost there until there is space\n")


class ProgressLog:
    """Shows how many images there are: a bar on a terminal, else a line now and then; on the first rank."""

    def __init__(self, total: int, there: int, shown: bool) -> None:
        self.shown = shown
        self.total, self.there, self.before = total, there, there
        on_terminal = shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=there, unit="image", disable=not on_terminal, dynamic_ncols=True)
        self.begun = time.perf_counter()
        self.last_line = -SECONDS_BETWEEN_LINES

    def __enter__(self) -> ProgressLog:
        if self.shown and self.there:
            logger.info("%d of %d images are there already", self.there, self.total)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def advance(self, images: int) -> None:
        self.there += images
        self.bar.update(images)
        seconds = time.perf_counter() - self.begun
        if self.shown and (seconds - self.last_line >= SECONDS_BETWEEN_LINES or self.there == self.total):
            self.last_line = seconds
            rate = (self.there - self.before) / seconds
            left = tqdm.format_interval((self.total - self.there) / rate)
            logger.info("%d/%d images  %.1f images/s  %s left", self.there, self.total, rate, left)
