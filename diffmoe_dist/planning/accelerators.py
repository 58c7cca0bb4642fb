"""What accelerators can do at most, from their data sheets: for plans, and for how much of it a run achieves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffmoe_dist.config import Config

# Dense (no sparsity), SXM boards.
_AMPERE = {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}
_HOPPER = {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}


@dataclass(frozen=True)
class Accelerator:
    name: str
    device_names: tuple[str, ...]  # what torch calls boards with this arithmetic
    peak_flops: dict[str, float]  # floating-point operations a second, by the format of the matrix products
    memory_bytes: int  # what torch reports, rounded down to GiB
    memory_bandwidth: float  # bytes a second
    nvlink: float  # bytes a second in one direction, all links of a GPU together
    network: float  # bytes a second in one direction: one network card a GPU; an assumption, clusters differ


_GIB = 2**30
ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator(
            "A100-80",
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-40GB"),
            _AMPERE, 79 * _GIB, 2.0e12, 300e9, 25e9,
        ),
        Accelerator(
            "A800-80", ("NVIDIA A800-SXM4-80GB", "NVIDIA A800 80GB PCIe"), _AMPERE, 79 * _GIB, 2.0e12, 200e9, 25e9
        ),
        Accelerator("H100-80", ("NVIDIA H100 80GB HBM3",), _HOPPER, 79 * _GIB, 3.35e12, 450e9, 50e9),
        Accelerator("H800-80", ("NVIDIA H800",), _HOPPER, 79 * _GIB, 3.35e12, 200e9, 50e9),
        Accelerator("H200-141", ("NVIDIA H200",), _HOPPER, 139 * _GIB, 4.8e12, 450e9, 50e9),
    )
}  # fmt: skip


def matmul_format(config: Config) -> str:
    """The number format in which a run computes most of a model's matrix products: bf16, tf32 or fp32."""
    if config.precision != "fp32":
        return "bf16"
    return "tf32" if config.tf32 else "fp32"


def device_peak(device: torch.device, config: Config) -> float | None:
    """Peak floating-point operations a second of the device at hand; None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [accelerator for accelerator in ACCELERATORS.values() if name in accelerator.device_names]
    return known[0].peak_flops[matmul_format(config)] if known else None


def model_flop_utilization(flops_per_image: float, images_per_second: float, ranks: int, peak: float) -> float:
    """MFU: the arithmetic that the model needs, over what all devices could do in the same time.

    Args:
        peak: floating-point operations a second of one device.
    """
    return flops_per_image * images_per_second / (ranks * peak)
