"""The simulated device notices what a GPU would: else the tests beside this one could not fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.accelerator.simulator import DEVICE, on_device, simulate, values_of


def numbers() -> Tensor:
    return on_device(torch.tensor([3.0, 1.0, 2.0]))


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "a branch": lambda x: bool(x.sum() > 0),
    "a copy to the host": lambda x: x.cpu(),
    "a copy into a tensor of the host": lambda x: torch.empty(3).copy_(x),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "indexing by a mask": lambda x: x[x > 1],
    "writing by a mask": lambda x: x.__setitem__(x > 1, x.new_zeros(2)),
    "repeats of an unknown number": lambda x: torch.repeat_interleave(x.long()),
    "grouped_mm in fp32": lambda x: F.grouped_mm(x.new_ones(2, 4), x.new_ones(1, 4, 4), offs=x[2:].int()),
}
NO_WAIT: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2).sum(),
    "a copy that is told not to wait": lambda x: torch.empty(3).copy_(x, non_blocking=True),
    "filling by a mask": lambda x: x.masked_fill(x > 1, 0.0),
    "repeats of a known number": lambda x: torch.repeat_interleave(x.long(), output_size=6),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_for_the_device_is_noticed(what: str) -> None:
    x = numbers()
    with simulate() as log:
        WAITS[what](x)
    assert len(log.waits) == 1 and log.faults == []


@pytest.mark.parametrize("what", NO_WAIT)
def test_what_does_not_wait_is_no_wait(what: str) -> None:
    x = numbers()
    with simulate() as log:
        NO_WAIT[what](x)
    assert log.waits == log.faults == []


def test_kernels_are_told_from_views_and_forward_from_backward() -> None:
    w = numbers().requires_grad_()
    with simulate() as log:
        (w.view(1, 3) * w.detach()[None]).sum().backward()
    assert [(kernel.op, kernel.backward) for kernel in log.kernels] == [
        ("mul", False), ("sum", False), ("ones_like", False), ("mul", True),
    ]  # fmt: skip
    assert w.grad is not None and values_of(w.grad).tolist() == [3.0, 1.0, 2.0]


def test_a_tensor_made_from_numbers_of_the_host_is_a_copy() -> None:
    with simulate() as log:
        made = torch.tensor([1.0, 2.0], device=DEVICE)
        torch.zeros(2, device=DEVICE).copy_(torch.ones(2))
        torch.ones(2).to(DEVICE)
    assert len(log.copies) == 3 and log.waits == log.faults == []
    assert values_of(made).tolist() == [1.0, 2.0]


def test_a_mixture_of_devices_is_a_fault_unless_the_host_gives_one_number() -> None:
    x = numbers()
    with simulate() as log:
        x * torch.tensor(2.0)
        assert log.faults == []
        x * torch.ones(3)
    assert len(log.faults) == 1 and "mixes devices" in log.faults[0]


def test_a_topk_of_no_rows_is_a_fault() -> None:
    x = on_device(torch.zeros(0, 8))
    with simulate() as log:
        x.topk(2, dim=-1)
    assert "topk of no rows" in log.faults[0]


def test_memory_that_grouped_mm_would_refuse_on_cuda_is_a_fault() -> None:
    x, ends = torch.ones(4, 64).bfloat16(), torch.tensor([2, 4], dtype=torch.int32)
    storage = torch.ones(2 * 64 * 64 + 8).bfloat16()
    for offset, faults in ((8, 0), (4, 1)):
        weights = storage[offset:][: 2 * 64 * 64].view(2, 64, 64)
        with simulate() as log:
            F.grouped_mm(on_device(x), on_device(weights), offs=on_device(ends))
        assert len(log.faults) == faults and log.waits == []


def test_groups_along_a_contiguous_dimension_are_a_fault_of_grouped_mm() -> None:
    x, ends = torch.ones(64, 64).bfloat16(), on_device(torch.tensor([24, 64], dtype=torch.int32))
    for first, second, faults in ((x.T, x, 0), (x, x, 1), (x.T, x.T, 1)):
        with simulate() as log:
            F.grouped_mm(on_device(first), on_device(second), offs=ends)
        assert len(log.faults) == faults
