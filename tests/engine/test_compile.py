"""`train.compile`: the same curve from compiled blocks. Where there is no C++ compiler, the run refuses to start."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch.distributed.checkpoint import FileSystemReader

from diffmoe_dist.engine import compiling
from diffmoe_dist.engine.compiling import check_compiler
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch
from diffmoe_dist.train import open_device
from tests.distributed import run_ranks
from tests.engine.runs import curve, make_trainer, tiny_config, train_all
from tests.planning.plans import Case


def missing_compiler() -> str:
    """Why nothing can be compiled here; empty where it can."""
    try:
        check_compiler(torch.device("cpu"))
    except UserError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(missing_compiler()), reason=missing_compiler())

SPREAD: Case = {"parallel": {"expert": 2}}
COMPILED: Case = {"train": {"steps": 20, "compile": True}}
COMPILED_AGAIN: Case = {**SPREAD, "train": {"steps": 20, "compile": True, "recompute": "block"}}
# The experts of token choice have other numbers of rows in each step, its unconditional one too.
NORMED = {"qk_norm": "layer", "head_dim": 12, "activation": "swiglu"}
PROTOTYPE: Case = {"model": NORMED, "moe": {"router": "prototype"}, "train": {"steps": 20}}
MIXED: Case = {"precision": "bf16_mixed"}
RAGGED: Case = {"precision": "bf16", "moe": {"router": "token_choice"}}
JOBS: dict[int, dict[str, Case]] = {
    1: {
        "eager": {"train": {"steps": 20}},
        "compiled": COMPILED,
        "eager-prototype": PROTOTYPE,
        "compiled-prototype": {**PROTOTYPE, **COMPILED},
        "eager-mixed": {**MIXED, "train": {"steps": 5}},
        "compiled-mixed": {**MIXED, "train": {"steps": 5, "compile": True}},
        "eager-ragged": {**RAGGED, "train": {"steps": 5}},
        "compiled-ragged": {**RAGGED, "train": {"steps": 5, "compile": True, "recompute": "mlp"}},
    },
    2: {
        "eager-spread": {**SPREAD, "train": {"steps": 20}},
        "compiled-spread": COMPILED_AGAIN,
    },
}


def train_jobs(rank: int, world_size: int, shards: Path, folder: Path) -> str:
    """Returns on 2 ranks what a run says whose attention is spoilt, within a compiled part."""
    for name, settings in JOBS[world_size].items():
        torch.compiler.reset()
        train_all(rank, world_size, shards, [(folder / name, settings)])
    if world_size == 1:
        return ""
    trainer = make_trainer(rank, world_size, tiny_config(folder / "spoilt", shards, COMPILED_AGAIN))
    trainer.train_step()
    trainer.model.get_parameter("blocks.0.attn.proj.bias").data.fill_(torch.nan)
    with pytest.raises(FloatingPointError) as raised:
        trainer.train_step()
    trainer.close()
    return str(raised.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compile")


@pytest.fixture(scope="module")
def told(folder: Path, digits: Path) -> str:
    run_ranks(1, train_jobs, digits, folder, time_limit=900.0)
    return str(run_ranks(2, train_jobs, digits, folder, time_limit=900.0)[0])


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "-prototype", "-spread"])
def test_compiled_blocks_have_the_curve_of_those_that_are_not(told: str, folder: Path, name: str) -> None:
    eager, compiled = curve(folder / f"eager{name}"), curve(folder / f"compiled{name}")
    assert len(eager) == 20 and eager[-1] != eager[0]
    assert compiled == pytest.approx(eager, abs=1e-6, rel=0)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "ragged"])
def test_compiled_blocks_stay_near_in_bf16(told: str, folder: Path, name: str) -> None:
    # Fused operations round once where separate ones round to bf16 in between.
    compiled = curve(folder / f"compiled-{name}")
    assert len(compiled) == 5 and compiled == pytest.approx(curve(folder / f"eager-{name}"), abs=5e-3)


@needs_compiler
@pytest.mark.slow
def test_the_log_tells_how_long_compiling_takes(told: str, folder: Path) -> None:
    assert "step 1: torch.compile took" in (folder / "compiled/logs/rank-0.log").read_text()
    assert "torch.compile" not in (folder / "eager/logs/rank-0.log").read_text()


@needs_compiler
@pytest.mark.slow
def test_the_tensors_of_a_compiled_run_have_their_names_and_a_run_that_is_not_compiled_goes_on(
    told: str, folder: Path, digits: Path
) -> None:
    names = [
        set(FileSystemReader(folder / name / "checkpoints/step-00000020").read_metadata().state_dict_metadata)
        for name in ("eager", "compiled")
    ]
    assert names[0] == names[1]
    longer: Case = {"train": {"steps": 22}}
    run_ranks(1, train_all, digits, [(folder / "compiled", longer), (folder / "eager", longer)])
    assert curve(folder / "compiled") == pytest.approx(curve(folder / "eager"), abs=2e-6, rel=0)


@needs_compiler
@pytest.mark.slow
def test_what_is_not_finite_is_found_within_compiled_parts(told: str) -> None:
    assert "first in the output of blocks.0.attn.proj on rank" in told


@pytest.fixture
def no_compiler() -> Iterator[None]:
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield


def test_without_the_headers_of_python_the_run_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    if "C++ compiler" in missing_compiler():
        monkeypatch.setattr(compiling, "get_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(
        UserError, match=r"train\.compile=true needs the headers of Python, and /nowhere has no Python.h"
    ):
        check_compiler(torch.device("cpu"))


def test_without_a_compiler_the_run_does_not_start(no_compiler: None) -> None:
    config = tiny_config(Path("unused"), Path("unused"), {"device": "cpu", "train": {"compile": True}})
    with pytest.raises(UserError, match=r"train\.compile=true needs a C\+\+ compiler"):
        open_device(config, Launch(0, 1, 0, "environment"))
    assert "needs a C++ compiler" in missing_compiler(), "and the tests above say so"
