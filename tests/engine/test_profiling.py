"""Seconds of the parts of a step."""

from __future__ import annotations

import pytest
import torch

from diffmoe_dist.engine.profiling import Timings


class Device:
    """One whose clock the test turns; its events are done when the clock has come to them."""

    def __init__(self) -> None:
        self.now = 0.0  # what it has come to, in ms
        self.queued = 0.0  # the end of what the host has asked for

    def event(self, enable_timing: bool) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = self.device.queued

    def query(self) -> bool:
        return self.at <= self.device.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at

    def synchronize(self) -> None:
        pytest.fail("the host waited")


def test_the_parts_on_a_gpu_are_told_without_a_wait_and_what_is_not_done_yet_is_told_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    timings = Timings(torch.device("cuda"))
    for _ in range(2):
        for part, milliseconds in (("forward", 10), ("optimizer", 40)):
            with timings.part(part):
                device.queued += milliseconds
    device.now = 60.0

    first = timings.mean_since_last(2)
    assert (first["seconds_forward"], first["seconds_optimizer"]) == (0.010, 0.020)
    device.now = device.queued
    rest = timings.mean_since_last(1)
    assert (rest["seconds_forward"], rest["seconds_optimizer"]) == (0.0, 0.040)
