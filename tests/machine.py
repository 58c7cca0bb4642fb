"""What the tests take from this machine: the clone, time, and ports that nobody else is given."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="needs mpirun: an MPI library (Debian: openmpi-bin)"
)
TIME_LIMIT = 300.0  # seconds for a command that takes a few: other work may keep the machine busy

# Below those that Linux gives to outgoing connections (net.ipv4.ip_local_port_range starts at 32768), and above those
# that slurm/common.sh and people choose.
_FIRST_PORT, _LAST_PORT = 32100, 32699
_taken: dict[int, socket.socket] = {}  # ports that this process has given away


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free, and that no other caller on this machine is given while this process runs.

    A port that was merely found free could be given to another test, or to an outgoing connection, before it is used.
    """
    count = _LAST_PORT - _FIRST_PORT + 1
    for number in range(count):
        port = _FIRST_PORT + (os.getpid() * 7 + number) % count
        if port in _taken:
            continue
        mark = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            try:
                mark.bind(f"\0diffmoe_dist tests, port {port}")  # a name without a file, gone with this process
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
            except OSError:
                mark.close()
                continue
        _taken[port] = mark
        return port
    raise RuntimeError(f"no free port from {_FIRST_PORT} to {_LAST_PORT}")
