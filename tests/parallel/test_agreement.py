"""Ranks that are started with other settings, code or data than the first are refused before anything is computed."""

from __future__ import annotations

import importlib
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffmoe_dist.config import Config, build_config, flat_settings
from diffmoe_dist.errors import UserError
from diffmoe_dist.parallel import agreement
from diffmoe_dist.parallel.agreement import check_agreement
from tests.commands import ENV
from tests.distributed import run_ranks
from tests.machine import ROOT, TIME_LIMIT, free_port

LAYERS: tuple[dict[str, Any], ...] = (
    {"run_dir": "r", "data": {"shards": "s"}, "model": {"size": "S"}},
    {"moe": {"router": "global_pool", "num_experts": 8}},
)
# Overrides of one rank, and the setting that is named.
OTHERS = {
    "seed=1": "seed=0 on rank 0, but 1 on rank 1",
    "optim.lr=2e-4": "optim.lr=0.0001 on rank 0, but 0.0002 on rank 1",
    "train.label_dropout=0.2": "train.label_dropout=0.1 on rank 0, but 0.2 on rank 1",
    "moe.capacity=2": "moe.capacity=1.0 on rank 0, but 2.0 on rank 1",
    "optim.clip_grad_norm=1": "optim.clip_grad_norm=0.0 on rank 0, but 1.0 on rank 1",
    "ema.decay=0.9": "ema.decay=0.9999 on rank 0, but 0.9 on rank 1",
    "precision=bf16": "precision=fp32 on rank 0, but bf16 on rank 1",
    "run_dir=q": "run_dir=r on rank 0, but q on rank 1",
    "moe.router=expert_choice": "moe.router=global_pool on rank 0, but expert_choice on rank 1",
}


def settings(*overrides: str) -> dict[str, Any]:
    config: Config = build_config(*LAYERS, overrides=overrides)
    return flat_settings(config)


def told_by_ranks(rank: int, world_size: int, cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    told = []
    for first, second in cases:
        try:
            check_agreement(second if rank == 1 else first, "start all alike")
            told.append("agreed")
        except UserError as error:
            told.append(str(error))
    return told


def test_the_first_setting_that_differs_is_named_on_every_rank() -> None:
    cases = [(settings(), settings(override)) for override in OTHERS if "expert_choice" not in override]
    cases.append(({"moe.router": "global_pool"}, {"moe.router": "expert_choice"}))
    for of_rank in run_ranks(2, told_by_ranks, [*cases, (settings(), settings())]):
        assert of_rank == [*(f"{told}; start all alike" for told in OTHERS.values()), "agreed"]


def test_all_ranks_that_differ_are_named_and_a_value_that_only_one_side_has() -> None:
    (*_, told) = run_ranks(4, told_by_four)
    assert told == [
        "a=0 on rank 0, but 1 on ranks 1, 2, 3; start all alike",
        "b=None on rank 0, but 5 on rank 2; start all alike",
    ]


def told_by_four(rank: int, world_size: int) -> list[str]:
    told = []
    for values in ({"a": min(rank, 1)}, {"b": 5} if rank == 2 else {}):
        with pytest.raises(UserError) as refused:
            check_agreement(values, "start all alike")
        told.append(str(refused.value))
    return told


def told_with_other_code(rank: int, world_size: int) -> str:
    if rank == 1:
        agreement.code_sha256 = lambda: "f" * 64  # type: ignore[assignment]
    with pytest.raises(UserError) as refused:
        check_agreement({}, "start all alike")
    return str(refused.value)


def told_with_another_router_of_ones_own(rank: int, world_size: int, folders: list[Path]) -> str:
    sys.path.insert(0, str(folders[rank]))
    importlib.import_module("routers_of_mine.by_place")
    with pytest.raises(UserError) as refused:
        check_agreement({}, "start all alike", "routers_of_mine.by_place")
    return str(refused.value)


def test_a_stale_copy_of_a_router_of_ones_own_is_refused_and_of_what_lies_beside_it(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("new", "old")]
    for folder in folders:
        package = folder / "routers_of_mine"
        package.mkdir(parents=True)
        (package / "by_place.py").write_text("from routers_of_mine import places\n")
        (package / "places.py").write_text(f"WHERE = {folder.name!r}\n")
    (_, told) = run_ranks(2, told_with_another_router_of_ones_own, folders)
    assert told.startswith("the code of routers_of_mine.by_place=") and told.endswith("on rank 1; start all alike")


def test_a_stale_clone_on_one_node_is_refused() -> None:
    (_, told) = run_ranks(2, told_with_other_code)
    assert told.startswith("the code of diffmoe_dist=")
    assert told.endswith("but ffffffffffff... on rank 1; start all alike")


PROGRAM = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    sys.argv[1:] = sys.argv[1:sys.argv.index("other")] + sys.argv[sys.argv.index("other") + 1:]
else:
    sys.argv[1:] = sys.argv[1:sys.argv.index("other")]
runpy.run_module("diffmoe_dist.train", run_name="__main__")
"""


def train_with_another_rank(tmp_path: Path, digits: Path, other: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        str(program), "--config", "configs/debug/global_pool.yaml", f"data.shards={digits}", "device=cpu",
        f"run_dir={tmp_path / 'run'}", "train.steps=2", "other", other,
    ]  # fmt: skip
    environment = {**ENV, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, env=environment)


@pytest.mark.parametrize("other", ["optim.lr=3e-4", "model.depth=6"])
def test_a_run_whose_ranks_disagree_takes_no_step(tmp_path: Path, digits: Path, other: str) -> None:
    done = train_with_another_rank(tmp_path, digits, other)
    setting, _, value = other.partition("=")
    assert f"error: {setting}=" in done.stderr
    assert f"but {float(value):g} on rank 1; start all ranks with the same settings" in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_mistake_that_only_another_rank_makes_is_told_and_ends_all(tmp_path: Path, digits: Path) -> None:
    began = time.monotonic()
    done = train_with_another_rank(tmp_path, digits, "model.depth=0")
    assert done.returncode != 0
    assert "SIGTERM before the ranks have met: leaving at once" in done.stderr
    assert time.monotonic() < began + 30, "the launcher's grace before it kills"
    assert "error: model.depth=0 must be from 1 to 1000" in done.stderr


def test_a_port_that_is_in_use_and_an_address_that_does_not_resolve_are_told(tmp_path: Path, digits: Path) -> None:
    arguments = ["--config", "configs/debug/global_pool.yaml", f"data.shards={digits}", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "diffmoe_dist.train", *arguments, "device=cpu"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for address, told in (
            ("127.0.0.1", f"error: MASTER_PORT={port} is in use on this machine"),
            (
                "no-such-host.invalid",
                "error: MASTER_ADDR=no-such-host.invalid: this machine does not know",
            ),
        ):
            environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, env={**ENV, **environment}
            )
            assert done.returncode == 2, done.stderr
            assert done.stderr.splitlines()[-1].startswith(told)


def test_a_rank_that_waits_for_others_says_for_whom_and_where(tmp_path: Path, digits: Path) -> None:
    arguments = ["--config", "configs/debug/global_pool.yaml", f"data.shards={digits}", f"run_dir={tmp_path / 'run'}"]
    port = str(free_port())
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with subprocess.Popen(
        [sys.executable, "-m", "diffmoe_dist.train", *arguments, "device=cpu"],
        cwd=ROOT, env={**ENV, **environment}, stderr=subprocess.PIPE, text=True,
    ) as waiting:  # fmt: skip
        assert waiting.stderr is not None
        lines = iter(waiting.stderr.readline, "")
        assert any(f"rank 1 waits for 2 ranks to meet at 127.0.0.1:{port}" in line for line in lines)
        waiting.kill()
