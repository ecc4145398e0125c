"""The learning rate as a pure function of the step.

Enters: step and settings. Leaves: a rate. Costs: nothing. No state, so a resumed run has nothing to restore.
"""

from math import cos, pi
from typing import Literal

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
