"""How every command reads its arguments and ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffmoe_dist.command import CommandParser
from tests.commands import ENV
from tests.machine import ROOT, TIME_LIMIT


def test_an_option_that_is_given_twice_is_told_and_the_last_one_counts(caplog: pytest.LogCaptureFixture) -> None:
    parser = CommandParser(prog="test")
    parser.add_argument("--num", "-n", type=int, default=8)
    parser.add_argument("--interval", type=float, nargs=2)
    parser.add_argument("overrides", nargs="*")
    found = parser.parse_intermixed_args(
        ["--num", "8", "a=1", "-n", "4", "--interval", "0", "1", "--interval", "0", "1", "b=2"]
    )
    assert (found.num, found.interval, found.overrides) == (4, [0.0, 1.0], ["a=1", "b=2"])
    assert caplog.messages == ["-n is given twice, as 8 and as 4; the last one counts"]


PROGRAM = """
import os, sys
from pathlib import Path
from diffmoe_dist.command import run_command
run_command(lambda: {action})
"""


@pytest.mark.parametrize(
    ("action", "code", "told"),
    [
        ("Path('x' * 5000).read_text()", 2, "File name too long; check the path and its permissions"),
        ("Path('.').read_text()", 2, "error: '.': Is a directory; check the path and its permissions"),
        ("Path('README.md/x').exists() or open('README.md/x')", 2, "error: 'README.md/x': Not a directory;"),
        ("Path('/sys/x').write_text('')", 2, "error: '/sys/x': "),
        ("bytearray(2**62)", 2, "error: not enough memory (for what is asked); ask for less"),
        ("Path('README.md').mkdir()", 2, "error: 'README.md': File exists; check the path and its permissions"),
        ("open('/nowhere')", 1, "FileNotFoundError"),  # a fault, where no command has looked before
        ("[].pop()", 1, "IndexError: pop from empty list"),
    ],
)
def test_a_path_that_cannot_be_used_and_too_little_memory_are_one_line(action: str, code: int, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(action=action)],
        cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIME_LIMIT,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert (len(done.stderr.splitlines()) == 1) == (code == 2)
