"""Files that are whole or not there, and their sums."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffmoe_dist.errors import UserError

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # some network file systems
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROOF = 1 << 16  # bytes that must fit into a folder that is to be written to
PARTIAL = ".partial"  # at the end of a file's name while it is written


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is complete and on the disk, also after a power cut."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


class AppendedFile:
    """A file that grows by whole pieces: of one for which there is no space, nothing stays. One process writes it."""

    def __init__(self, path: Path) -> None:
        self._file = refuse_irregular(path).open("ab", buffering=0)

    def append(self, piece: bytes) -> None:
        """Raises OSError when the piece cannot be written; the file is then as it was."""
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(piece) != len(piece):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(before)
            raise

    def close(self) -> None:
        self._file.close()


@contextmanager
def full_disk_told(named: str = "") -> Iterator[None]:
    """A disk or quota that is full is no fault of the program: one line, with what the user named."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        what = ": ".join(part for part in (named, error.filename and str(error.filename), error.strerror) if part)
        raise UserError(f"{what}; make space and run the same command again") from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file as `atomic_file` does; text in UTF-8."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, as `atomic_file` does. Raises ValueError for NaN, which JSON has not."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as `numpy.savez` and `atomic_file` do."""
    with atomic_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def lock_file(path: Path) -> int | None:
    """Take the lock of a file, which is made; it ends with this process, or with `os.close` of what is returned.

    None on file systems that know no locks.

    Raises:
        BlockingIOError: another process has it.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # A POSIX lock, which processes that are forked do not inherit.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno in _NO_LOCKS_HERE:
            return None
        raise BlockingIOError(error.errno, "another process has the lock", str(path)) from None
    return lock


def flush_directory(path: Path) -> None:
    """Bring the names in a folder to the disk: those of files that were made, renamed or removed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_writable(folder: Path, named: str) -> None:
    """Make a folder and prove that files can be written there.

    Args:
        named: how the user named the folder, as `--out FOLDER`.

    Raises:
        UserError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # an empty file also fits on a full disk
            file.write(bytes(_PROOF))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "make space, or choose another" if error.errno in _FULL else "choose another"
        raise UserError(f"{named}: cannot be written ({error.strerror}); {remedy}") from None


def beside(path: Path, name: str) -> Path:
    """The path with this name in the folder that a file or folder lies in, be that `.` or `..`."""
    return (path if path.name not in ("", "..") else Path(os.path.abspath(path))).with_name(name)


def refuse_irregular(path: Path) -> Path:
    """The path. Raises OSError for a pipe, which would be waited for, a device or a socket."""
    if not (path.is_file() or path.is_dir()) and path.exists():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def read_json_object(path: Path) -> dict[str, Any]:
    """What a file of a JSON object holds. Raises OSError, and ValueError for what is no such thing."""
    try:
        found = json.loads(refuse_irregular(path).read_bytes())
    except RecursionError:
        raise ValueError("nested deeper than Python goes") from None
    if not isinstance(found, dict):
        raise ValueError("holds no object")
    return found


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises OSError, also for what is no regular file."""
    digest = hashlib.sha256()
    refuse_irregular(path)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def refuse_pointer(path: Path, named: str | None = None) -> None:
    """Refuse the few lines that Git keeps in the place of a large file, and pipes and devices.

    Args:
        named: how the user named the folder that the file lies in; None: the path says enough.

    Raises:
        UserError: it is such a thing. A folder, or no file at all, is left to who reads it.
    """
    where = str(path) if named is None else f"{named}: {path.name}"
    try:
        refuse_irregular(path)
        if path.is_file():
            with path.open("rb") as file:
                if file.read(40).startswith(b"version https://git-lfs"):
                    raise UserError(f"{where} is a pointer of Git LFS, not the file itself; run git lfs pull")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); fetch it again") from None


def is_utf8(text: str) -> bool:
    """Whether a string can be written: JSON and command lines can smuggle in half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def format_bytes(number: float) -> str:
    """A number of bytes for people, such as 1.23 GB (10^9 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
