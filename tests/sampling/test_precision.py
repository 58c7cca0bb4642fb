"""What the model of a sampling job computes in: as the run does, or as --precision says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffmoe_dist import load_model
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.weights import find_model, read_model
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.precision import tf32_products
from diffmoe_dist.sampling.conditions import ClassLabels
from diffmoe_dist.sampling.generate import SamplerSettings, generate, to_uint8
from diffmoe_dist.sampling.job import sample_to_folder
from diffmoe_dist.sampling.model import open_model
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.distributed import RankError, run_ranks
from tests.engine.runs import train_all

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bf16_run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "bf16"
    run_ranks(1, train_all, digits, [(run, {"precision": "bf16", "train": {"steps": 30}})])
    return run


def sample_all(rank: int, ranks: int, jobs: list[tuple[SamplingSettings, Path]]) -> None:
    for settings, out in jobs:
        sample_to_folder(settings, out, CPU, Launch(rank, ranks, rank, "environment"))


def asked(run: Path, **changes: Any) -> SamplingSettings:
    return replace(SamplingSettings(str(run), num=7, steps=3, batch_size=3), **changes)


def images(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"].astype(int)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sampling.json").read_text())


def in_fp32(run: Path) -> np.ndarray:
    """The images of `asked`, by a model of fp32 weights, block by block."""
    model, config = read_model(find_model(run), CPU)
    objective, labels = build_objective(config), ClassLabels([number % 10 for number in range(7)], 10)
    blocks = [
        generate(model, objective, numbers, labels, SamplerSettings("euler", 3)).images
        for numbers in ([0, 1, 2], [3, 4, 5], [6])
    ]
    return to_uint8(torch.cat(blocks)).astype(int)


def test_a_run_is_sampled_in_its_own_precision_the_same_on_any_ranks_and_after_an_interruption(
    bf16_run: Path, trained: Path, tmp_path: Path
) -> None:
    job = asked(bf16_run)
    run_ranks(1, sample_all, [(job, tmp_path / "one"), (asked(trained), tmp_path / "fp32-run")])
    torn = tmp_path / "torn"
    with pytest.raises(RankError, match="No space"):
        run_ranks(1, sample_until_full, job, torn)
    assert len(list(torn.glob("blocks/block-*.npz"))) == 2
    run_ranks(2, sample_all, [(job, tmp_path / "two"), (job, torn)])

    for name in ("two", "torn"):
        assert (images(tmp_path / name) == images(tmp_path / "one")).all(), name
    assert (images(tmp_path / "one") != in_fp32(bf16_run)).any()
    assert abs(images(tmp_path / "one") - in_fp32(bf16_run)).mean() < 3, "rounding, and nothing else"
    assert record(tmp_path / "one")["precision"] == "bf16"
    assert record(tmp_path / "one")["reproducible_unit"] == "block of batch_size images"
    assert (images(tmp_path / "fp32-run") == in_fp32(trained)).all()
    assert record(tmp_path / "fp32-run")["precision"] == "fp32"
    assert record(tmp_path / "fp32-run")["tf32"] is False


def sample_until_full(rank: int, ranks: int, settings: SamplingSettings, out: Path) -> None:
    from diffmoe_dist.sampling import blocks

    write = blocks.write_block

    def fail_at_the_third(path: Path, block: blocks.Block) -> None:
        if path.name == "block-00000006.npz":
            raise OSError("No space")
        write(path, block)

    blocks.write_block = fail_at_the_third
    sample_all(rank, ranks, [(settings, out)])


def test_the_precision_asked_for_wins_and_a_folder_of_another_one_is_refused_with_the_option_that_continues_it(
    bf16_run: Path, tmp_path: Path
) -> None:
    job = asked(bf16_run, precision="fp32")
    run_ranks(1, sample_all, [(job, tmp_path / "out")])
    assert (images(tmp_path / "out") == in_fp32(bf16_run)).all()
    assert record(tmp_path / "out")["precision"] == "fp32"
    with pytest.raises(RankError, match="its images have precision fp32, not bf16; give --precision fp32, or another"):
        run_ranks(1, sample_all, [(asked(bf16_run), tmp_path / "out")])
    # A folder of version 0.1, which knew no other precision.
    about = record(tmp_path / "out")
    del about["precision"], about["tf32"]
    (tmp_path / "out/sampling.json").write_text(json.dumps(about))
    run_ranks(1, sample_all, [(job, tmp_path / "out")])


def test_only_the_weights_of_a_bf16_model_are_rounded_and_its_fingerprint_is_that_of_the_checkpoint(
    bf16_run: Path,
) -> None:
    launch = Launch(0, 1, 0, "single")
    checkpoint = find_model(bf16_run)
    model, weights = open_model(asked(bf16_run), checkpoint, CPU, launch, None)
    exact, fingerprint = open_model(asked(bf16_run, precision="fp32"), checkpoint, CPU, launch, None)
    assert weights == fingerprint
    for (name, rounded), parameter in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(rounded, parameter.bfloat16()), name
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), exact.buffers(), strict=True))
    prediction = model(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 1])).prediction
    assert prediction.dtype == torch.float32, "the sampler's own arithmetic is in fp32"


def test_a_model_sampled_in_mixed_precision_keeps_fp32_weights_and_computes_as_a_run_of_it(trained: Path) -> None:
    launch, checkpoint = Launch(0, 1, 0, "single"), find_model(trained)
    model, _ = open_model(asked(trained, precision="bf16_mixed"), checkpoint, CPU, launch, None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed, exact = (m(noise, torch.ones(2), torch.tensor([0, 1])).prediction for m in (model, load_model(trained)))
    assert 0 < (mixed - exact).abs().max() < 0.1


def test_a_loaded_model_has_fp32_weights_whatever_the_precision_of_the_run(bf16_run: Path) -> None:
    assert {tensor.dtype for tensor in load_model(bf16_run).parameters()} == {torch.float32}


def test_an_unknown_precision_of_a_job_is_refused(bf16_run: Path) -> None:
    with pytest.raises(UserError, match="precision"):
        open_model(asked(bf16_run, precision="fp8"), find_model(bf16_run), CPU, Launch(0, 1, 0, "single"), None)


def test_tf32_is_as_asked_within_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    def now() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    with tf32_products(torch.device("cuda"), True):
        assert now() == ("high", True)
        with tf32_products(torch.device("cuda"), False):
            assert now() == ("highest", False)
        assert now() == ("high", True)
    assert now() == before
    with tf32_products(CPU, True):
        assert now() == before, "a CPU has no TF32, but may take the setting for another one"


def test_a_gpu_without_bf16_does_not_sample_in_it(bf16_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    launch = Launch(0, 1, 0, "environment")
    with pytest.raises(UserError, match="precision=bf16: Tesla V100-SXM2-32GB has no bf16 arithmetic; use fp32"):
        open_model(asked(bf16_run), find_model(bf16_run), torch.device("cuda"), launch, None)
