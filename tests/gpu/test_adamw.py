"""AdamW by our kernels against AdamW by torch. Without a GPU, Triton's interpreter runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffmoe_dist.engine.adamw import AdamW, squares
from tests.machine import ROOT

ELEMENTS = 20000
ADAMW = AdamW(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, grad_scale=2.5)
# Sizes and places of pieces: of a partition's edges, and multiples of 16, whose vectors a thread moves whole.
PIECES = {"any": ([5000, 17, 4096, 9000], [0, 5008, 5040, 9200]), "aligned": ([4800, 16, 9008], [32, 5008, 9200])}


def compare(device: str) -> None:
    """Called in a process of its own for the interpreter, which an environment variable switches on at import."""
    for sizes, places in PIECES.values():
        for kind in (torch.bfloat16, torch.float32):
            compare_pieces(sizes, places, kind, device)


def compare_pieces(sizes: list[int], places: list[int], kind: torch.dtype, device: str) -> None:
    from diffmoe_dist.engine.adamw_kernels import PieceTable

    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator).to(device, kind) for size in sizes]
    flats = [torch.rand(ELEMENTS, generator=generator).to(device) * 0.1 for _ in range(3)]
    expected = [flat.clone() for flat in flats]
    weights = None if kind == torch.float32 else torch.zeros(ELEMENTS, dtype=kind, device=device)
    table = PieceTable(sizes, places, torch.device(device))
    norm = float(table.squares(gradients).double().sum())
    assert abs(norm / sum(float(squares(gradient).sum()) for gradient in gradients) - 1) < 1e-6  # fp32 sums of hundreds
    step = torch.tensor(3.0, device=device)
    table.update(gradients, flats[0], flats[1], flats[2], weights, step, ADAMW)
    views = [[flat.narrow(0, *piece) for piece in zip(places, sizes, strict=True)] for flat in expected]
    ADAMW.update(gradients, views[0], views[1], views[2], step)
    for flat, there in zip(flats, expected, strict=True):
        torch.testing.assert_close(flat, there, rtol=1e-6, atol=1e-7)  # one rounding of fp32
    if weights is None:
        return
    # The interpreter cuts bits off where the GPU rounds.
    tolerance = 0.0 if device == "cuda" else 2**-7
    rounded = torch.zeros_like(weights)
    for place, size in zip(places, sizes, strict=True):
        rounded[place : place + size] = flats[0][place : place + size]
    torch.testing.assert_close(weights, rounded, rtol=tolerance, atol=0.0)  # zero between the pieces


@pytest.mark.gpu
def test_adamw_by_kernels_is_adamw_by_torch() -> None:
    compare("cuda")


def test_adamw_by_interpreted_kernels_is_adamw_by_torch() -> None:
    code = "from tests.gpu.test_adamw import compare; compare('cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Compiles for a Hopper GPU, where there is none. Arguments: whether aligned; prints the widths of loads and stores.
COMPILED = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diffmoe_dist.engine.adamw_kernels import _WARPS, BLOCK, _adamw_kernel
pointers = {"addresses": "*i64", "pieces": "*i32", "first_blocks": "*i64", "sizes": "*i64", "places": "*i64",
            "master": "*fp32", "exp_avg": "*fp32", "exp_avg_sq": "*fp32", "weights": "*bf16", "corrections": "*fp64"}
fixed = {"HAS_WEIGHTS": True, "BF16": True, "ALIGNED": sys.argv[1] == "True", "BLOCK": BLOCK}
names = _adamw_kernel.arg_names
source = ASTSource(
    fn=_adamw_kernel,
    signature={name: "constexpr" if name in fixed else pointers.get(name, "fp32") for name in names},
    constexprs={(names.index(name),): value for name, value in fixed.items()},
    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": _WARPS}).asm["ptx"]
print(len(re.findall(r"(?:ld|st)[.]global[.a-z0-9:]*v4[.]b32", ptx)))
"""


def test_aligned_pieces_move_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    moves = {}
    for aligned in (False, True):
        command = [sys.executable, "-c", COMPILED, str(aligned)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        moves[aligned] = int(done.stdout)
    # A thread has 8 elements: of each fp32 tensor two vectors in, two out; of gradients and bf16 weights one.
    assert moves == {False: 0, True: 14}
