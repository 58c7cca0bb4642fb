"""AdamW, and the norm of the gradients, in one pass over memory for all parameters of a group: Triton kernels, on CUDA.

torch's fused AdamW asks for gradients in fp32 and leaves the bf16 weights to a copy; it and a norm of each gradient are
hundreds of launches a step. Here gradients are read where backward has left them, in their own type, by address.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmoe_dist.engine.adamw import AdamW

BLOCK = 1024  # elements of one piece that one program of a kernel computes
_WARPS = 4
# A thread then moves 16 bytes at once. Elements of a piece, of which bf16 ones are 16 bytes; DeepSpeed's flat tensors
# begin each parameter so.
_ELEMENTS, _BYTES = 8, 16


class PieceTable:
    """Which block of which piece each program of a kernel works on; pieces are intervals of flattened parameters."""

    def __init__(self, sizes: Sequence[int], places: Sequence[int], device: torch.device) -> None:
        """
        Args:
            sizes: the elements of each piece.
            places: where each one begins in the flat tensors of weights and moments.
        """
        blocks = [-(-size // BLOCK) for size in sizes]
        of_piece = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(blocks, dtype=torch.int64))
        self.blocks = len(of_piece)
        self._piece = of_piece.to(torch.int32).to(device)  # of each block
        self._first_block = torch.tensor([0, *blocks], dtype=torch.int64).cumsum(0)[:-1].to(device)
        self._size = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._place = torch.tensor(places, dtype=torch.int64, device=device)
        self._aligned = all(number % _ELEMENTS == 0 for number in (*sizes, *places))

    def addresses(self, gradients: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """Of the gradients, contiguous and of one type: (pieces,) int64 on the device; and whether all is aligned."""
        found = [gradient.data_ptr() for gradient in gradients]
        table = torch.tensor(found, dtype=torch.int64)
        if self._size.device.type == "cuda":
            table = table.pin_memory()
        return table.to(self._size.device, non_blocking=True), self._aligned and all(
            address % _BYTES == 0 for address in found
        )

    def squares(self, gradients: Sequence[Tensor]) -> Tensor:
        """(blocks,) fp32: sums of squares, each of `BLOCK` elements at most."""
        addresses, aligned = self.addresses(gradients)
        out = torch.empty(self.blocks, device=addresses.device)
        if self.blocks:
            _squares_kernel[(self.blocks,)](
                addresses, self._piece, self._first_block, self._size, out, **_options(gradients, aligned)
            )
        return out

    def update(
        self,
        gradients: Sequence[Tensor],
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        weights: Tensor | None,
        step: Tensor,
        settings: AdamW,
    ) -> None:
        """As `AdamW.update`, of the flat tensors of a group.

        Args:
            gradients: of each piece; their elements are read once, and stay.
            master: (n,) fp32, as `exp_avg` and `exp_avg_sq`.
            weights: (n,) bf16, which become the rounded master weights; None: there are none.
            step: () on the device, from 1.
        """
        if not self.blocks:
            return
        addresses, aligned = self.addresses(gradients)
        corrections = torch.stack([1 - torch.pow(beta, step.double()) for beta in settings.betas])
        _adamw_kernel[(self.blocks,)](
            addresses,
            self._piece,
            self._first_block,
            self._size,
            self._place,
            master,
            exp_avg,
            exp_avg_sq,
            master if weights is None else weights,
            corrections,
            settings.lr,
            settings.betas[0],
            1 - settings.betas[0],
            settings.betas[1],
            1 - settings.betas[1],
            settings.eps,
            settings.weight_decay,
            settings.grad_scale,
            HAS_WEIGHTS=weights is not None,
            **_options(gradients, aligned),
        )


def _options(gradients: Sequence[Tensor], aligned: bool) -> dict[str, bool | int]:
    (kind,) = {gradient.dtype for gradient in gradients}
    return {"BF16": kind == torch.bfloat16, "ALIGNED": aligned, "BLOCK": BLOCK, "num_warps": _WARPS}


@triton.jit  # type: ignore[untyped-decorator]
def _block(pieces, first_blocks, sizes, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The piece of this program, its elements of that piece, and which of them there are."""
    block = tl.program_id(0)
    piece = tl.load(pieces + block)
    size = tl.load(sizes + piece)
    if ALIGNED:
        size = tl.multiple_of(size, 8)  # else the mask may differ between the elements of a vector
    at = (block - tl.load(first_blocks + piece)) * BLOCK + tl.arange(0, BLOCK)
    return piece, at, at < size


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(addresses, piece, at, inside, BF16: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements of a piece's gradient in fp32, zero beyond its end."""
    pointer = tl.load(addresses + piece).to(tl.pointer_type(tl.bfloat16 if BF16 else tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _squares_kernel(  # type: ignore[no-untyped-def]
    addresses, pieces, first_blocks, sizes, out, BF16: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    piece, at, inside = _block(pieces, first_blocks, sizes, ALIGNED, BLOCK)
    g = _gradient(addresses, piece, at, inside, BF16, ALIGNED)
    tl.store(out + tl.program_id(0), tl.sum(g * g, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _adamw_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    addresses, pieces, first_blocks, sizes, places, master, exp_avg, exp_avg_sq, weights, corrections,
    lr, beta1, rest1, beta2, rest2, eps, weight_decay, grad_scale,
    HAS_WEIGHTS: tl.constexpr, BF16: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece, at, inside = _block(pieces, first_blocks, sizes, ALIGNED, BLOCK)
    place = tl.load(places + piece)
    if ALIGNED:
        place = tl.multiple_of(place, 8)
    there = place + at
    g = _gradient(addresses, piece, at, inside, BF16, ALIGNED) / grad_scale
    m = tl.load(exp_avg + there, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + there, mask=inside, other=0.0)
    w = tl.load(master + there, mask=inside, other=0.0)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    step_size = lr / tl.load(corrections).to(tl.float32)
    root = tl.sqrt(tl.load(corrections + 1).to(tl.float32))
    w = w - lr * weight_decay * w
    w = w - step_size * m / (tl.sqrt(v) / root + eps)
    tl.store(exp_avg + there, m, mask=inside)
    tl.store(exp_avg_sq + there, v, mask=inside)
    tl.store(master + there, w, mask=inside)
    if HAS_WEIGHTS:
        tl.store(weights + there, w.to(tl.bfloat16), mask=inside)
