"""The one kind of error a user is meant to read, and how every command ends on it."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

USER_ERROR_EXIT_CODE = 2
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: run the same command again
HANG_EXIT_CODE = 124  # as of timeout(1)


class UserError(Exception):
    """A mistake the user can fix. The message is one line: the setting, its value, the remedy."""


# Launchers end all processes when one has ended: those that are silent about a mistake let the first one tell it.
_SECONDS_TO_SPEAK = 5.0


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and end the process the way the contract promises.

    A `UserError` becomes one line on standard error and exit code 2, without a traceback, of which only the first
    process of a node speaks; any other exception is a fault, with its traceback and exit code 1 (130 for Ctrl-C).

    Args:
        main: returns the exit code; None is 0.
    """
    try:
        code = main()
    except SystemExit:  # --help
        raise
    except KeyboardInterrupt:
        _exit(130)
    except UserError as error:
        if _is_first_of_node():
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        else:
            time.sleep(_SECONDS_TO_SPEAK)
        _exit(USER_ERROR_EXIT_CODE)
    except BaseException:
        traceback.print_exc()
        _exit(1)
    _exit(code or 0)


def _is_first_of_node() -> bool:
    from diffmoe_dist.launch import detect_launch  # which has mistakes of its own to tell

    try:
        return detect_launch().local_rank == 0
    except UserError:
        return True


def _exit(code: int) -> NoReturn:
    # Leaving through os._exit skips the C++ static destructors: gloo's threads may still be unwinding after
    # destroy_process_group, and a std::thread that is destroyed while joinable aborts a finished run.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
