"""The parent of all processes of one virtual node: `python node.py`, started by cluster.py.

Reads lines of JSON, `{"command": [...], "log": FILE}`, and starts each command. When its standard input closes, because
the test has closed it or has died, the node ends with everything on it. In a namespace of process ids it is number 1,
and the kernel takes the rest along; elsewhere orphans become its children (PR_SET_CHILD_SUBREAPER), so it finds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    threading.Thread(target=bury_the_dead, daemon=True).start()
    sys.stdout.write("up\n")
    sys.stdout.flush()
    for line in sys.stdin:
        order = json.loads(line)
        with open(order["log"], "ab") as log:
            subprocess.Popen(order["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    if os.getpid() != 1:
        while pids := descendants(os.getpid()):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
    os._exit(0)


def bury_the_dead() -> None:
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.05)


def descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = list(children.get(ancestor, []))
    for pid in found:  # which grows
        found += children.get(pid, [])
    return found


if __name__ == "__main__":
    main()
