"""What a recipe says of a student's losses: `losses` of a student, or of one phase of its curriculum.

Enters: a recipe's mapping. Leaves: frozen pydantic models. Costs: nothing; no torch.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stillroom.pipeline.student.schedules import Scheduled, Value, at, ends, extremes, shown
from stillroom.pipeline.student.section import Section as _Config


class JensenShannonConfig(_Config):
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q, of teacher p and student q."""

    weight: Scheduled = 0.0
    """Weight among the output losses, a number or a schedule."""

    mixing: float = Field(default=0.5, gt=0.0, lt=1.0)
    """β. 1/2: symmetric; towards 0 it goes like the forward KL, towards 1 like the reverse KL."""


class OutputConfig(_Config):
    """Weights of the losses on the teacher's output at the temperature, numbers or schedules; one that is not named has
    none."""

    forward_kl: Scheduled = 0.0
    """T² · KL(teacher ‖ student): the student covers all that the teacher says."""

    reverse_kl: Scheduled = 0.0
    """T² · KL(student ‖ teacher): the student avoids what the teacher finds unlikely."""

    js: JensenShannonConfig = JensenShannonConfig()
    """T² · generalised Jensen-Shannon divergence; a number alone is its weight."""

    tv: Scheduled = 0.0
    """T · total variation, ½ Σ |p − q|."""

    mse: Scheduled = 0.0
    """T² · Σ (p − q)², of softened probabilities. Its gradient is some V/2 times smaller than the KL's at high T."""

    cosine: Scheduled = 0.0
    """1 − cosine of raw logits over the whole vocabulary, which hidden states alone give."""

    @model_validator(mode="before")
    @classmethod
    def _weights_by_name(cls, given: Any) -> Any:
        if isinstance(given, str):
            raise ValueError(f"expected output losses with their weights, such as {{{given}: 1}}, got {given}")
        return given

    @field_validator("js", mode="before")
    @classmethod
    def _weight_alone(cls, js: Any) -> Any:
        ramp = isinstance(js, dict) and "from" in js
        return {"weight": js} if ramp or (isinstance(js, int | float) and not isinstance(js, bool)) else js

    @model_validator(mode="after")
    def _some(self) -> Self:
        negative = [name for name, weight in self.named().items() if extremes(weight)[0] < 0]
        if negative:
            raise ValueError(f"{negative[0]}: expected at least 0, got {shown(self.named()[negative[0]])}")
        # Ramps are monotone: if all are 0 at a step, they are at the first one or at the end.
        if not all(any(ends(weight)[i] > 0 for weight in self.named().values()) for i in (0, 1)):
            raise ValueError("every output loss has weight 0: give one a weight, or set alpha to 0")
        return self

    def named(self) -> dict[str, Value]:
        """Weight of each loss, those that never count included."""
        names = ("forward_kl", "reverse_kl", "tv", "mse", "cosine")
        return {name: getattr(self, name) for name in names} | {"js": self.js.weight}

    def names(self) -> list[str]:
        """Of the losses that count at any step."""
        return [name for name, weight in self.named().items() if extremes(weight)[1] > 0]

    def weights(self, step: int = 0, total_steps: int = 1) -> dict[str, float]:
        """Of the losses that count at step `step`, from 0, of so many; by name, at least one."""
        found = {name: at(weight, step, total_steps) for name, weight in self.named().items()}
        return {name: weight for name, weight in found.items() if weight > 0}


class LossConfig(_Config):
    """loss = alpha · Σ weight · output loss at temperature T + (1 − alpha) · cross-entropy on the text."""

    alpha: Scheduled = 0.7
    """Weight of the distillation term, a number or a schedule; the text's own next tokens get 1 − alpha."""

    signal: Literal["auto", "topk", "sampled", "hidden", "topk+sampled"] = "auto"
    """Which part of the store teaches. auto: hidden if it is there, else topk, else sampled. topk+sampled: the kept ids
    as they are, and the others as the draws among them say, without bias; forward KL at temperature 1."""

    temperature: Scheduled = 2.0
    """T, by which both models' logits are divided in the distillation term, a number or a schedule. 1 … 10."""

    output: OutputConfig = OutputConfig(forward_kl=1.0)
    """Which losses make the distillation term, and their weights. Left out: the forward KL alone."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the text's target that is spread evenly over the vocabulary."""

    fused: bool | Literal["auto"] = "auto"
    """Output head and loss together, in slices of positions, so that the logits of a batch never exist at once. auto:
    where the student's head is one that this can do; the log says which. false: the plain form."""

    @field_validator("alpha")
    @classmethod
    def _a_share(cls, alpha: Value) -> Value:
        low, high = extremes(alpha)
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(f"must lie in 0 … 1, got {shown(alpha)}")
        return alpha

    @field_validator("temperature")
    @classmethod
    def _on_the_grid(cls, temperature: Value) -> Value:
        low, high = extremes(temperature)
        if not (low >= 1.0 and high <= 10.0):
            raise ValueError(
                f"must lie in 1 … 10, got {shown(temperature)}: the store keeps the tail's log-partition for 1/T in "
                "0.1 … 1 only"
            )
        return temperature

    @property
    def distils(self) -> bool:
        """Whether the teacher's output is learned from at any step."""
        return extremes(self.alpha)[1] > 0

    def numbers(self) -> dict[str, Any]:
        """What defines the trained numbers. A field that came later counts where it is not at its default, so that what
        was trained before it came can go on."""
        stated = self.model_dump(mode="json")
        untouched = LossConfig().model_dump(mode="json")
        later = [key for key in ("output", "label_smoothing", "fused") if stated[key] == untouched[key]]
        return {key: value for key, value in stated.items() if key not in later}
