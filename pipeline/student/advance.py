"""Whether a student has learned enough to go on from: to the next stage of a recipe, or to the end.

Enters: `advance` of a student, its evaluations. Leaves: a `Decision` with its numbers, or None: train on. Costs:
nothing; a pure function of the evaluations, so that a resumed run decides alike.

The chapter, §5.5: fixed steps (`steps` of the student, which also bounds the other two), a plateau of the validation
loss, a threshold of the gap between student and teacher.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stillroom.pipeline.student.progress import Progress
from stillroom.pipeline.student.run_config import AdvanceConfig
from stillroom.storage.errors import StudentError


@dataclass(frozen=True)
class Evaluation:
    """value: of the plateau's metric. kl: nats to the teacher; each None where it was not measured."""

    step: int
    value: float | None
    kl: float | None


@dataclass(frozen=True)
class Decision:
    """Why training ended after `step` steps.

    reason: plateau or gap. metric, value: what was looked at. than: what it was held against: the best before the
    plateau, or the gap's threshold. evaluations: since that best; of the gap 1.
    """

    step: int
    reason: str
    metric: str
    value: float
    than: float
    evaluations: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        if self.reason == "gap":
            return f"advances after step {self.step}: held-out KL {self.value:.4f} is at most advance.gap {self.than:g}"
        return (
            f"advances after step {self.step}: held-out {self.metric} {self.value:.4f}, and none of the last "
            f"{self.evaluations} evaluations was below the best, {self.than:.4f}, by advance.plateau.min_improvement"
        )


def evaluation(config: AdvanceConfig, step: int, metrics: dict[str, Any]) -> Evaluation:
    """Of a run's metrics what the criteria look at."""
    metric = config.plateau.metric if config.plateau else "kl"
    return Evaluation(step, metrics.get(metric), metrics.get("kl"))


def decide(config: AdvanceConfig, evaluations: Sequence[Evaluation]) -> Decision | None:
    """By the last of the evaluations, which are in the order of their steps.

    gap: its KL is at most the threshold. plateau: for `patience` evaluations in a row none has improved on the best
    before it by more than the share `min_improvement` of that best. NaN never improves. The gap is looked at first.
    """
    if not evaluations:
        return None
    last = evaluations[-1]
    if config.gap is not None and last.kl is not None and last.kl <= config.gap:
        return Decision(last.step, "gap", "kl", last.kl, config.gap, 1)
    if config.plateau is None:
        return None
    best, since = math.inf, 0
    for found in evaluations:
        value = math.inf if found.value is None or math.isnan(found.value) else found.value
        improved = value < best if math.isinf(best) else best - value > config.plateau.min_improvement * abs(best)
        best, since = (value, 0) if improved else (best, since + 1)
    if since < config.plateau.patience or math.isinf(best):
        return None
    assert last.value is not None
    return Decision(last.step, "plateau", config.plateau.metric, last.value, best, since)


def require_heldout(empty: bool) -> None:
    """Raises StudentError where nothing is held out: `empty`."""
    if empty:
        raise StudentError(
            "advance looks at evaluations, and the corpus has no held-out documents: set corpus.heldout, or leave "
            "out advance"
        )


def decided(
    wanted: AdvanceConfig | None, progress: Progress, metrics: dict[str, Any] | None
) -> tuple[Progress, Decision | None]:
    """With the evaluation after `progress.step` steps, and the decision to end there, if they all say that."""
    if wanted is None or metrics is None:
        return progress, None
    seen = [*progress.evaluations, asdict(evaluation(wanted, progress.step, metrics))]
    progress, decision = replace(progress, evaluations=seen), decide(wanted, [Evaluation(**row) for row in seen])
    if decision is not None:
        progress = replace(progress, advanced={**decision.as_dict(), "metrics": metrics})
    return progress, decision


def stated(advanced: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a run's result: the decision, without the metrics."""
    return None if advanced is None else {key: value for key, value in advanced.items() if key != "metrics"}
