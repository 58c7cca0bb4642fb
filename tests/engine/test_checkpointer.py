"""The copy of the state that the checkpoint thread makes: where, of what, and into which memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.config import CheckpointConfig, Config
from diffmoe_dist.engine import checkpoint, fragment_io
from diffmoe_dist.engine.checkpointer import Checkpointer
from diffmoe_dist.engine.progress import Progress
from diffmoe_dist.engine.run_folder import Claim, FolderClaim, NoClaim
from diffmoe_dist.engine.sharded_state import Fragment
from diffmoe_dist.errors import UserError
from tests.machine import ROOT, TIME_LIMIT

PARTS = {"a": (0, 30), "b": (30, 70), "c": (70, 100)}


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_checkpointer(run_dir: Path, device: str, claim: Claim | None = None, keep: int = 3) -> Checkpointer:
    config = Config(run_dir=str(run_dir), checkpoint=CheckpointConfig(keep=keep))
    return Checkpointer(config, torch.device(device), claim or NoClaim(), 0, timedelta(seconds=30))


def make_state() -> tuple[list[Tensor], list[Fragment]]:
    """Two flat tensors of the kinds of a parameter, and one of another type."""
    master = torch.arange(300.0)[100:200]  # a rank's partition of what all ranks have
    ema = -torch.arange(100.0)
    steps = torch.tensor([1, 2, 3])
    fragments = [
        Fragment(f"{kind}.{name}", 0, end - begin, flat[begin:end])
        for name, (begin, end) in PARTS.items()
        for kind, flat in (("master", master), ("ema", ema))
    ]
    return [master, ema, steps], [*fragments, Fragment("buffer.steps", 0, 3, steps)]


def staged_by_the_thread(checkpointer: Checkpointer, fragments: list[Fragment], ready: Any = None) -> list[Fragment]:
    return checkpointer._thread.submit(checkpointer._stage, fragments, ready).result()


def test_each_flat_tensor_of_the_state_is_copied_at_once_into_one_buffer_that_is_kept(
    alone: None, tmp_path: Path
) -> None:
    checkpointer = make_checkpointer(tmp_path, "cpu")
    flats, fragments = make_state()

    first = staged_by_the_thread(checkpointer, fragments)
    buffers = {storage.data_ptr(): storage.nbytes() for storage in (b.data.untyped_storage() for b in first)}
    assert sorted(buffers.values()) == sorted(flat.nbytes for flat in flats)
    before = [fragment.data.clone() for fragment in fragments]
    for flat in flats:
        flat.add_(1)
    for staged, expected, fragment in zip(first, before, fragments, strict=True):
        assert torch.equal(staged.data, expected), "a copy does not follow the state"
        assert (staged.name, staged.data.dtype) == (fragment.name, fragment.data.dtype)

    second = staged_by_the_thread(checkpointer, fragments)
    assert [b.data.data_ptr() for b in second] == [a.data.data_ptr() for a in first]
    assert all(torch.equal(b.data, fragment.data) for b, fragment in zip(second, fragments, strict=True))
    checkpointer.close()


class Recorded:
    """What is asked of CUDA, and from which thread, in the place of `torch.cuda`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        for name in ("set_device", "Stream"):
            monkeypatch.setattr(torch.cuda, name, self.recorder(name))
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        empty = torch.empty

        def unpinned(*size: Any, pin_memory: bool = False, **keywords: Any) -> Tensor:
            if pin_memory:
                self.note("pinned", size)
            return empty(*size, **keywords)

        monkeypatch.setattr(torch, "empty", unpinned)

    def note(self, name: str, value: Any) -> None:
        self.calls.append((threading.current_thread().name, name, value))

    def recorder(self, name: str) -> Any:
        def call(value: Any) -> Any:
            self.note(name, value)
            return self

        return call

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.note("stream", stream)
        yield

    def wait_event(self, event: Any) -> None:
        self.note("wait_event", event)

    def synchronize(self) -> None:
        self.note("synchronize", None)


def test_on_cuda_the_thread_takes_its_ranks_device_first_and_pins_one_buffer_a_flat_tensor(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Recorded(monkeypatch)
    checkpointer = make_checkpointer(tmp_path, "cuda:3")
    flats, fragments = make_state()
    assert cuda.calls == [("MainThread", "Stream", torch.device("cuda:3"))]
    cuda.calls.clear()

    for _ in range(2):
        staged = staged_by_the_thread(checkpointer, fragments, ready="the last update")
    assert all(torch.equal(b.data, fragment.data) for b, fragment in zip(staged, fragments, strict=True))
    assert all(thread.startswith("checkpoint") for thread, _, _ in cuda.calls)
    names = [name for _, name, _ in cuda.calls]
    copy = ["stream", "wait_event", "synchronize"]
    assert names == ["set_device", *["pinned"] * len(flats), *copy, *copy], "once, and no memory for the second copy"
    assert cuda.calls[0][2] == torch.device("cuda:3")
    checkpointer.close()


@pytest.mark.parametrize("moment", ["before its files are written", "after"])
def test_a_save_that_a_newer_attempt_interrupts_says_so_whatever_is_gone(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def taken_over(*arguments: Any) -> Any:
        """The newer attempt removes what this one has begun to write."""
        written = write(*arguments) if moment == "after" else None
        (tmp_path / "attempt").write_text("4711.1\n")
        shutil.rmtree(tmp_path / "checkpoints/.unfinished-step-00000005")
        return write(*arguments) if written is None else written

    write = fragment_io.write_fragments
    monkeypatch.setattr(checkpoint, "write_fragments", taken_over)
    (tmp_path / "attempt").write_text("4711.0\n")
    checkpointer = make_checkpointer(tmp_path, "cpu", FolderClaim(tmp_path, "4711.0", None))
    checkpointer.save(make_state()[1], Progress(5, 80, 0, "data", 16, 1))
    with pytest.raises(UserError, match=r"another attempt has taken over \(4711.1, this is 4711.0\)"):
        checkpointer.wait()
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    checkpointer.close()


def test_ranks_that_share_no_folder_are_told_to_choose_one_that_is_shared(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(folder: Path, *arguments: Any) -> Any:
        written = write(folder, *arguments)
        for file in folder.glob("*.distcp"):
            file.unlink()
        return written

    write = fragment_io.write_fragments
    monkeypatch.setattr(checkpoint, "write_fragments", elsewhere)
    checkpointer = make_checkpointer(tmp_path, "cpu")
    checkpointer.save(make_state()[1], Progress(5, 80, 0, "data", 16, 1))
    with pytest.raises(UserError, match="choose a run_dir on a shared disk"):
        checkpointer.wait()
    checkpointer.close()


def test_a_damaged_later_checkpoint_takes_no_place_among_those_that_are_kept(alone: None, tmp_path: Path) -> None:
    checkpointer = make_checkpointer(tmp_path, "cpu", keep=1)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000300").mkdir(parents=True)
    (folder / "step-00000300" / "state.json").write_text("{")
    for step in (200, 250):
        checkpointer.save(make_state()[1], Progress(step, 80, 0, "data", 16, 1))
        checkpointer.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000250", "step-00000300"]
    checkpointer.close()


HOLD = """
import sys
from pathlib import Path
from diffmoe_dist.files import lock_file
try:
    lock_file(Path(sys.argv[1]))
except BlockingIOError:
    sys.exit("taken")
print("held", flush=True)
sys.stdin.read()
"""


def test_an_attempt_that_took_over_has_the_folder_for_itself_once_the_other_is_gone(tmp_path: Path) -> None:
    """Locks are of processes."""
    hold = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    (tmp_path / "attempt").write_text("4711.1\n")
    claim = FolderClaim(tmp_path, "4711.1", None)
    with subprocess.Popen(hold, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as the_first:
        assert the_first.stdout is not None and the_first.stdout.readline() == "held\n"
        claim.check()
        the_first.communicate()
    claim.check()
    third = subprocess.run(hold, cwd=ROOT, input="", capture_output=True, text=True, timeout=TIME_LIMIT)
    assert third.stderr == "taken\n"
    claim.release()
