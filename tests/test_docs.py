"""What the documentation shows is run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.distributed import run_ranks
from tests.engine.runs import train_all
from tests.machine import ROOT


def test_the_python_example_of_the_sampling_page_draws_ten_digits(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sampling.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 16
    run_ranks(1, train_all, digits, [(tmp_path / "runs/demo", {"train": {"steps": 10}})])
    monkeypatch.chdir(tmp_path)

    exec(compile(example, "docs/sampling.md", "exec"), {})

    strip = np.asarray(Image.open(tmp_path / "digits.png"))
    assert strip.shape == (64, 640) and strip.std() > 10
