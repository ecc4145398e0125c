"""retry.py: as long as it may, never longer, and never twice where once was final. No time passes in these tests."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.storage.remote.retry import Backoff, GaveUp, retried


class Clock:
    """Stands still but for sleeps and for what an attempt takes."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Flaky:
    def __init__(self, clock: Clock, failures: int, takes_s: float = 0.0, error: Exception | None = None) -> None:
        self.clock, self.failures, self.takes_s = clock, failures, takes_s
        self.error = error or OSError("passing")
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        self.clock.now += self.takes_s
        if self.calls <= self.failures:
            raise self.error
        return "done"


def run(action: Flaky, backoff: Backoff, seed: int = 0) -> str:
    draw = random.Random(seed).uniform
    return retried(
        action, lambda e: "passing" in str(e), backoff, clock=action.clock, sleep=action.clock.sleep, draw=draw
    )


@given(failures=st.integers(0, 12), seed=st.integers(0, 99))
def test_waits_are_drawn_below_ceilings_that_double(failures: int, seed: int) -> None:
    action = Flaky(Clock(), failures)
    backoff = Backoff(total_s=1e9)
    assert run(action, backoff, seed) == "done"
    assert action.calls == failures + 1
    assert all(0 <= wait <= min(8.0, 0.1 * 2**n) for n, wait in enumerate(action.clock.slept))
    assert len(set(action.clock.slept)) == failures, "drawn, not fixed"


@given(total=st.floats(0, 300), takes=st.floats(0, 40), seed=st.integers(0, 99))
def test_no_attempt_begins_after_the_time_is_up(total: float, takes: float, seed: int) -> None:
    clock = Clock()
    action = Flaky(clock, 10**9, takes_s=takes) if total or takes else Flaky(clock, 1)
    if total and not takes:
        action.takes_s = 0.01
    with pytest.raises(GaveUp) as caught:
        run(action, Backoff(total_s=total), seed)
    assert caught.value.attempts == action.calls >= 1
    assert sum(clock.slept) <= total
    assert clock.now - 1000.0 <= total + action.takes_s + 1e-6
    assert str(caught.value.__cause__) == "passing"


def test_a_final_error_is_raised_at_once() -> None:
    action = Flaky(Clock(), 1, error=OSError("ACCESS_DENIED"))
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        run(action, Backoff())
    assert action.calls == 1
    assert action.clock.slept == []


def test_two_minutes_are_about_twenty_attempts() -> None:
    action = Flaky(Clock(), 10**9)
    with pytest.raises(GaveUp, match=r"\d+ attempts over 1[12]\d s"):
        run(action, Backoff())
    assert 20 <= action.calls <= 60
