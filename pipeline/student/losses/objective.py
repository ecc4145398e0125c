"""What is minimised at a step: the output losses' weights, temperature, alpha, label smoothing, as plain numbers.

Enters: a recipe's `losses` at a step. Leaves: an `Objective`, and its distillation loss of N positions whatever part of
the store teaches. Costs: those of the losses.

    total = alpha · Σ_j w_j · c_j(T) · L_j(teacher, student at T) + (1 − alpha) · CE(label-smoothed, at T = 1)

c_j is the factor that keeps the gradient's size as T grows, see `divergences`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from stillroom.pipeline.student.losses.buckets import Buckets
from stillroom.pipeline.student.losses.divergences import (
    cosine,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    squared_error,
    total_variation,
)
from stillroom.pipeline.student.losses.targets import Targets
from stillroom.pipeline.student.losses_config import LossConfig
from stillroom.pipeline.student.schedules import at


@dataclass(frozen=True)
class Objective:
    """alpha: 0 … 1. temperature: 1 … 10. weights: of the output losses by their names in a recipe, each above 0; at
    least
    one where alpha > 0. mixing: β of js. label_smoothing: 0 ≤ ε < 1."""

    alpha: float
    temperature: float
    weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({"forward_kl": 1.0}))
    mixing: float = 0.5
    label_smoothing: float = 0.0

    @staticmethod
    def of(losses: LossConfig, step: int = 0, total_steps: int = 1) -> "Objective":
        """At optimizer step `step`, from 0, of so many."""
        return Objective(
            alpha=at(losses.alpha, step, total_steps),
            temperature=at(losses.temperature, step, total_steps),
            weights=losses.output.weights(step, total_steps),
            mixing=losses.output.js.mixing,
            label_smoothing=losses.label_smoothing,
        )

    @property
    def distils(self) -> bool:
        return self.alpha > 0

    @property
    def reads_text(self) -> bool:
        """Whether the cross-entropy counts."""
        return self.alpha < 1

    def factor(self, name: str) -> float:
        """c_j(T)."""
        return {"tv": self.temperature, "cosine": 1.0}.get(name, self.temperature**2)

    def whole_vocabulary(self, log_p_NV: Tensor, log_q_NV: Tensor, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
        """Σ_j w_j · c_j · L_j over V ids. [N]. teacher_NV, student_NV: logits, raw or at the temperature."""
        return self._sum(log_p_NV, log_q_NV, None, teacher_NV, student_NV)

    def buckets(self, found: Buckets) -> Tensor:
        """The same over the kept ids and the tail bucket. [N]. cosine: of the kept ids, which must be all."""
        return self._sum(found.log_p, found.log_q, found.sizes, found.teacher, found.student)

    def _sum(
        self, log_p_NB: Tensor, log_q_NB: Tensor, sizes_NB: Tensor | None, teacher_NK: Tensor, student_NK: Tensor
    ) -> Tensor:
        parts = []
        for name, weight in self.weights.items():
            if name == "cosine":
                part_N = cosine(teacher_NK, student_NK)
            elif name == "js":
                part_N = jensen_shannon(log_p_NB, log_q_NB, mixing=self.mixing)
            elif name == "mse":
                part_N = squared_error(log_p_NB, log_q_NB, sizes_NB)
            else:
                part_N = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "tv": total_variation}[name](
                    log_p_NB, log_q_NB
                )
            scale = weight * self.factor(name)
            parts.append(part_N if scale == 1.0 else scale * part_N)
        total_N = parts[0]
        for part_N in parts[1:]:
            total_N = total_N + part_N
        return total_N


def sparse_loss(logits_NV: Tensor, targets: Targets, *, objective: Objective) -> Tensor:
    """Σ_n w_n · (output losses)_n on the kept ids and one bucket for all others, a scalar. The plain form: autograd on
    the student's logits [N, V] of the real vocabulary, which alone get a gradient."""
    assert targets.ids is not None
    assert targets.logits is not None
    assert targets.tail_lse is not None
    found = Buckets.of(logits_NV, targets.ids, targets.logits, targets.tail_lse, temperature=objective.temperature)
    loss_N = objective.buckets(found)
    return (loss_N * targets.weights.to(loss_N.dtype)).sum()
