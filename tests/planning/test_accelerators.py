"""Model FLOP utilization: the arithmetic of a run over what its devices can do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_dist.model.accounting import account
from diffmoe_dist.planning.accelerators import device_peak, model_flop_utilization
from tests.distributed import run_ranks
from tests.engine.runs import make_trainer, tiny_config
from tests.planning.plans import DENSE


def test_utilization_is_the_arithmetic_of_the_model_over_the_devices() -> None:
    # 3 TFLOP an image, 10 images a second, on 2 devices that do 100 TFLOP/s at most.
    assert model_flop_utilization(3e12, 10, ranks=2, peak=100e12) == 0.15


def test_training_takes_three_times_a_forward_pass() -> None:
    counts = account(tiny_config(Path("unused"), Path("unused")))
    assert counts.training_flops(1.5) == 6 * (sum(counts.macs(1.5).values()) + counts.attention_macs)


def test_the_peak_is_that_of_the_device_by_its_exact_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(Path("unused"), Path("unused"), {"precision": "bf16"})
    assert device_peak(torch.device("cpu"), config) is None
    expected = {
        "NVIDIA H200": 989e12, "NVIDIA A800-SXM4-80GB": 312e12,
        # Other boards: GH200 and H100 PCIe have H200 and H100 in their names.
        "NVIDIA GH200 480GB": None, "NVIDIA H100 PCIe": None,
    }  # fmt: skip
    for name, peak in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device_peak(torch.device("cuda"), config) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device_peak(torch.device("cuda"), replace(config, precision="bf16_mixed")) == 989e12
    config = replace(config, precision="fp32")
    assert device_peak(torch.device("cuda"), config) == 67e12, "TF32 is off"
    config = replace(config, tf32=True)
    assert device_peak(torch.device("cuda"), config) == 494e12


def log_with_a_known_peak(rank: int, world_size: int, run_dir: str, digits: str) -> list[dict[str, Any]]:
    """A trainer whose device has a peak of 1 GFLOP/s; the first lacks one."""
    lines = []
    for settings in ({}, DENSE):
        trainer = make_trainer(rank, world_size, tiny_config(Path(run_dir), Path(digits), settings))
        for trainer.device_peak in (None, 1e9):
            with trainer.timer:
                report = trainer.train_step()
            lines.append(trainer._metrics(report))
        trainer.close()
    return lines


def test_a_run_logs_its_utilization_where_the_peak_is_known(digits: Path, tmp_path: Path) -> None:
    (lines,) = run_ranks(1, log_with_a_known_peak, str(tmp_path), str(digits))
    for unknown, known, settings in ((*lines[:2], {}), (*lines[2:], DENSE)):
        assert "mfu" not in unknown
        counts = account(tiny_config(Path("unused"), Path("unused"), settings))
        flops = counts.training_flops(known["capacity"] or 0.0) * known["images_per_second"]
        assert known["mfu"] == pytest.approx(flops / 1e9, rel=1e-12)
