"""Pipes in the place of files: opening one waits for whoever writes into it, for ever."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_dist.config import load_config
from diffmoe_dist.data.model_folder import check_model_folder
from diffmoe_dist.data.prompts import read_prompts
from diffmoe_dist.engine.checkpoint import verify_checkpoint
from diffmoe_dist.engine.conversion import read_state_dict
from diffmoe_dist.engine.run_folder import FolderClaim
from diffmoe_dist.engine.weights import read_model
from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.extractors import open_inception
from diffmoe_dist.evaluation.image_sources import NpzImages
from diffmoe_dist.evaluation.reference import read_reference
from diffmoe_dist.files import AppendedFile
from diffmoe_dist.report_page.samples import FinishedSamples
from tests.data.encoders import save_encoder

CPU = torch.device("cpu")
ANY: Any = None
READERS: dict[str, Callable[[Path], Any]] = {
    "a.yaml": load_config,
    "a.npz": NpzImages,
    "b.npz": lambda path: read_reference(path, ANY, "--reference"),
    "a.pth": lambda path: open_inception(str(path), CPU),
    "a.txt": lambda path: read_prompts(path, "--prompts"),
    "a.pt": read_state_dict,
    "a.safetensors": read_state_dict,
    "sampling.json": lambda path: FinishedSamples.open(path.parent, 4),
}


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    def end(*_: object) -> None:
        raise TimeoutError("waits for a pipe")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError):
        READERS[name](tmp_path / name)


def test_a_pipe_in_a_run_folder_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "attempt")
    with pytest.raises(OSError, match="not a regular file"):
        AppendedFile(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        FolderClaim(tmp_path, "1", None).check()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_folder_of_a_model_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = save_encoder(tmp_path / "clip", "clip")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="--encoder: (no config.json|model.safetensors: cannot be read)"):
        check_model_folder(folder, "--encoder", "a CLIP", ["clip_text_model"])
    if name == "config.json":
        shutil.copy(folder.parent / "clip" / "model.safetensors", tmp_path / "model.safetensors")
        os.mkfifo(tmp_path / "config.json")
        with pytest.raises(UserError, match="not a regular file|no complete checkpoint"):
            read_model(tmp_path, "cpu")


@pytest.mark.parametrize("name", ["SHA256SUMS", ".metadata", "__0_0.distcp", "state.json", "config.yaml"])
def test_a_pipe_in_a_checkpoint_is_damage_and_not_waited_for(tmp_path: Path, name: str) -> None:
    for other in (".metadata", "state.json", "config.yaml", "__0_0.distcp"):
        (tmp_path / other).write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    sums = [f"{empty}  {other}\n" for other in (".metadata", "state.json", "config.yaml", "__0_0.distcp")]
    (tmp_path / "SHA256SUMS").write_text("".join(sums))
    assert verify_checkpoint(tmp_path) is None
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert f"{name} cannot be read: [Errno 22] not a regular file" in str(verify_checkpoint(tmp_path))
