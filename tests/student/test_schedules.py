"""The learning rate at its corners; temperatures against the chapter's formulas; what a recipe may say."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from stillroom.pipeline.student.schedules import Schedule, Scheduled, Value, at, extremes, learning_rate, shown


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


class Holder(BaseModel):
    value: Scheduled = 1.0


def read(value: Any) -> Value:
    return Holder(value=value).value


@pytest.mark.parametrize("steps", [None, 8])
def test_temperature_follows_the_chapters_formulas_step_by_step(steps: int | None) -> None:
    """§5.3, from 6 to 2 (§7.5) in t_max = 8: written out here, not computed by the code under test."""
    linear = [6.0, 5.5, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0]
    # T_end + (T_start − T_end) / 2 · (1 + cos(π t / 8)): cos(π/8) = 0.92388, cos(π/4) = 0.70711, cos(3π/8) = 0.38268
    cosine = [6.0, 5.84776, 5.41421, 4.76537, 4.0, 3.23463, 2.58579, 2.15224, 2.0]
    total = 9 if steps is None else 12
    for shape, expected in (("linear", linear), ("cosine", cosine), ("constant", [6.0] * 9)):
        ramp = read({"from": 6, "to": 6 if shape == "constant" else 2, "shape": shape, "steps": steps})
        found = [at(ramp, step, total) for step in range(total)]
        assert found[:9] == pytest.approx(expected, abs=1e-5)
        assert found[8:] == [expected[8]] * (total - 8), "after t_max it stays"
        assert found[0] == expected[0]


@given(
    start=st.floats(0, 10), end=st.floats(0, 10), total=st.integers(1, 50), steps=st.none() | st.integers(1, 60),
    shape=st.sampled_from(["linear", "cosine"]),
)  # fmt: skip
def test_a_ramp_stays_between_its_ends(start: float, end: float, total: int, steps: int | None, shape: str) -> None:
    ramp = read({"from": start, "to": end, "shape": shape, "steps": steps})
    low, high = extremes(ramp)
    values = [at(ramp, step, total) for step in range(total)]
    assert values[0] == pytest.approx(start)
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    assert values in (sorted(values), sorted(values, reverse=True))
    if total > 1 and steps is None:
        assert values[-1] == end


def test_a_number_is_a_schedule_of_its_own() -> None:
    assert read(3) == 3.0
    assert at(3.0, 7, 9) == 3.0
    assert extremes(3.0) == (3.0, 3.0)
    assert (shown(4.0), shown(read({"from": 6, "to": 2}))) == ("4", "6 → 2")


@pytest.mark.parametrize("value", [0.7, {"from": 6, "to": 2}, {"from": 1, "to": 3, "shape": "cosine", "steps": 5}])
def test_a_schedule_reads_back_from_what_is_written(value: Any) -> None:
    held = Holder(value=value)
    assert Holder.model_validate_json(held.model_dump_json()) == held


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("6", "expected a number, or {from, to"),
        (True, "expected a number"),
        ([6, 2], "expected a number"),
        ({"from": 6}, "to is None, expected a number"),
        ({"from": "6", "to": 2}, "from is '6'"),
        ({"from": 6, "to": float("nan")}, "to is nan"),
        ({"from": 6, "to": 2, "shape": "step"}, "expected linear, cosine or constant"),
        ({"from": 6, "to": 2, "steps": 0}, "at least 1"),
        ({"from": 6, "to": 2, "steps": 2.5}, "a whole number"),
        ({"from": 6, "to": 2, "until": 3}, "unknown key until"),
        ({"from": 6, "to": 2, "shape": "constant"}, "shape is constant, but from is 6 and to is 2"),
    ],
)
def test_what_is_no_schedule(value: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Holder(value=value)
