"""Runs that are killed, stopped, stuck or wrong: they end as promised, and the same command joins their curve again."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from diffmoe_dist.engine.progress import complete_checkpoints
from diffmoe_dist.engine.trainer import Trainer
from diffmoe_dist.engine.watchdog import Watchdog
from diffmoe_dist.errors import UserError
from tests.commands import ENV, Command, start, wait_for
from tests.engine.runs import TINY, curve, metrics
from tests.machine import ROOT, TIME_LIMIT

pytestmark = pytest.mark.slow

STEPS = 60
# A run that is to be disturbed has no last step: however late the disturbance comes, it finds the run going.
ENDLESS = "train.steps=1000000"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Two ranks' experts, a checkpoint every third step; JSON is YAML."""
    changes = {
        "train": {"steps": STEPS, "global_batch_size": 16},
        "checkpoint": {"every": 3, "keep": 2},
        "parallel": {"expert": 2},
        "data": {"shards": str(digits)},
        "device": "cpu",
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(json.dumps({**TINY, **changes}))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, config_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert [command.wait() for command in train(config_file, folder / "run")] == [0, 0]
    return folder / "run"


def train(config_file: Path, run_dir: Path, *overrides: str, **options: Any) -> list[Command]:
    run_dir.parent.mkdir(exist_ok=True)
    return start(
        "diffmoe_dist.train", "--config", config_file, f"run_dir={run_dir}", *overrides,
        folder=run_dir.parent, **{"ranks": 2, **options},
    )  # fmt: skip


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [line for line in lines if line.endswith("}")]  # a kill may have torn the last one
    return json.loads(whole[-1])["step"] if whole else 0


def newest_checkpoint(run_dir: Path) -> int:
    found = complete_checkpoints(run_dir / "checkpoints")
    return int(found[-1].name[-8:]) if found else 0


def unfinished(run_dir: Path) -> set[str]:
    """Checkpoints that are being written, or were when the run was killed."""
    found = (run_dir / "checkpoints").glob(".unfinished-*")
    return {path.name for path in found}


def finish(config_file: Path, run_dir: Path) -> None:
    """Let an endless run come to an end: at step STEPS, or one step after its last one if it has gone beyond."""
    steps = max(STEPS, last_step(run_dir) + 1)
    commands = train(config_file, run_dir, f"train.steps={steps}")
    assert [command.wait() for command in commands] == [0, 0], commands[0].stderr
    assert json.loads((run_dir / "DONE").read_text()) == {"step": steps}


def same_curve(run_dir: Path, other: Path) -> None:
    """The first STEPS steps are those of another run, bit for bit."""
    steps = [line["step"] for line in metrics(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    for name in ("loss", "loss_diffusion", "grad_norm", "images_seen"):
        assert curve(run_dir, name)[:STEPS] == curve(other, name)


def die_while_writing(rank: int, victim: int, files: int) -> None:
    """Kill one rank when it opens its so-manieth file of an unfinished checkpoint."""
    if rank != victim:
        return
    left = files

    def look(event: str, arguments: Any) -> None:
        nonlocal left
        if event == "open" and "/.unfinished-" in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def test_killed_at_ten_random_moments_a_run_joins_its_curve_bit_for_bit(
    tmp_path: Path, config_file: Path, undisturbed: Path
) -> None:
    """Every second time while a checkpoint is being written."""
    chance = random.Random(0)
    run_dir = tmp_path / "run"
    for attempt in range(10):
        victim = chance.randrange(2)
        if attempt % 2:
            target = last_step(run_dir) + chance.randrange(1, 9)
            commands = train(config_file, run_dir, ENDLESS)
            wait_for(lambda target=target: last_step(run_dir) >= target, f"step {target}")  # type: ignore[misc]
            time.sleep(chance.random() * 0.02)
            commands[victim].signal(signal.SIGKILL)
        else:
            moment = partial(die_while_writing, victim=victim, files=chance.randrange(1, 9))
            commands = train(config_file, run_dir, ENDLESS, prepare=moment)
        assert commands[victim].wait() == -signal.SIGKILL
        assert commands[1 - victim].wait() not in (0, 124), "the other rank ends by itself"
        if attempt % 2 == 0:
            assert unfinished(run_dir)
    with (run_dir / "metrics.jsonl").open("a") as log:
        log.write('{"step": 19, "loss"')  # a kill in the middle of a line
    finish(config_file, run_dir)
    same_curve(run_dir, undisturbed)
    assert not unfinished(run_dir)


def test_asked_to_stop_on_any_rank_a_run_saves_every_step_and_leaves_with_75(
    tmp_path: Path, config_file: Path, undisturbed: Path
) -> None:
    run_dir = tmp_path / "run"
    for attempt, number in enumerate([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, None]):
        target = last_step(run_dir) + 4
        commands = train(config_file, run_dir, ENDLESS)
        wait_for(lambda target=target: last_step(run_dir) >= target, f"step {target}")  # type: ignore[misc]
        if number is None:
            (run_dir / "STOP").touch()
        else:
            commands[attempt % 2].signal(number)
        assert [command.wait() for command in commands] == [75, 75], commands[0].stderr
        assert newest_checkpoint(run_dir) == last_step(run_dir) >= target, "no step is lost"
        assert not (run_dir / "DONE").exists()
    stopped = last_step(run_dir)
    commands = train(config_file, run_dir, ENDLESS)
    assert [command.wait() for command in commands] == [75, 75] and last_step(run_dir) == stopped, "STOP is still there"
    assert f"as {run_dir}/STOP asks: remove it before the next start" in commands[0].stderr
    (run_dir / "STOP").unlink()
    finish(config_file, run_dir)
    same_curve(run_dir, undisturbed)


# A command in a process of its own that says when it imports torch, and then waits for a line.
HELD = """
import runpy, sys

def hold(event, arguments, held=[]):
    if event == "import" and arguments[0].split(".")[0] == "torch" and not held:
        held.append(True)
        sys.stdout.write("importing\\n")
        sys.stdout.flush()
        sys.stdin.readline()

sys.addaudithook(hold)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def importing(tmp_path: Path, config_file: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of one rank that is about to import torch."""
    settings = ("--config", config_file, f"run_dir={tmp_path}/run", "parallel.expert=1")
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, "diffmoe_dist.train", *map(str, settings)],
        cwd=ROOT, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    yield process
    process.kill()
    process.communicate()


def test_a_signal_while_torch_is_imported_stops_the_run_after_its_first_step(
    importing: subprocess.Popen[str], tmp_path: Path
) -> None:
    importing.send_signal(signal.SIGUSR1)
    _, errors = importing.communicate("go on\n", timeout=TIME_LIMIT)
    assert importing.returncode == 75, errors
    assert newest_checkpoint(tmp_path / "run") == last_step(tmp_path / "run") == 1


def test_a_second_signal_leaves_at_once_and_a_launchers_echo_does_not(importing: subprocess.Popen[str]) -> None:
    importing.send_signal(signal.SIGSTOP)  # so that the next two reach it at one time
    importing.send_signal(signal.SIGUSR1)
    importing.send_signal(signal.SIGUSR2)
    importing.send_signal(signal.SIGCONT)

    def ended() -> int | None:
        importing.send_signal(signal.SIGTERM)  # is an echo too, until a second has gone by
        return importing.poll()

    assert wait_for(ended, "the end") == 128 + signal.SIGTERM
    assert importing.stderr is not None
    # Which of the signals of the first second it saw first is up to the system.
    assert re.fullmatch(r"SIGTERM after SIG\w+: leaving at once, without a checkpoint\n", importing.stderr.read())


def test_more_steps_take_the_mark_of_a_finished_run_away_until_they_are_done(
    tmp_path: Path, config_file: Path, undisturbed: Path
) -> None:
    run_dir = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    assert [command.wait() for command in train(config_file, run_dir)] == [0, 0]
    assert json.loads((run_dir / "DONE").read_text()) == {"step": STEPS}
    commands = train(config_file, run_dir, ENDLESS)
    wait_for(lambda: last_step(run_dir) > STEPS, "a step")
    assert not (run_dir / "DONE").exists()
    commands[1].signal(signal.SIGTERM)
    assert [command.wait() for command in commands] == [75, 75]


def test_a_second_run_on_a_run_folder_is_refused_in_one_line(tmp_path: Path, config_file: Path) -> None:
    run_dir = tmp_path / "run"
    first = train(config_file, run_dir, ENDLESS)
    wait_for(lambda: last_step(run_dir) > 2, "steps of the first")
    second = train(config_file, run_dir)
    assert [command.wait() for command in second] == [2, 2]
    assert second[0].stderr.count("\n") == 1
    assert f"run_dir={run_dir}: another run is using it" in second[0].stderr
    first[0].signal(signal.SIGTERM)
    assert [command.wait() for command in first] == [75, 75], "the first one never noticed"


def test_an_attempt_that_was_cut_off_publishes_nothing_after_a_newer_one(tmp_path: Path, config_file: Path) -> None:
    run_dir = tmp_path / "run"
    older = train(config_file, run_dir, ENDLESS, DIFFMOE_ATTEMPT="4711.0")
    wait_for(lambda: last_step(run_dir) > 4, "steps of the older attempt")
    for command in older:
        command.signal(signal.SIGSTOP)
    refused = train(config_file, run_dir, DIFFMOE_ATTEMPT="4712.0")
    assert [command.wait() for command in refused] == [2, 2], "another job does not take over"
    newer = train(config_file, run_dir, DIFFMOE_ATTEMPT="4711.1")
    assert [command.wait() for command in newer] == [0, 0], newer[0].stderr
    published = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")}
    late = train(config_file, run_dir, DIFFMOE_ATTEMPT="4711.0")
    assert [command.wait() for command in late] == [2, 2], "nor does an older attempt that starts late"
    for command in older:
        command.signal(signal.SIGCONT)
    assert [command.wait() for command in older] == [2, 2]
    assert "another attempt has taken over (4711.1, this is 4711.0)" in older[0].stderr
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")} == published


def in_step_3(rank: int, then: Any) -> None:
    """Let something happen in the third step of a rank."""
    original = Trainer._forward_backward

    def changed(self: Trainer, batch: Any) -> Any:
        if self.progress.step == 2 and self.topology.rank == rank:
            then()
        return original(self, batch)

    Trainer._forward_backward = changed  # type: ignore[method-assign]


def sleep_for_ever() -> None:
    time.sleep(10_000)


def raise_fault() -> None:
    raise RuntimeError("a fault of this rank")


def raise_mistake() -> None:
    raise UserError("data.shards=X: a shard is damaged; pack it again")


def rank_1_hangs(rank: int) -> None:
    in_step_3(1, sleep_for_ever)
    if rank == 0:
        end = Watchdog._end

        def end_later(self: Watchdog) -> None:
            time.sleep(1)
            end(self)

        Watchdog._end = end_later  # type: ignore[method-assign]


def rank_1_fails(rank: int) -> None:
    in_step_3(1, raise_fault)


def rank_1_fails_and_rank_0_is_busy(rank: int) -> None:
    in_step_3(1, raise_fault)
    in_step_3(0, sleep_for_ever)


def rank_1_meets_a_damaged_shard(rank: int) -> None:
    in_step_3(1, raise_mistake)


def test_a_rank_that_hangs_ends_every_rank_with_the_stacks_of_its_threads(tmp_path: Path, config_file: Path) -> None:
    """Also a rank that notices a second later, and whose call breaks off when the first one leaves."""
    run_dir = tmp_path / "run"
    commands = train(config_file, run_dir, "train.hang_timeout=10", prepare=rank_1_hangs)
    assert [command.wait() for command in commands] == [124, 124], commands[0].stderr
    assert last_step(run_dir) == 2
    for rank, place in enumerate(["in all_gather", "in sleep_for_ever"]):
        log = (run_dir / f"logs/rank-{rank}.log").read_text()
        assert "step 3 has not ended after 10 seconds (train.hang_timeout)" in log
        assert log.count("Thread 0x") > 2
        assert place in log
        assert "in train_step" in log


@pytest.mark.parametrize(
    ("prepare", "code", "message"),
    [
        (rank_1_fails, 1, "rank 1: RuntimeError: a fault of this rank"),
        (rank_1_fails_and_rank_0_is_busy, 1, "rank 1: RuntimeError: a fault of this rank"),
        (rank_1_meets_a_damaged_shard, 2, "rank 1: data.shards=X: a shard is damaged"),
    ],
)
def test_what_fails_on_one_rank_ends_all_within_seconds(
    tmp_path: Path, config_file: Path, prepare: Any, code: int, message: str
) -> None:
    run_dir = tmp_path / "run"
    commands = train(config_file, run_dir, prepare=prepare)
    assert commands[1].wait() == code
    assert commands[0].wait(30.0) == code
    assert message in (run_dir / "logs/rank-0.log").read_text()
    assert "failed: " in (run_dir / "logs/rank-1.log").read_text()
    if code == 2:
        assert f"error: {message}" in commands[0].stderr
