"""A small trained run to sample from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.engine.runs import train_all


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A tiny model, trained just enough that its predictions are no longer zeros and its thresholds no longer start."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run_ranks(1, train_all, digits, [(run, {"train": {"steps": 40}})])
    return run
