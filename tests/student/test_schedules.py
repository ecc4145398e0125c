"""The learning rate at its corners."""

from itertools import pairwise

import pytest

from stillroom.pipeline.student.schedules import Schedule, learning_rate


def rates(schedule: Schedule, *, total: int = 20, warmup: int = 4, ratio: float = 0.1) -> list[float]:
    return [
        learning_rate(step, total_steps=total, peak=2.0, warmup_steps=warmup, schedule=schedule, min_ratio=ratio)
        for step in range(total)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: Schedule) -> None:
    assert rates(schedule)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.2), ("linear", 0.2), ("constant", 2.0)])
def test_the_last_step_has_the_lowest_rate(schedule: Schedule, last: float) -> None:
    falling = rates(schedule)[4:]
    assert falling[-1] == pytest.approx(last)
    assert all(a >= b for a, b in pairwise(falling))


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert rates("cosine", total=21, warmup=0)[10] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))


def test_a_run_of_one_step_and_one_all_warm_up() -> None:
    assert rates("cosine", total=1, warmup=0) == [pytest.approx(0.2)]
    assert rates("cosine", total=3, warmup=5) == pytest.approx([0.4, 0.8, 1.2])
