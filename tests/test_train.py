"""What a training run sets up before it builds a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffmoe_dist.launch import Launch
from diffmoe_dist.train import open_device
from tests.engine.runs import tiny_config


@pytest.fixture
def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch believes in a CUDA device; its switches for TF32 are as before afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)


@pytest.mark.usefixtures("as_if_on_cuda")
@pytest.mark.parametrize(("tf32", "products"), [(True, "high"), (False, "highest")])
def test_matrix_products_and_convolutions_on_cuda_are_tf32_if_the_run_asks_for_it_and_only_then(
    tf32: bool, products: str
) -> None:
    torch.backends.cudnn.allow_tf32 = not tf32
    torch.set_float32_matmul_precision("medium")

    config = tiny_config(Path("run"), Path("shards"), {"tf32": tf32, "device": "cuda"})
    device = open_device(config, Launch(0, 1, 0, "single"))

    assert device == torch.device("cuda", 0)
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert torch.get_float32_matmul_precision() == products
