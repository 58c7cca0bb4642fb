"""A disk that is full or read-only: a small tmpfs, mounted in a namespace of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.machine import ROOT, TIME_LIMIT

pytestmark = pytest.mark.slow

# The debug model's checkpoint is 13 MB.
TRAIN = """\
mount -t tmpfs -o {options} none {folder} && cd {root}
{python} -c "
import shutil, sys
{patch}
sys.argv = ['train', '--config', 'configs/debug/global_pool.yaml', 'data.shards={shards}', 'run_dir={folder}/run',
            'train.steps={steps}', 'checkpoint.every=2', 'log.every=1', 'device=cpu']
from diffmoe_dist.command import run_command
from diffmoe_dist.train import main
run_command(main)
"
echo $? > {out}/code
{after}
cp -r {folder}/run/metrics.jsonl {folder}/run/expert_load.jsonl {folder}/run/tensorboard {out}
ls -A {folder}/run/checkpoints > {out}/checkpoints
"""


def train_on_tmpfs(
    tmp_path: Path, shards: Path, *, options: str, steps: int, patch: str = "", after: str = ""
) -> tuple[int, str]:
    """Train in `tmp_path`/disk; returns the exit code and what was written to standard error."""
    folder = tmp_path / "disk"
    folder.mkdir()
    script = TRAIN.format(
        options=options, folder=folder, root=ROOT, python=sys.executable, patch=patch, shards=shards, steps=steps,
        out=tmp_path, after=after,
    )  # fmt: skip
    namespace = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
        pytest.skip("this machine does not allow a mount namespace with a tmpfs")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*namespace, "bash", "-c", script], env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    return int((tmp_path / "code").read_text()), ended.stderr


def test_a_checkpoint_for_which_there_is_no_space_is_left_out_and_the_last_one_is_missed(
    tmp_path: Path, digits: Path
) -> None:
    code, errors = train_on_tmpfs(tmp_path, digits, options="size=20m", steps=6)
    assert code == 2, errors
    assert (tmp_path / "checkpoints").read_text().split() == ["step-00000002"], "the one before is kept, and whole"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6], "training went on"
    assert "GB are free, a checkpoint needs 0.0131 GB; the checkpoints before are kept" in errors
    assert "make space and run the same command again" in errors.splitlines()[-1]


def test_a_disk_that_fills_up_during_a_save_leaves_nothing_unfinished(tmp_path: Path, digits: Path) -> None:
    plenty = "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)"
    code, errors = train_on_tmpfs(tmp_path, digits, options="size=20m", steps=4, patch=plenty)
    assert code == 2, errors
    assert (tmp_path / "checkpoints").read_text().split() == ["step-00000002"]
    assert "step-00000004: No space left on device" in errors.splitlines()[-1], errors


FILL = """
def fill():
    with open('{folder}/filler', 'ab', 0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
"""
FULL_FROM_3_TO_60 = """
import os
from diffmoe_dist.engine.run_log import RunLog
moved = RunLog.step
def step(self, number):
    moved(self, number)
    if 3 <= number < 60:  # again: a save that fails gives back what it had taken
        fill()
    if number == 60:
        os.unlink('{folder}/filler')
RunLog.step = step
"""


def test_a_disk_that_is_full_for_a_while_costs_lines_of_the_logs_and_not_the_run(tmp_path: Path, digits: Path) -> None:
    patch = (FILL + FULL_FROM_3_TO_60).format(folder=tmp_path / "disk")
    code, errors = train_on_tmpfs(tmp_path, digits, options="size=60m", steps=62, patch=patch)
    assert code == 0, errors
    assert "Traceback" not in errors and "Logging error" not in errors
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    of_metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    of_loads = [json.loads(line)["step"] for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    lost = 0
    for steps in (
        [line["step"] for line in of_metrics],
        of_loads,
        [event.step for event in events.Scalars("loss/loss")],
    ):
        assert steps[:2] == [1, 2] and steps[-3:] == [60, 61, 62], "it is written again once there is space"
        assert steps == sorted(set(steps)) and len(steps) < 62
        lost += 62 - len(steps)
    assert of_metrics[-1]["failed_log_writes"] >= lost, "each is counted"
    assert of_metrics[-1]["failed_checkpoints"] > 0
    for name in ("metrics.jsonl", "expert_load.jsonl", "tensorboard"):
        assert errors.count(f"/run/{name} cannot be written (No space left on device): training goes on") == 1
    assert errors.count("logs/rank-0.log: No space left on device; lines are lost there") == 1


def test_a_start_on_a_full_disk_is_refused_in_one_line(tmp_path: Path, digits: Path) -> None:
    patch = FILL.format(folder=tmp_path / "disk") + "fill()"
    code, errors = train_on_tmpfs(tmp_path, digits, options="size=20m", steps=4, patch=patch, after="exit 0")
    assert code == 2
    assert errors.splitlines() == [
        f"error: run_dir={tmp_path}/disk/run: cannot be written (No space left on device); make space, or choose "
        "another"
    ]


@pytest.mark.parametrize("files", [5, 8])
def test_a_disk_that_is_full_before_the_first_step_ends_the_run_in_one_line(
    tmp_path: Path, digits: Path, files: int
) -> None:
    options = f"size=20m,nr_inodes={files}"  # room for so many files and folders
    code, errors = train_on_tmpfs(tmp_path, digits, options=options, steps=4, after="exit 0")
    assert code == 2, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith(f"error: run_dir={tmp_path}/disk/run: "), last
    assert last.endswith("No space left on device; make space and run the same command again"), last


def test_a_read_only_run_dir_is_refused_in_one_line(tmp_path: Path, digits: Path) -> None:
    code, errors = train_on_tmpfs(tmp_path, digits, options="ro", steps=4, after="exit 0")
    assert code == 2
    assert errors.splitlines() == [
        f"error: run_dir={tmp_path}/disk/run: cannot be written (Read-only file system); choose another"
    ]
