"""Mixed precision: products in bf16 over fp32 weights, by torch's autocast, and where they stay in fp32.

Autocast rounds the operands of each product as it is computed, and leaves everything else in the type it has: norms,
the residual stream and the sum of the experts' outputs are in fp32, as the weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

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
