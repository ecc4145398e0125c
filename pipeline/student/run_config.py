"""What a recipe says of how a student is trained, beside its losses: which checkpoint is kept, which weights
are trained.

Enters: a recipe's mapping. Leaves: frozen pydantic models. Costs: nothing; no torch.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from stillroom.pipeline.student.section import Section

#: Of a forward and its backward.
Precision = Literal["auto", "float32", "bfloat16", "float16"]

Metric = Literal["kl", "perplexity", "ece", "top1", "top5"]


class KeepBest(Section):
    """Keep the best checkpoint, and export it in place of the last; the metric alone says the same."""

    metric: Metric
    """Of the held-out split, by which evaluations are compared: kl, perplexity and ece the less the better, top1 and
    top5 the more."""

    @staticmethod
    def metrics() -> tuple[str, ...]:
        """Those that there are."""
        return get_args(Metric)


class LoraConfig(Section):
    """Train small matrices beside some of the student's own, and nothing else; the export has them merged."""

    rank: int = Field(default=16, ge=1)
    """Of each product B A."""

    alpha: float | None = Field(default=None, gt=0.0)
    """The product counts alpha / rank. null: twice the rank."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """On what A is given."""

    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Layers that are adapted, by the last part of their name (q_proj, v_proj, …). all-linear: every linear layer but
    the output head."""

    @property
    def alpha_or_default(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha


class PlateauConfig(Section):
    """The held-out loss no longer falls."""

    metric: Literal["kl", "perplexity"] = "kl"
    """Of the held-out split, to the teacher or to the text."""

    patience: int = Field(default=3, ge=1)
    """Evaluations in a row without an improvement."""

    min_improvement: float = Field(default=0.01, ge=0.0, lt=1.0)
    """What counts as one: to lie below the best value before by more than this share of it."""


class AdvanceConfig(Section):
    """Ends training before `steps` are done, when the student has learned enough; looked at after each evaluation."""

    plateau: PlateauConfig | None = None
    """The held-out loss no longer falls. null: not looked at."""

    gap: float | None = Field(default=None, gt=0.0)
    """Held-out KL to the teacher, in nats, at which the student is near enough. null: not looked at."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.plateau is None and self.gap is None:
            raise ValueError("expected plateau, gap, or both")
        return self
