"""What changes with the step, as pure functions of it: learning rate, temperature, alpha, loss weights.

Enters: step and settings. Leaves: a number. Costs: nothing. No state, so a resumed run has nothing to restore.

A value in a recipe is a number, or a `Ramp`. With t the step, from 0, and t_max where it ends (the chapter, §5.3):

    linear    value(t) = from + (to − from) · t / t_max
    cosine    value(t) = to + (from − to) / 2 · (1 + cos(π t / t_max))
    constant  value(t) = from
"""

from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, PlainSerializer

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate(
    step: int, *, total_steps: int, peak: float, warmup_steps: int, schedule: Schedule, min_ratio: float
) -> float:
    """Rate of optimizer step `step`, from 0.

    Rises linearly over the warm-up so that step `warmup_steps − 1` has the peak, then falls so that the last step
    has `min_ratio · peak`; `constant` stays at the peak.
    """
    assert 0 <= step < total_steps, (step, total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    span = total_steps - 1 - warmup_steps
    done = (step - warmup_steps) / span if span > 0 else 1.0
    left = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + cos(pi * done))
    return peak * (min_ratio + (1.0 - min_ratio) * left)


@dataclass(frozen=True)
class Ramp:
    """A value that goes from one number to another.

    steps: t_max, after which it stays at `end`; None: the last step of the run, or of its phase, has `end`.
    """

    start: float
    end: float
    shape: Schedule = "linear"
    steps: int | None = None

    #: What a recipe's reference calls it.
    WORDS = "{from, to, shape: linear | cosine | constant, steps}"

    def at(self, step: int, total_steps: int) -> float:
        """At step `step`, from 0, of so many."""
        last = self.steps or max(total_steps - 1, 1)
        done = min(step / last, 1.0)
        if self.shape == "constant":
            return self.start
        if self.shape == "linear":
            # Exact at both ends, where from + (to − from) · 1 may be off by a bit.
            return self.end if done == 1.0 else self.start + (self.end - self.start) * done
        return self.end + (self.start - self.end) / 2 * (1.0 + cos(pi * done))


#: A number that stays, or one that changes over the steps.
Value = float | Ramp


def at(value: Value, step: int, total_steps: int) -> float:
    """The number at step `step`, from 0, of so many."""
    return value.at(step, total_steps) if isinstance(value, Ramp) else value


def extremes(value: Value) -> tuple[float, float]:
    """The smallest and the largest number that it takes: every shape is monotone."""
    if not isinstance(value, Ramp):
        return value, value
    return min(value.start, value.end), max(value.start, value.end)


def ends(value: Value) -> tuple[float, float]:
    """The number at the first step, and the one that it ends at."""
    return (value.start, value.end) if isinstance(value, Ramp) else (value, value)


def shown(value: Value) -> str:
    """For messages: `4`, `6 → 2`."""
    if not isinstance(value, Ramp) or value.start == value.end:
        return f"{extremes(value)[0]:g}"
    return f"{value.start:g} → {value.end:g}"


def _read(given: Any) -> Any:
    """A recipe's number or mapping. Raises ValueError in one line."""
    if isinstance(given, Ramp) or (isinstance(given, (int, float)) and not isinstance(given, bool)):
        return given
    if not isinstance(given, dict):
        raise ValueError(f"expected a number, or {Ramp.WORDS}, got {given!r}")
    unknown = sorted(map(str, given.keys() - {"from", "to", "shape", "steps"}))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]}; expected {Ramp.WORDS}")
    shape, steps = given.get("shape", "linear"), given.get("steps")
    if shape not in get_args(Schedule):
        raise ValueError(f"shape is {shape!r}, expected linear, cosine or constant")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"steps is {steps!r}, expected a whole number, at least 1, or null")
    start = _number("from", given)
    end = start if shape == "constant" and "to" not in given else _number("to", given)
    if shape == "constant" and end != start:
        raise ValueError(f"shape is constant, but from is {start:g} and to is {end:g}")
    return Ramp(start, end, shape, steps)


def _number(key: str, given: dict[str, Any]) -> float:
    value = given.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise ValueError(f"{key} is {value!r}, expected a number in {Ramp.WORDS}")
    return float(value)


def _written(value: Value) -> Any:
    if not isinstance(value, Ramp):
        return value
    return {"from": value.start, "to": value.end, "shape": value.shape, "steps": value.steps}


#: A field of a recipe that is a `Value`.
Scheduled = Annotated[Value, BeforeValidator(_read), PlainSerializer(_written)]
