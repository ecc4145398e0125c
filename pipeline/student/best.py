"""Which evaluation was the best, and its checkpoint.

Enters: `keep_best` of a student, metrics of evaluations. Leaves: the best one so far, as part of `Progress`; its
weights once more at the end. Costs: a checkpoint beside the last ones.

Evaluations count from the first step on; that after the last one counts too. Of equal ones the earlier is kept: it is
the better once training has begun to overfit, and what follows does not depend on when a run was interrupted.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillroom.pipeline.student.config import KeepBest
from stillroom.pipeline.student.progress import Best, Progress
from stillroom.storage.errors import StudentError

#: Metrics of which more is better; of the others less is.
RISING = frozenset({"top1", "top5"})


def require_measured(wanted: KeepBest, metrics: dict[str, Any] | None) -> None:
    """Raises StudentError where evaluations do not give what the best is chosen by.

    metrics: of an evaluation; None where nothing is held out.
    """
    if metrics is None:
        raise StudentError(
            f"keep_best.metric is {wanted.metric}, and the corpus has no held-out positions to measure it on: set "
            "corpus.heldout, or leave out keep_best"
        )
    if metrics[wanted.metric] is None:
        measured = [name for name in type(wanted).metrics() if metrics[name] is not None]
        raise StudentError(
            f"keep_best.metric is {wanted.metric}, which the store does not determine: choose {' or '.join(measured)}"
        )


def better(wanted: KeepBest, step: int, metrics: dict[str, Any], than: Best | None) -> Best | None:
    """The evaluation after `step` steps if it is better than the best before, else None. NaN is never better."""
    value = metrics[wanted.metric]
    if step == 0 or value is None or math.isnan(value):
        return None
    found = Best(step=step, metric=wanted.metric, value=value, metrics=metrics)
    if than is None:
        return found
    rises = wanted.metric in RISING
    return found if (value > than["value"] if rises else value < than["value"]) else None


def judged(wanted: KeepBest | None, progress: Progress, metrics: dict[str, Any] | None) -> Progress:
    """With the evaluation after `progress.step` steps as the best, if it is that."""
    if wanted is None or metrics is None:
        return progress
    found = better(wanted, progress.step, metrics, progress.best)
    return progress if found is None else replace(progress, best=found)


def stated(best: Best | None) -> dict[str, Any] | None:
    """Of a run's result: step, metric and value."""
    return None if best is None else {"step": best["step"], "metric": best["metric"], "value": best["value"]}


def lost(path: Path, fault: str, last: int) -> str:
    """The notice on a best checkpoint that is not what was written."""
    return (
        f"the best checkpoint, {path}, is damaged ({fault}): the export holds the weights after the last step, {last}, "
        "instead; `best` of the result is null"
    )
