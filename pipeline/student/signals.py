"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, leave.

Enters: signals. Leaves: `requested`, or KeyboardInterrupt at a place where nothing is lost. Costs: nothing. A second
signal interrupts at once: the run then resumes from the checkpoint before.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether a signal asked the run to end."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.requested, self._quiet = False, quiet

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal came in."""
        if self.requested:
            raise KeyboardInterrupt

    def _received(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._quiet:
            return
        print(
            f"{signal.Signals(number).name}: ending where nothing is lost; again to end at once",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def stopping(*, quiet: bool = False) -> Iterator[Stop]:
    """Handle both signals while open; what handled them before does so again after. quiet: without a word."""
    stop = Stop(quiet=quiet)
    before = {number: signal.signal(number, stop._received) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
