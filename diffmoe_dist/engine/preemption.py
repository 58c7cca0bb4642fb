"""Requests to stop: the signals of schedulers, launchers and people. Imported before torch, so it imports little.

A signal is only noted. At the next step boundary all ranks agree on it (with the reduction of the losses, so it costs
no collective), save, and leave; see `Trainer.train`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from diffmoe_dist.errors import STOPPED_EXIT_CODE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

# With these a launcher ends the other processes when one has failed; schedulers ask for a save with SIGUSR1 and 2.
_END_SIGNALS = (signal.SIGTERM.name, signal.SIGINT.name)

# A launcher passes on what the terminal or the scheduler has sent to every process already: one request, two signals.
_REPEAT_SECONDS = 1.0


class StopSignals:
    """Notes the first stop signal; a second one ends the process at once, with exit code 128 + its number.

    A thread reads the signals from a pipe, because Python's own handlers wait for the main thread, and that may be
    inside a collective that never ends.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # the name of the first signal
        self._since = 0.0
        self._leaves_at_once = False
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in STOP_SIGNALS:
            signal.signal(number, _note_nothing)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="stop signals", daemon=True).start()

    def asked(self) -> bool:
        return self.received is not None

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Obey SIGTERM and SIGINT at once, also one that has come already; nothing is there that could be saved.

        For the wait until the ranks have met: who sends them has often ended a rank that the others would wait for.
        """
        self._leaves_at_once = True
        self._leave_if_told()
        try:
            yield
        finally:
            self._leaves_at_once = False

    def ignore(self) -> None:
        """From here on signals change nothing: everything is saved, and the ranks are parting."""
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _read(self) -> None:
        while True:
            for number in os.read(self._reader, 64):
                if number in STOP_SIGNALS:
                    self._receive(signal.Signals(number))

    def _receive(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = received.name, now
            self._leave_if_told()
        elif now > self._since + _REPEAT_SECONDS:
            sys.stderr.write(f"{received.name} after {self.received}: leaving at once, without a checkpoint\n")
            sys.stderr.flush()
            os._exit(128 + received)

    def _leave_if_told(self) -> None:
        if self._leaves_at_once and self.received in _END_SIGNALS:
            sys.stderr.write(f"{self.received} before the ranks have met: leaving at once, with nothing to save\n")
            sys.stderr.flush()
            os._exit(STOPPED_EXIT_CODE)


def _note_nothing(number: int, frame: object) -> None:
    """A handler in Python, so that the number of the signal goes to the pipe."""
