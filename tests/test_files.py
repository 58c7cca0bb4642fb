"""Files that are whole or not there."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmoe_dist.errors import UserError
from diffmoe_dist.files import AppendedFile, beside, full_disk_told
from tests.machine import ROOT


@pytest.fixture
def files_of_100_bytes() -> Iterator[None]:
    """A limit of this process stands for a disk that is full: a write is cut off there, and the next one fails."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_piece_that_does_not_fit_leaves_the_file_as_it_was_and_smaller_ones_can_follow(
    tmp_path: Path, files_of_100_bytes: None
) -> None:
    file = AppendedFile(tmp_path / "file")
    file.append(b"a" * 60)
    with pytest.raises(OSError, match="No space left on device"):
        file.append(b"b" * 60)
    file.append(b"c" * 40)
    file.close()
    assert (tmp_path / "file").read_bytes() == b"a" * 60 + b"c" * 40


def test_a_full_disk_is_one_line_with_what_the_user_named_and_other_errors_are_left() -> None:
    told = r"^run_dir=a: /b: No space left on device; make space and run the same command again$"
    with pytest.raises(UserError, match=told), full_disk_told("run_dir=a"):
        raise OSError(errno.ENOSPC, "No space left on device", "/b")
    with pytest.raises(UserError, match=r"^Disk quota exceeded; make space"), full_disk_told():
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(PermissionError), full_disk_told():
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    ("main", "code"), [("return 0", 0), ("raise UserError('a')", 2), ("raise OSError(28, 'No space')", 2)]
)
def test_the_exit_code_holds_where_standard_error_is_on_a_full_disk(main: str, code: int) -> None:
    program = f"""
import sys
from diffmoe_dist.command import run_command
from diffmoe_dist.errors import UserError
def main():
    {main}
run_command(main)
"""
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", program], stderr=full, cwd=ROOT).returncode == code


def test_a_file_beside_a_folder_is_found_also_for_the_folders_that_have_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert beside(Path("samples/png"), "scores.json") == Path("samples/scores.json")
    assert beside(Path("."), "scores.json") == tmp_path / "above" / "scores.json"
    assert beside(Path(".."), "scores.json") == tmp_path / "scores.json"
