"""Being asked to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState

from distill.loop.host import on_any_process

STOP_FILE = "stop"  # in the folder of a run: where no signal gets through to the processes
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """Raised in an evaluation when the run was asked to stop."""


class Hopeless(ValueError):
    """Raised in an evaluation when what it found says that going on is no use; with what to do instead."""


class StopRequest:
    """Whether any process of the run was asked to stop, by a signal or by a file `stop` in its folder."""

    def __init__(self, output: Path):
        self._file, self._made = output / STOP_FILE, False

    def make(self) -> None:
        self._made = True

    def is_made(self) -> bool:
        """The same on all processes, which all call it, so that they leave together."""
        asked = PartialState().is_main_process and self._file.exists()
        stop = on_any_process(self._made or asked)
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
