"""Runs in TensorBoard by their own names."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest

from diffmoe_dist.board import link_runs, main, runs_by_name
from diffmoe_dist.engine.event_file import EventFile
from diffmoe_dist.errors import UserError
from tests.machine import ROOT, free_port


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("demo", "sweep/a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        events = EventFile(tmp_path / "runs" / name / "tensorboard", purge_step=1)
        events.add_scalars({"loss/loss": 1.0}, 1)
        events.close()
    return tmp_path / "runs"


def test_a_run_is_called_by_its_folder_and_two_of_one_name_are_told_apart(runs: Path) -> None:
    assert list(runs_by_name([runs])) == ["demo", "sweep/a"]
    assert list(runs_by_name([runs / "demo", runs / "sweep"])) == ["demo", "a"]
    assert list(runs_by_name([runs / "sweep/a", runs / "sweep"])) == ["a"], "one run, given twice"
    (runs / "other/a/tensorboard").mkdir(parents=True)
    assert list(runs_by_name([runs / "sweep", runs / "other"])) == ["a", str(runs / "other/a").lstrip("/")]


def test_no_link_is_in_a_run_whose_name_is_the_beginning_of_anothers(runs: Path, tmp_path: Path) -> None:
    (runs / "other/a/b/tensorboard").mkdir(parents=True)
    whole = {name: str(runs / name).lstrip("/") for name in ("sweep/a", "other/a/b")}
    below, above = [runs / "sweep/a", runs / "other"], [runs / "other", runs / "sweep/a"]
    for folders, names in ((below, ["a", whole["other/a/b"]]), (above, ["a/b", whole["sweep/a"]])):
        found = runs_by_name(folders)
        assert list(found) == names
        links = tmp_path / names[0].replace("/", "-")
        link_runs(found, links)
        assert [(links / name).resolve() for name in names] == list(found.values())
    assert len(list((runs / "sweep/a/tensorboard").iterdir())) == 1, "its events and no link"
    known = runs_by_name([runs / "sweep"])
    assert list(runs_by_name(above, known)) == ["a", whole["other/a/b"]], "a run that came first keeps its name"
    (runs / "sweep/a/x/tensorboard").mkdir(parents=True)
    nested = runs_by_name([runs / "sweep/a", runs / "sweep/a/x"], {"a": runs, "x": runs})
    assert list(nested)[2:] == [whole["sweep/a"], f"{whole['sweep/a']}/x".replace("/", "-")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("RUNS --port 6100 --logdir x", "--logdir has no effect: TensorBoard is given the runs; leave it out"),
        ("RUNS --port=6100 --logdir_spec=a:x", "--logdir_spec has no effect"),
        ("--port 6100 RUNS", "6100: there is no such folder; give folders first, then TensorBoard's options"),
        ("RUNS RUNS/none", "RUNS/none: there is no such folder"),
        ("RUNS/demo/tensorboard", "RUNS/demo/tensorboard: holds no run"),
    ],
)
def test_what_would_be_ignored_is_refused_by_its_name(
    line: str, said: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tensorboard", *line.replace("RUNS", str(runs)).split()])
    with pytest.raises(UserError) as refused:
        main()
    assert str(refused.value).startswith(said.replace("RUNS", str(runs)))


def test_tensorboard_shows_runs_by_their_names_and_its_server_ends_with_the_command(runs: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "diffmoe_dist.board", str(runs), "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        assert set(answer(port, 2)) == {"demo", "sweep/a"}
    finally:
        server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    with pytest.raises(URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=2)


def answer(port: int, number: int) -> list[str]:
    """The runs, once there are so many."""
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=5) as page:
                found = json.load(page)
        except OSError:
            found = []
        if len(found) >= number or time.monotonic() > end:
            return list(found)
        time.sleep(0.2)
