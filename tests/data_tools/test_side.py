"""Side folders: how often the model behind them is opened, and where it computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.__main__ import _parser
from data_tools.latents import LatentSettings, encode_latents
from data_tools.parallel import SERIAL
from data_tools.prompts import write_prompts
from data_tools.side import choose_encoder_device, worker_device
from data_tools.text import TextSettings, encode_text
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import Autoencoder, LatentReader
from diffmoe_dist.data.prompts import Prompt
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.errors import UserError
from tests.data.encoders import save_encoder
from tests.data.folders import png, random_images, write_folder
from tests.data.test_latents import save_autoencoder
from tests.machine import ROOT, TIME_LIMIT, needs_mpirun

# All commands in one start of two ranks; last, a job that is there to show who works.
_ON_RANKS = """
import sys, time
from data_tools.__main__ import _parser
from data_tools.parallel import make_workers
from diffmoe_dist.command import run_command

def rank(number):
    from mpi4py import MPI
    time.sleep(0.1)
    return MPI.COMM_WORLD.rank

def main():
    with make_workers(1) as workers:
        if workers is not None:
            for line in sys.argv[1:]:
                arguments = _parser().parse_args(line.split())
                arguments.run(arguments, workers)
            print("ranks", sorted(set(workers.run(rank, range(8)))))

if __name__ == "__main__":
    run_command(main)
"""


@pytest.fixture
def base(tmp_path: Path) -> ShardIndex:
    samples = [{"png": png(image), "cls": b"0", "txt": b"a circle"} for image in random_images(4, 16)]
    return write_folder(tmp_path / "base", samples, [1, 2, 1], image_size=16)


def _count_openings(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are opened from now on."""
    opened: list[str] = []
    whole = kind.open

    def counted(folder: Path, *arguments: Any) -> Any:
        opened.append(folder.name)
        return whole(folder, *arguments)

    monkeypatch.setattr(kind, "open", counted)
    return opened


def test_a_process_opens_the_autoencoder_once_for_all_shards(
    base: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = _count_openings(Autoencoder, monkeypatch)
    encode_latents(base, tmp_path / "out", LatentSettings(save_autoencoder(tmp_path / "vae"), 16))
    assert opened == ["vae"]


def test_a_process_opens_the_text_encoder_once_for_all_captions_and_prompts(
    base: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = _count_openings(TextEncoder, monkeypatch)
    settings = TextSettings(save_encoder(tmp_path / "clip", "clip"), max_length=12)
    encode_text(base, tmp_path / "out", settings)
    assert opened == ["clip"]
    write_prompts([Prompt("a circle")] * 70, None, tmp_path / "prompts.npz", settings)
    assert opened == ["clip", "clip"]


def test_another_autoencoder_in_the_same_folder_is_not_taken_for_the_one_before(
    base: ShardIndex, tmp_path: Path
) -> None:
    settings = LatentSettings(save_autoencoder(tmp_path / "vae"), 16)
    encode_latents(base, tmp_path / "first", settings)
    vae = Autoencoder.open(settings.vae, "--vae", "cpu").module
    with torch.no_grad():
        vae.quant_conv.bias += 1.0
    vae.save_pretrained(settings.vae)
    encode_latents(base, tmp_path / "second", settings)
    first, second = (LatentReader(ShardIndex.open(tmp_path / name)).moments(0) for name in ("first", "second"))
    assert abs((second - first).astype(float) - 1.0).max() < 0.01


def test_a_size_of_nothing_is_not_taken_for_the_size_of_the_images(base: ShardIndex, tmp_path: Path) -> None:
    line = f"encode-latents {base.folder} {tmp_path}/out --vae {save_autoencoder(tmp_path / 'vae')} --size 0"
    arguments = _parser().parse_args(line.split())
    with pytest.raises(UserError, match="--size=0: not a number of pixels"):
        arguments.run(arguments, SERIAL)


def test_a_gpu_that_is_not_there_or_would_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_encoder_device("auto", 1) == "cpu"
    with pytest.raises(UserError, match="--device=cuda: this machine has no usable CUDA device"):
        choose_encoder_device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (choose_encoder_device("auto", 1), choose_encoder_device("auto", 2)) == ("cuda", "cpu")
    with pytest.raises(UserError, match="--workers=2: processes would share one GPU"):
        choose_encoder_device("cuda", 2)


def test_mpi_ranks_of_a_node_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for rank in range(3):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 3), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        found.append(str(worker_device("cuda")))
    assert found == ["cuda:0", "cuda:1", "cuda:0"]
    assert str(worker_device("cpu")) == "cpu"


@pytest.mark.slow
@needs_mpirun
def test_two_mpi_ranks_both_encode_and_write_the_bytes_of_one_process(base: ShardIndex, tmp_path: Path) -> None:
    vae, clip = save_autoencoder(tmp_path / "vae"), save_encoder(tmp_path / "clip", "clip")
    (tmp_path / "prompts.txt").write_text("a circle\n" * 70)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    encode_latents(base, tmp_path / "one/latents", LatentSettings(vae, 16, batch_size=1))
    text = TextSettings(clip, max_length=12, batch_size=1)
    encode_text(base, tmp_path / "one/text", text)
    write_prompts([Prompt("a circle")] * 70, None, tmp_path / "one/prompts.npz", text)
    (tmp_path / "program.py").write_text(_ON_RANKS)
    two = tmp_path / "two"
    encoder = f"--encoder {clip} --max-length 12 --device cpu"
    done = subprocess.run(
        [
            *("mpirun", "--oversubscribe", "-n", "2", sys.executable, "-m", "mpi4py", tmp_path / "program.py"),
            f"encode-latents {base.folder} {two}/latents --vae {vae} --batch-size 1 --device cpu",
            f"encode-text {base.folder} {two}/text --batch-size 1 {encoder}",
            f"encode-prompts {tmp_path}/prompts.txt {two}/prompts.npz {encoder}",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ranks [0, 1]" in done.stdout
    one, other = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", two)
    )
    assert one == other and len(one) > 10
