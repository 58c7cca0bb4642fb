"""The one kind of error a user is meant to read, and how every command ends on it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from diffmoe_dist.launch import detect_launch

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """A mistake the user can fix. The message is one line: the setting, its value, the remedy."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's main function and end the process the way the contract promises.

    A `UserError` becomes one line on standard error and exit code 2, without a traceback; anything else is a
    fault and keeps its traceback and Python's exit code 1. Of the processes of a node only the first speaks.
    """
    try:
        main()
    except UserError as error:
        if detect_launch().local_rank == 0:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        _exit(USER_ERROR_EXIT_CODE)
    _exit(0)


def _exit(code: int) -> NoReturn:
    # Leaving through os._exit skips the C++ static destructors: gloo's threads may still be unwinding after
    # destroy_process_group, and a std::thread that is destroyed while joinable aborts a finished run.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
