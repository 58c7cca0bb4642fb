"""How a model computes in each `precision`: the type of its weights, and of products; and TF32.

fp32: everything in fp32. bf16: the weights are rounded, and with them everything but what a router decides.

bf16_mixed: products in bf16 over fp32 weights, by torch's autocast. It rounds the operands of each product as it is
computed, and leaves everything else in the type it has: norms, the residual stream and the sum of the experts' outputs
are in fp32, as the weights.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from diffmoe_dist.errors import UserError
from diffmoe_dist.logs import logger

MIXED = "bf16_mixed"  # the `precision` that means this


def mixed_precision(device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """Products in bf16 from here on, where enabled. (The meta device has no autocast, and nothing to round.)"""
    if not enabled or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def fp32_products(device: torch.device) -> AbstractContextManager[object]:
    """Products of fp32 tensors stay in fp32 here, also inside of `mixed_precision`."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def product_type(x: Tensor) -> torch.dtype:
    """The type in which a product with x is computed here."""
    device = x.device.type
    if x.is_floating_point() and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def check_device(device: torch.device, precision: str) -> None:
    """Refuse bf16 on a GPU that has none, and say where a CPU has no instructions for it.

    Raises:
        UserError: the GPU is older than Ampere.
    """
    if precision == "fp32":
        return
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"precision={precision}: {name} has no bf16 arithmetic; use fp32, or a GPU from Ampere on")
    x86 = platform.machine() in ("x86_64", "AMD64")
    if device.type == "cpu" and x86 and not torch.cpu._is_avx512_bf16_supported():
        logger.warning(
            "precision=%s: this CPU has no bf16 instructions, so products are slower than in fp32", precision
        )


def set_weight_type(model: nn.Module, precision: str) -> None:
    """Round the parameters of a model of fp32 weights as a run of this `precision` does; buffers stay exact."""
    if precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()


def set_tf32(enabled: bool) -> None:
    """Whether products of fp32 matrices on CUDA use TF32."""
    # The patch embedding is a convolution, which would use TF32 unasked.
    torch.backends.cudnn.allow_tf32 = enabled
    torch.set_float32_matmul_precision("high" if enabled else "highest")


@contextmanager
def tf32_products(device: torch.device, enabled: bool) -> Iterator[None]:
    """Products of fp32 matrices on `device` use TF32 or do not, whatever they do outside; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_tf32(enabled)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
