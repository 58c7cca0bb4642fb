"""Memory that a step frees serves the next one."""

from __future__ import annotations

import ctypes
import platform
import resource

import pytest
import torch

from diffmoe_dist.launch import Launch
from diffmoe_dist.parallel import topology
from tests.distributed import run_ranks

MB = 2**20


def page_faults(rank: int, ranks: int, keep: bool) -> int:
    """Of eight steps that take and free 96 MB, after two others."""
    if keep:
        topology.choose_device("cpu", Launch(0, 1, 0, "single"))

    def step() -> None:
        kept = [torch.ones(size * MB // 4) for size in (64, 32)]
        del kept

    step()
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_on_a_cpu_the_memory_that_a_step_frees_is_not_taken_from_the_system_anew() -> None:
    [kept], [given_back] = (run_ranks(1, page_faults, keep) for keep in (True, False))
    assert kept < given_back / 8, "at most the memory of one of the eight"


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("asked the C library"))
    topology.keep_freed_memory()
