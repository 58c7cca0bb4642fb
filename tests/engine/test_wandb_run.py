"""Weights & Biases, offline: what a run writes there, its end, and what a missing package says."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.machine import ROOT, TIME_LIMIT

MISSING = "import sys; sys.path_importer_cache.clear(); import importlib.util as u; find = u.find_spec\n"
MISSING += "u.find_spec = lambda name, *rest: None if name == 'wandb' else find(name, *rest)\n"
MISSING += "from diffmoe_dist.train import run; run()"


def command(digits: Path, run_dir: Path, *settings: str) -> list[str]:
    config = ["--config", "configs/debug/global_pool.yaml", f"data.shards={digits}", f"run_dir={run_dir}"]
    return [*config, "device=cpu", "log.every=1", "log.wandb=true", *settings]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}


def records(run_dir: Path) -> list[list[Any]]:
    """What each start has written: the records of its file."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    paths = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    return [[record.FromString(piece) for piece in pieces(path.read_bytes())] for path in paths]


def pieces(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log after a header of 7 bytes: blocks of 32 KiB, at whose ends one may be cut."""
    begun, at = b"", 7
    while at + 7 <= len(content):  # the last one of a start that was killed may be cut
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if at + 7 + length > len(content):
            return
        begun += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield begun
            begun = b""


def charted(of_start: list[Any]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for record in of_start:
        for item in record.history.item:
            values.setdefault(item.key or "/".join(item.nested_key), []).append(item.value_json)
    return values


# A second start, which is killed while it runs.
KILLED = """
import os, signal, sys
from pathlib import Path
from diffmoe_dist.config import load_config
from diffmoe_dist.engine.wandb_run import WandbRun
tracker = WandbRun(load_config(Path(sys.argv[1]) / "config.yaml"), "train")
for step in range(3, 103):
    tracker.add_scalars({"loss/loss": 0.5}, step)
children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
print(*[pid for pid in children if "wandb" in Path(f"/proc/{pid}/cmdline").read_text()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_is_written_offline_goes_on_under_one_id_and_its_service_ends_when_it_is_killed(
    digits: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "demo"
    options: Any = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "timeout": TIME_LIMIT}
    small = ("train.steps=2", "sample.every=2", "sample.num=4", "sample.steps=2")
    ended = subprocess.run([sys.executable, "-m", "diffmoe_dist.train", *command(digits, run_dir, *small)], **options)
    assert ended.returncode == 0, ended.stderr
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run_dir)], **options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    services = killed.stdout
    assert services.split(), "the package has a process of its own"
    wait_for(lambda: not any(is_alive(int(pid)) for pid in services.split()))

    starts = records(run_dir)
    runs = [record.run for start in starts for record in start if record.HasField("run")]
    assert len(starts) == len(runs) == 2 and {run.run_id for run in runs} == {
        (run_dir / "wandb-id").read_text().strip()
    }
    assert runs[0].display_name == "demo" and {"moe", "command"} <= {update.key for update in runs[0].config.update}
    values = charted(starts[0])
    assert values["step"][0] == "1" and len(values["loss/loss"]) == 2
    for name in ("moe/predictor_agreement", "moe/gates/block_1", "samples"):
        assert any(key.startswith(name) for key in values), values.keys()


def test_a_missing_package_is_refused_in_one_line_before_anything_is_computed(digits: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", MISSING, *command(digits, tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2 and not (tmp_path / "run").exists()
    assert re.fullmatch(r".*log.wandb=true: the package wandb is not installed; pip install wandb, .*\n", ended.stderr)


def wait_for(done: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
