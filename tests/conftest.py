from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from data_tools.digits import DigitsSource
from data_tools.pack import pack

os.environ.update(
    DS_ACCELERATOR="cpu",  # the tests run on the CPU, also where there is a GPU
    HWLOC_COMPONENTS="-gl",  # else mpirun asks ports 6000 to 6009 for X displays: TensorBoard's never answers
    OMPI_ALLOW_RUN_AS_ROOT="1",
    OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Those on Slurm come first: they wait more than they compute, and at the end nothing else would use the cores.
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    on_cuda = [item for item in items if item.get_closest_marker("gpu")]
    if on_cuda and not torch.cuda.is_available():
        for item in on_cuda:
            item.add_marker(
                pytest.mark.skip(reason="torch finds no CUDA device here; make gpu runs it where there is one")
            )


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits as shards."""
    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack(DigitsSource(), folder)
    return folder
