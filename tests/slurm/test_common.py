"""What slurm/common.sh decides, with stand-ins for Slurm's commands that say what each case needs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.machine import ROOT

pytestmark = pytest.mark.slow

RUNNING = "JobId=7 JobState=RUNNING Reason=None Restarts=2 BatchFlag=1"


def bash(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script after slurm/common.sh, as attempt 2 of job 7."""
    env = {
        "PATH": f"{folder}:/usr/bin:/bin", "PYTHON": "python3", "RUN_DIR": str(folder / "run"), "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1", **environment,
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source slurm/common.sh; {script}"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=20,
    )  # fmt: skip


def leave(
    folder: Path, code: int, *, job: str = RUNNING, nodes: str = "allocated", stopping: str = "", endings: str = "",
    done: bool = False, accepted: bool = True,
) -> tuple[int, bool]:  # fmt: skip
    """Let an attempt with a checkpoint at step 20 end; its exit code, and whether the job was requeued."""
    (folder / "run/checkpoints/step-00000020").mkdir(parents=True)
    (folder / "run/checkpoints/step-00000020/state.json").touch()
    if done:
        (folder / "run/DONE").touch()
    if endings:
        (folder / "run/endings").write_text(f"{endings}\n")
    scontrol = f'case $1 in show) echo "{job}" ;; requeue) touch {folder}/requeued; exit {int(not accepted)} ;; esac'
    for name, text in {"scontrol": scontrol, "sinfo": f"echo {nodes}"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    ended = bash(folder, f"stopping={stopping}; leave {code}")
    return ended.returncode, (folder / "requeued").exists()


STEP_20, STEP_10 = "7 step-00000020", "7 step-00000010"
ENDINGS: dict[str, tuple[int, dict[str, Any], tuple[int, bool]]] = {
    "a finished run is done": (0, {"done": True}, (0, False)),
    "the mark of an earlier, shorter run does not hide a crash": (1, {"done": True}, (0, True)),
    "srun's success without the mark is a crash": (0, {}, (0, True)),
    "a run that stopped on request goes on": (75, {}, (0, True)),
    "a run killed after the time limit's signal goes on": (137, {"stopping": "yes"}, (0, True)),
    "a first crash is tried again": (1, {}, (0, True)),
    "a hang is tried again": (124, {}, (0, True)),
    "a second crash at a checkpoint is the last": (1, {"endings": f"{STEP_20} 1 0"}, (1, False)),
    "a second hang at a checkpoint is the last": (124, {"endings": f"{STEP_20} 1 0"}, (124, False)),
    "a crash after progress is a first one": (1, {"endings": f"{STEP_10} 1 0"}, (0, True)),
    "a new job has no crashes behind it": (1, {"endings": "6 step-00000020 1 0"}, (0, True)),
    "a crash after a stop is a first one": (1, {"endings": f"{STEP_20} 0 1"}, (0, True)),
    "a crash with a sick node is the node's": (1, {"endings": f"{STEP_20} 1 0", "nodes": "allocated*"}, (0, True)),
    "a stop without progress is no crash": (75, {"endings": f"{STEP_20} 1 8"}, (0, True)),
    "ten stops without progress are the end": (75, {"endings": f"{STEP_20} 0 9"}, (75, False)),
    "a mistake in the settings is not tried again": (2, {}, (2, False)),
    "a cancelled job stays cancelled": (75, {"job": RUNNING.replace("RUNNING", "COMPLETING")}, (75, False)),
    "an old attempt leaves the newer one alone": (1, {"job": RUNNING.replace("Restarts=2", "Restarts=3")}, (1, False)),
    "where Slurm refuses, the exit code tells": (75, {"accepted": False}, (75, True)),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_ending(case: str, tmp_path: Path) -> None:
    code, situation, expected = ENDINGS[case]
    assert leave(tmp_path, code, **situation) == expected


@pytest.mark.parametrize(
    ("gpus", "moe", "ranks"),
    [
        (8, "{router: global_pool, num_experts: 16, capacity: 1.0}", 8),
        (4, "{router: global_pool, num_experts: 16}", 4),
        (8, "{router: prototype, num_experts: 12}", 4),
        (8, "\n  num_experts: 14", 2),
        (1, "{router: global_pool, num_experts: 16}", 1),
        (8, "{router: dense}  # num_experts: 16", 1),
    ],
)
def test_experts_are_spread_over_as_much_of_a_node_as_they_divide(
    gpus: int, moe: str, ranks: int, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(f"seed: 0\nmoe: {moe}\n")
    ended = bash(
        tmp_path, "ranks_sharing_experts", CONFIG=str(tmp_path / "config.yaml"), SLURM_NTASKS_PER_NODE=str(gpus)
    )
    assert ended.stdout == f"{ranks}\n", ended.stderr


@pytest.mark.parametrize("size", ["s", "b", "l"])
def test_the_training_scripts_differ_in_size_and_nodes_only(size: str) -> None:
    texts = []
    for name in (size, "xl"):
        text = (ROOT / f"slurm/train_{name}.sh").read_text()
        texts.append(re.sub(rf"(?<=[_-]){name}\b|(?<=size ){name.upper()}\b|--nodes=\d+", "...", text))
    assert texts[0] == texts[1]
