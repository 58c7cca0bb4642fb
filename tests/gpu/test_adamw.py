"""AdamW by our kernels against AdamW by torch. Without a GPU, Triton's interpreter runs them, where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from diffmoe_dist.engine.adamw import AdamW, squares
from tests.machine import ROOT

SIZES, PLACES, ELEMENTS = [5000, 17, 4096, 9000], [0, 5008, 5040, 9200], 20000
ADAMW = AdamW(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, grad_scale=2.5)


def compare(device: str) -> None:
    """Called in a process of its own for the interpreter, which an environment variable switches on at import."""
    from diffmoe_dist.engine.adamw_kernels import PieceTable

    for kind in (torch.bfloat16, torch.float32):
        generator = torch.Generator().manual_seed(0)
        gradients = [torch.randn(size, generator=generator).to(device, kind) for size in SIZES]
        flats = [torch.rand(ELEMENTS, generator=generator).to(device) * 0.1 for _ in range(3)]
        expected = [flat.clone() for flat in flats]
        weights = None if kind == torch.float32 else torch.zeros(ELEMENTS, dtype=kind, device=device)
        table = PieceTable(SIZES, PLACES, torch.device(device))
        norm = float(table.squares(gradients).double().sum())
        reference = sum(float(squares(gradient).sum()) for gradient in gradients)
        assert abs(norm / reference - 1) < 1e-6  # fp32 sums of thousands
        step = torch.tensor(3.0, device=device)
        table.update(gradients, flats[0], flats[1], flats[2], weights, step, ADAMW)
        views = [[flat.narrow(0, p, n) for p, n in zip(PLACES, SIZES, strict=True)] for flat in expected]
        ADAMW.update(gradients, *views, step)
        for flat, there in zip(flats, expected, strict=True):
            torch.testing.assert_close(flat, there, rtol=1e-6, atol=1e-7)  # one rounding of fp32
        outside = torch.ones(ELEMENTS, dtype=torch.bool)
        for place, size in zip(PLACES, SIZES, strict=True):
            outside[place : place + size] = False
            if weights is not None:
                # The interpreter cuts bits off where the GPU rounds.
                exact = {"rtol": 0.0, "atol": 0.0} if device == "cuda" else {"rtol": 2**-7, "atol": 0.0}
                there, here = flats[0][place : place + size], weights[place : place + size]
                torch.testing.assert_close(here.float(), there.to(kind).float(), **exact)
        if weights is not None:
            assert not weights[outside.to(device)].any()  # padding stays


@pytest.mark.gpu
def test_adamw_by_kernels_is_adamw_by_torch() -> None:
    compare("cuda")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed; torch brings it where it has CUDA")
def test_adamw_by_interpreted_kernels_is_adamw_by_torch() -> None:
    code = "from tests.gpu.test_adamw import compare; compare('cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
