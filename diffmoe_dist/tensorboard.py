"""Runs by their names in TensorBoard: `python -m diffmoe_dist.tensorboard runs --port 6100`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.errors import UserError

DESCRIPTION = """\
Show runs in TensorBoard under their own names; below a folder of several, all that it holds, also those that begin
later. Every other option is TensorBoard's, as --port or --bind_all.

  python -m diffmoe_dist.tensorboard runs --port 6100
  python -m diffmoe_dist.tensorboard runs/a runs/b
"""
EVENTS = "tensorboard"  # in a run folder
_LOOK_EVERY = 10  # seconds, for new runs


def main() -> int:
    parser = CommandParser(prog="diffmoe_dist.tensorboard", description=DESCRIPTION)
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="a run folder, or one that holds some")
    arguments, options = parser.parse_known_args()
    if any(option.partition("=")[0] in ("--logdir", "--logdir_spec") for option in options):
        raise UserError(f"{options[0]} has no effect: TensorBoard is given the runs; leave it out")
    if not runs_by_name(arguments.folders):
        raise UserError(f"{arguments.folders[0]}: holds no run with a folder {EVENTS}; give a run folder")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its server ends with it
    with tempfile.TemporaryDirectory(prefix="tensorboard-runs-") as links:
        link_runs(arguments.folders, Path(links))
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", links, *options])
        try:
            while True:
                try:
                    return server.wait(_LOOK_EVERY)
                except subprocess.TimeoutExpired:
                    link_runs(arguments.folders, Path(links))
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait()


def runs_by_name(folders: list[Path]) -> dict[str, Path]:
    """The folders of events, by the path of their run below the folder that was given; a run itself by its name."""
    found: dict[str, Path] = {}
    for folder in folders:
        for run in _runs(folder):
            name = run.resolve().name if run == folder else str(run.relative_to(folder))
            # Two of one name: by their whole paths.
            name = name if name not in found else str(run.resolve()).lstrip("/")
            found[name] = (run / EVENTS).resolve()
    return found


def link_runs(folders: list[Path], links: Path) -> None:
    for name, events in runs_by_name(folders).items():
        link = links / name
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(events)


def _runs(folder: Path) -> Iterator[Path]:
    for place, below, _ in os.walk(folder):
        if EVENTS in below:
            yield Path(place)
            below.clear()  # a run holds no other
        below.sort()


def run() -> NoReturn:
    """`diffmoe-tensorboard`."""
    run_command(main)


if __name__ == "__main__":
    run()
