"""How far a run is: what a checkpoint says beside weights, moments and generators.

Enters: counters of steps, metrics of evaluations. Leaves: one frozen value, which goes through JSON and back. Costs:
nothing. Who changes it: `training` counts steps, `best` and `advance` judge evaluations, `session` sets `before`.
"""

from dataclasses import dataclass, field
from typing import Any, TypedDict


class Best(TypedDict):
    """step: after so many. value: of the metric. metrics: all of that evaluation."""

    step: int
    metric: str
    value: float
    metrics: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    step: optimizer steps done. packs: the stream's cursor, packs consumed over all epochs.
    tokens: real tokens read; trained: positions that carried loss. seconds: spent in training; waited: those of them
    in which a step waited for its packs.
    skipped: steps left out (loss not finite, or nothing to learn). loss: of the last step that was not.
    before: metrics before training.
    scaler: state of the loss' scale, in float16; scaler_skipped: steps that overflowed under it.
    best: the best evaluation so far, of a run that keeps it (`best`).
    evaluations: on the way so far, of a run with `advance` (`advance.Evaluation`). advanced: its decision, and the
    metrics of that evaluation.
    owes_evaluation: stopped at a step after which an evaluation was due and did not come.
    """

    step: int = 0
    packs: int = 0
    tokens: int = 0
    trained: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    skipped: int = 0
    loss: float | None = None
    before: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    scaler_skipped: int = 0
    best: Best | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    advanced: dict[str, Any] | None = None
    owes_evaluation: bool = False
