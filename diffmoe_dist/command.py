"""What every command does alike: read its arguments, and end the way the contract promises."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from diffmoe_dist.errors import USER_ERROR_EXIT_CODE, UserError
from diffmoe_dist.files import full_disk_told
from diffmoe_dist.launch import detect_launch
from diffmoe_dist.logs import logger

# Launchers end all processes when one has ended: of a mistake that all make, the first process of a node tells, and the
# others are ended while they wait. One that is still there afterwards is alone with its mistake, and tells it.
_SECONDS_TO_SPEAK = 5.0

# Of a path that the user has named, or that lies below one.
_OF_A_FILE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.EINVAL,
)  # fmt: skip


class _Store(argparse.Action):
    """Stores a value, the last one where an option is given twice; and says so."""

    _given: Any = None

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if option is not None:
            if self._given not in (None, values):
                logger.warning("%s is given twice, as %s and as %s; the last one counts", option, self._given, values)
            self._given = values
        setattr(namespace, self.dest, values)


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        for name in (None, "store"):
            self.register("action", name, _Store)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and end the process the way the contract promises.

    A `UserError` becomes one line on standard error and exit code 2, without a traceback, of which the first process of
    a node speaks, the others only where it does not; so does a path that cannot be used, or too little memory.
    Numbers that are not finite end in one line and exit code 1; any other exception is a fault, with its traceback and
    exit code 1 (130 for Ctrl-C).

    Args:
        main: returns the exit code; None is 0.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes need not be text
    if not _is_first_of_node():
        logger.addHandler(logging.NullHandler())  # until the command sets up logging: what all say is said once
    try:
        with full_disk_told():
            code = main()
    except SystemExit:  # --help
        raise
    except KeyboardInterrupt:
        _exit(130)
    except FloatingPointError as error:  # of the model's numbers, not of the program
        _tell(error)
        _exit(1)
    except BaseException as error:
        mistake = _mistake(error)
        if mistake is None:
            traceback.print_exc()
            _exit(1)
        if not _is_first_of_node():
            time.sleep(_SECONDS_TO_SPEAK)
        _tell(mistake)
        _exit(USER_ERROR_EXIT_CODE)
    _exit(code or 0)


def _mistake(error: BaseException) -> UserError | None:
    """What the user can fix, if it is that."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.filename and error.errno in _OF_A_FILE:
        return UserError(f"{os.fsdecode(error.filename)!r}: {error.strerror}; check the path and its permissions")
    if isinstance(error, MemoryError):
        return UserError(
            f"not enough memory ({str(error) or 'for what is asked'}); ask for less, as by a smaller batch"
        )
    return None


def _is_first_of_node() -> bool:
    try:
        return detect_launch().local_rank == 0
    except UserError:
        return True  # a launcher's damaged variable is a mistake to tell, too


def _tell(error: Exception) -> None:
    with contextlib.suppress(OSError):  # standard error on a full disk; the exit code still tells
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")


def _exit(code: int) -> NoReturn:
    # Leaving through os._exit skips the C++ static destructors: gloo's threads may still be unwinding after
    # destroy_process_group, and a std::thread that is destroyed while joinable aborts a finished run.
    sys.stdout.flush()
    with contextlib.suppress(OSError):  # as above
        sys.stderr.flush()
    os._exit(code)
