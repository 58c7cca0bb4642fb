"""Runs by their names in TensorBoard: `python -m diffmoe_dist.board runs --port 6100`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain, count
from pathlib import Path
from typing import NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.errors import UserError

DESCRIPTION = """\
Show runs in TensorBoard under their own names; below a folder of several, all that it holds, also those that begin
later. Every other option is TensorBoard's, as --port or --bind_all.

  python -m diffmoe_dist.board runs --port 6100
  python -m diffmoe_dist.board runs/a runs/b
"""
EVENTS = "tensorboard"  # in a run folder
_LOOK_EVERY = 10  # seconds, for new runs


def main() -> int:
    parser = CommandParser(prog="diffmoe_dist.board", description=DESCRIPTION)
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="a run folder, or one that holds some")
    arguments, options = parser.parse_known_args()
    for option in (given.partition("=")[0] for given in options):
        if option.startswith("--logdir"):
            raise UserError(f"{option} has no effect: TensorBoard is given the runs; leave it out")
    for folder in arguments.folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; give folders first, then TensorBoard's options")
    found = runs_by_name(arguments.folders)
    if not found:
        raise UserError(f"{arguments.folders[0]}: holds no run with a folder {EVENTS}; give a run folder")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its server ends with it
    with tempfile.TemporaryDirectory(prefix="tensorboard-runs-") as links:
        link_runs(found, Path(links))
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", links, *options])
        try:
            while True:
                try:
                    return server.wait(_LOOK_EVERY)
                except subprocess.TimeoutExpired:
                    found = runs_by_name(arguments.folders, found)
                    link_runs(found, Path(links))
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait()


def runs_by_name(folders: list[Path], known: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """The folders of events, by the path of their run below the folder that was given; a run itself by its name.

    Args:
        known: runs that keep their names.
    """
    found = dict(known or {})
    for folder in folders:
        for run in _runs(folder):
            events = (run / EVENTS).resolve()
            if events not in found.values():
                found[_free_name(run, folder, found)] = events
    return found


def _free_name(run: Path, folder: Path, taken: Mapping[str, Path]) -> str:
    """One that is no other's, nor above or below it: there a link would lead into a run. Else by the whole path."""
    name = run.resolve().name if run == folder else str(run.relative_to(folder))
    whole = str(run.resolve()).lstrip("/")
    flat = whole.replace("/", "-")
    candidates = chain((name, whole, flat), (f"{flat}-{number}" for number in count(2)))
    return next(one for one in candidates if not any(_clash(one, other) for other in taken))


def _clash(one: str, other: str) -> bool:
    """Whether two paths are equal, or one lies below the other."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def link_runs(runs: Mapping[str, Path], links: Path) -> None:
    for name, events in runs.items():
        link = links / name
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(events)


def _runs(folder: Path) -> Iterator[Path]:
    for place, below, _ in os.walk(folder):
        if EVENTS in below:
            yield Path(place)
            below.clear()  # a run holds no other
        below.sort()


def run() -> NoReturn:
    """`diffmoe-board`."""
    run_command(main)


if __name__ == "__main__":
    run()
