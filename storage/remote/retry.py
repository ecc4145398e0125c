"""Trying again: exponential backoff with full jitter, bounded in time.

Enters: an action and which of its errors may pass. Leaves: its value, or `GaveUp`. Costs: the first retry comes
after 0.05 s on average, later ones after 4 s.

Full jitter (a wait drawn from 0 … the ceiling; M. Brooker, "Exponential Backoff and Jitter", AWS 2015): many workers
that one failure hit together do not come back together.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Backoff:
    """total_s: no attempt begins later than this after the first. first_s, longest_s: ceilings of the first wait and
    of any; they double in between."""

    total_s: float = 120.0
    first_s: float = 0.1
    longest_s: float = 8.0

    def ceiling_s(self, attempt: int) -> float:
        """Longest wait after failed attempt number 0, 1, 2 …"""
        return float(min(self.longest_s, self.first_s * 2.0 ** min(attempt, 60)))


class GaveUp(Exception):
    """The time was up. Its cause is the last error."""

    def __init__(self, attempts: int, seconds: float) -> None:
        super().__init__(f"{attempts} attempts over {seconds:.0f} s")
        self.attempts, self.seconds = attempts, seconds


def retried(
    action: Callable[[], T],
    transient: Callable[[Exception], bool],
    backoff: Backoff,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    draw: Callable[[float, float], float] = random.uniform,
) -> T:
    """The value of `action`, called again after every error that `transient` says may pass.

    Raises the error at once where it may not, GaveUp where the next attempt would begin after `total_s`.
    """
    started = clock()
    attempt = 0
    while True:
        try:
            return action()
        except Exception as error:
            if not transient(error):
                raise
            wait = draw(0.0, backoff.ceiling_s(attempt))
            attempt += 1
            if clock() - started + wait > backoff.total_s:
                raise GaveUp(attempt, clock() - started) from error
        sleep(wait)
