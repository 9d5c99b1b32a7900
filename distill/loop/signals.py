"""Being asked to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from accelerate import Accelerator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """Raised in an evaluation when the run was asked to stop."""


class StopRequest:
    """Whether any process of the run was asked to stop."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator, self._made = accelerator, False

    def make(self) -> None:
        self._made = True

    def is_made(self) -> bool:
        """The same on all processes, which all call it, so that they leave together."""
        if self._made:
            self._accelerator.set_trigger()
        stop = self._accelerator.check_trigger()
        self._made |= stop  # never taken back: a signal that came meanwhile is for the next time
        return stop

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """The stop signals make it; a second SIGINT stops at once."""

        def request(number, frame):
            self.make()
            signal.signal(signal.SIGINT, signal.default_int_handler)

        previous = {number: signal.signal(number, request) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
