"""What slurm/common.sh decides, with stand-ins for Slurm's commands that say what each case needs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.machine import ROOT, TIME_LIMIT

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
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIME_LIMIT,
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
    ("nodes", "gpus", "moe", "override", "answer"),
    [
        (1, 8, "{router: global_pool, num_experts: 16, capacity: 1.0}", "seed=1", "1 8 fp32 parallel.expert=8"),
        (4, 8, "{router: global_pool, num_experts: 16}", "seed=1", "4 16 fp32 parallel.expert=16"),
        (1, 4, "{router: global_pool, num_experts: 16}", "precision=bf16", "1 4 bf16 parallel.expert=4"),
        (2, 8, "{router: prototype, num_experts: 12}", "tf32=true", "2 4 fp32+tf32 parallel.expert=4"),
        (1, 8, "{router: global_pool, num_experts: 16}", "moe.num_experts=14", "1 2 fp32 parallel.expert=2"),
        (1, 8, "{router: dense}", "seed=1", "1 1 fp32 parallel.expert=1"),
        (2, 8, "{router: global_pool, num_experts: 16}", "parallel.expert=4", "2 4 fp32"),
        (2, 8, "{router: global_pool, num_experts: 16}\nparallel: {expert: 8}", "seed=1", "2 8 fp32 parallel.expert=8"),
        (
            3,
            8,
            "{router: global_pool, num_experts: 16}",
            "seed=1",
            "2 16 fp32 parallel.expert=16\ntrain.global_batch_size=256 does not divide over 24 ranks; choose a "
            "multiple of 24, or 16 or 32 ranks",
        ),
    ],
)
def test_experts_are_spread_over_as_many_gpus_as_they_divide_unless_the_settings_say_how_many(
    nodes: int, gpus: int, moe: str, override: str, answer: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(f"model: {{size: S}}\nmoe: {moe}\nrun_dir: run\ndata: {{shards: shards}}\n")
    ended = bash(
        tmp_path, f"read_config {override}", CONFIG=str(tmp_path / "config.yaml"), PYTHON=sys.executable,
        SLURM_NNODES=str(nodes), SLURM_NTASKS_PER_NODE=str(gpus),
    )  # fmt: skip
    assert ended.stdout == f"{answer}\n" + "\n" * ("\n" not in answer), ended.stderr


SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name not in ("common.sh", "site.sh"))
IN_A_JOB = {"SLURMD_NODENAME": "n1", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}


def shell(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of slurm/ in an environment without Slurm."""
    return subprocess.run(
        ["bash", f"slurm/{script}", *arguments],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True, timeout=TIME_LIMIT,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_slurm_a_script_says_what_to_do_in_one_line_and_leaves_nothing(script: str, tmp_path: Path) -> None:
    ended = shell(script, RUN_DIR=str(tmp_path / "run"), OUT=str(tmp_path / "out"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: no Slurm job runs this script; submit it: sbatch slurm/{script}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["", "xxl", "train.steps=3"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    ended = shell("train.sh", size, **IN_A_JOB)
    assert (ended.returncode, ended.stderr) == (2, f"error: SIZE={size}: choose s, b, l or xl\n")


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_the_training_scripts_differ_in_size_and_nodes_only(size: str) -> None:
    texts = [(ROOT / f"slurm/train_{name}.sh").read_text() for name in (size, "xl")]
    same = [
        re.sub(rf"(?<=[_-]){name}\b|(?<=size ){name.upper()}\b|(?<=train.sh ){name}\b|--nodes=\d+", "...", text)
        for text, name in zip(texts, (size, "xl"), strict=True)
    ]
    assert same[0] == same[1]
    general = (ROOT / "slurm/train.sh").read_text()
    jobs = [
        [line for line in text.splitlines() if "#SBATCH" in line and not re.search("--(nodes|job-name)=", line)]
        for text in (texts[0], general)
    ]
    assert jobs[0] == jobs[1] != []


def test_shards_are_planned_packed_checked_and_described() -> None:
    """The commands of slurm/prepare_shards.sh, told instead of run; tests/slurm/test_slurm.py runs them."""
    told = {**IN_A_JOB, "PYTHON": "echo python", "LAUNCHER": "echo ranks", "SOURCE": "photos", "OUT": "shards"}
    ranks = "ranks echo python -m mpi4py -m data_tools"
    assert shell("prepare_shards.sh", "--size", "64", **told).stdout.splitlines() == [
        "python -m data_tools plan photos --size 64",
        f"{ranks} pack photos shards --size 64",
        f"{ranks} verify shards --full",
        "python -m data_tools stats shards --picture shards.png",
    ]
    ended = shell("prepare_shards.sh", **told, VAE="vae")
    remedy = "latents are encoded on GPUs; sbatch slurm/encode.sh latents --vae vae"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"error: VAE=vae: {remedy}\n")


def test_a_step_of_the_preparation_that_fails_is_the_last_one() -> None:
    told = {**IN_A_JOB, "PYTHON": "echo python", "LAUNCHER": "false", "SOURCE": "photos", "OUT": "shards"}
    ended = shell("prepare_shards.sh", **told)
    assert (ended.returncode, ended.stdout) == (1, "python -m data_tools plan photos\n")


def test_data_are_encoded_on_all_ranks_and_the_log_says_how_precisely() -> None:
    told = {**IN_A_JOB, "PYTHON": "python", "LAUNCHER": "echo ranks"}
    ranks = "ranks python -m mpi4py -m data_tools"
    line, command = shell("encode.sh", "latents", "--vae", "vae", **told, BASE="photos").stdout.splitlines()
    assert line.endswith(
        "encode-latents on 16 processes (cuda), computed in fp32 without TF32, stored in fp16: photos-latents"
    )
    assert command == f"{ranks} encode-latents photos photos-latents --device cuda --vae vae"
    prompts = shell("encode.sh", "prompts", **told, BASE="p.txt", DEVICE="cpu").stdout.splitlines()
    assert prompts[1] == f"{ranks} encode-prompts p.txt p.npz --device cpu"
    ended = shell("encode.sh", "latent", **told)
    assert (ended.returncode, ended.stderr) == (2, "error: KIND=latent: choose latents, text or prompts\n")


def test_a_container_of_slurm_is_around_every_process_of_python(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    options = "--container-image=i --container-mounts=/data"
    script = "python_once once; on_all_ranks ranks; launch step"
    ended = bash(tmp_path, script, CONTAINER=options, PYTHON="python", LAUNCHER="srun --mpi=pmix")
    assert ended.stdout.splitlines() == [
        f"--export=ALL --nodes=1 --ntasks=1 {options} python once",
        f"--mpi=pmix {options} python -m mpi4py -m data_tools ranks",
        f"--export=ALL --kill-on-bad-exit=0 --wait=60 --label {options} step",
    ]
    ended = bash(tmp_path, "on_all_ranks ranks", CONTAINER=options, LAUNCHER="mpirun")
    remedy = "starts processes outside of CONTAINER; use srun --mpi=pmix"
    assert (ended.returncode, ended.stderr) == (2, f"error: LAUNCHER=mpirun: {remedy}\n")
