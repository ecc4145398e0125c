"""What a recipe says of feature losses.

Enters: a recipe's mapping. Leaves: frozen pydantic models. Costs: nothing; no torch.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stillroom.pipeline.student.schedules import Scheduled, Value, extremes
from stillroom.pipeline.student.section import Section

Named = Literal["uniform", "top_heavy", "last", "every_k"]
Pair = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
Map = Named | Annotated[tuple[Pair, ...], Field(min_length=1)]


class _Weighted(Section):
    weight: Scheduled = 0.1
    """Its share of the loss, a number or a schedule. 0.1 … 0.5 is usual for hidden states."""

    @field_validator("weight")
    @classmethod
    def _not_negative(cls, weight: Value) -> Value:
        if extremes(weight)[0] < 0:
            raise ValueError(f"expected at least 0, got {extremes(weight)[0]:g}")
        return weight


class _Mapped(_Weighted):
    map: Map = "uniform"
    """Which of the student's layers learns from which of the teacher's that the store holds: uniform, top_heavy, last,
    every_k; or pairs [student, teacher], numbered as transformers numbers them."""
    every: int = Field(default=4, ge=1)
    """k, where map is every_k."""

    @field_validator("map", mode="before")
    @classmethod
    def _pairs(cls, given: Any) -> Any:
        # Said here: of a list in a list pydantic would say what each place lacks.
        if isinstance(given, str):
            return given
        if not isinstance(given, list | tuple) or not given:
            raise ValueError(f"expected a name or pairs [student, teacher], got {given!r}")
        for pair in given:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(n) is int and n >= 0 for n in pair):
                raise ValueError(f"expected pairs [student, teacher] of layer numbers from 0, got {pair!r}")
        return given


class HiddenFeature(_Mapped):
    """Hidden states between blocks: signal.layers must hold them."""

    loss: Literal["mse", "cosine"] = "mse"
    """Of a position: the mean over channels of the squared difference, or 1 − cosine."""
    projection: Literal["auto", "linear", "none"] = "auto"
    """A learned matrix for each pair, from the student's width to the teacher's. auto: where the widths differ."""


class AttentionFeature(_Mapped):
    """Attention maps: signal.attention must hold them. The student then runs with eager attention, which computes maps
    in full: slower, and with memory that grows with the square of the window."""

    heads: Literal["per_head", "mean"] = "mean"
    """per_head: each of the student's heads learns from its namesake. mean: of the maps averaged over heads, for models
    with different numbers of them."""
    loss: Literal["kl"] = "kl"
    """KL(teacher ‖ student) of each position's weights, summed over heads and layers."""


class EmbeddingsFeature(_Weighted):
    """What enters the first block: signal.embeddings must have kept it."""

    loss: Literal["mse", "cosine"] = "mse"
    """As of hidden states."""
    projection: Literal["auto", "linear", "none"] = "auto"
    """As of hidden states."""


class RelationsFeature(_Mapped):
    """Similarities between the tokens of a sequence, cosines of their hidden states: signal.layers must hold these.
    Widths may differ, nothing is projected."""


class FeaturesConfig(Section):
    """Losses on what lies inside the teacher; each is added to the output's loss with its weight."""

    hidden: HiddenFeature | None = None
    """Hidden states between blocks. null: not learned."""
    attention: AttentionFeature | None = None
    """Attention maps. null: not learned."""
    embeddings: EmbeddingsFeature | None = None
    """What enters the first block. null: not learned."""
    relations: RelationsFeature | None = None
    """Similarities between the tokens of a sequence. null: not learned."""

    def parts(self) -> dict[str, "HiddenFeature | AttentionFeature | EmbeddingsFeature | RelationsFeature"]:
        """By name, those that are learned: there, and at some step with a weight above 0."""
        named = (
            ("hidden", self.hidden), ("attention", self.attention), ("embeddings", self.embeddings),
            ("relations", self.relations),
        )  # fmt: skip
        return {name: part for name, part in named if part is not None and extremes(part.weight)[1] > 0}
