"""What a recipe says about the signal: which parts of the teacher are kept, and how.

Enters: validated values. Leaves: frozen settings, and the `SignalSpec` that they stand for. Costs: nothing. The text
under a field is its documentation everywhere, as in schema.py.
"""

import re
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stillroom.pipeline.recipe.section import Section
from stillroom.storage.records import (
    AttentionSpec,
    HiddenSpec,
    LayersSpec,
    NucleusSpec,
    SampledSpec,
    SignalSpec,
    TopKSpec,
)


def _nats(value: Any) -> Any:
    """`"1/16"` → 0.0625; anything else is left to pydantic."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*/\s*[1-9]\d*\s*", value):
        return float(Fraction(value.replace(" ", "")))
    return value


class NucleusConfig(Section):
    """Keep fewer ids where fewer hold enough."""

    mass: float = Field(gt=0, lt=1)
    """Ids are kept, largest first, until they hold this share of the probability; at most k and at least one."""
    temperature: float = Field(default=1.0, ge=1, le=10)
    """The temperature at which the share is counted."""


class TopKConfig(Section):
    """The largest logits of each position, and the rest of the vocabulary as one curve."""

    k: int = Field(default=64, ge=1)
    """Kept logits per position, the largest ones. The rest of the vocabulary is kept as one curve (its log-partition
    at ten temperatures)."""
    gap_step: Annotated[Annotated[float, Field(gt=0, le=4)] | None, BeforeValidator(_nats)] = 1 / 8
    """Logits are kept as gaps to the largest one, rounded to multiples of this many nats, as a number or a fraction.
    At k 64, 1/16 adds KL 6.5e-5 and takes 34 bytes per token, 1/8 adds 2.6e-4 and takes 24, 1/4 adds 1.0e-3 and
    takes 18. null: float32, exact."""
    nucleus: NucleusConfig | None = None
    """Keep fewer ids where fewer hold enough of the probability. null: k at every position."""
    layout: Literal["plain", "packed"] = "plain"
    """plain: Arrow columns that any tool decodes with one expression. packed: the same numbers at the smallest size,
    for archives, which only stillroom reads."""

    def spec(self) -> TopKSpec:
        nucleus = NucleusSpec(self.nucleus.mass, self.nucleus.temperature) if self.nucleus else None
        return TopKSpec(self.k, self.gap_step, nucleus, self.layout)


class SampledConfig(Section):
    """Ids drawn from the teacher's distribution: a small, unbiased estimate of all of it, at temperature 1 alone."""

    draws: int = Field(default=50, ge=1, le=32767)
    """Draws per position, kept as distinct ids with counts."""


class HiddenConfig(Section):
    """The teacher's final hidden state, from which a student rebuilds the logits of the whole vocabulary with the
    teacher's output head: faithful at every temperature, at about one byte per channel. The head lies once in each
    store."""

    dtype: Literal["int16", "int8", "bfloat16"] = "int16"
    """int16: steps of a size that follows from the output head, entropy-coded: 0.95 bytes a channel. int8: steps
    measured once on the corpus, when the store is founded: 0.91 bytes, and a third less faithful. bfloat16: 1.43 bytes,
    and twice as faithful."""


class _ChosenLayers(Section):
    """Of the teacher's layers some: by number, or each so many."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Which, by number."""
    every: int | None = Field(default=None, ge=1)
    """Each so many, in place of `layers`."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        given = [value for name in ("layers", "every", "named_by") if (value := getattr(self, name, None)) is not None]
        if len(given) != 1 or self.layers == ():
            more = ", named_by: students" if "named_by" in type(self).model_fields else ""
            raise ValueError(f"expected one alone of layers: [4, 8], every: 4{more}, with numbers of your own")
        return self

    def chosen(self, blocks: int, first: int) -> tuple[int, ...]:
        """Rising. blocks: of the teacher. first: the number of the first block."""
        if self.layers is not None:
            return tuple(sorted(set(self.layers)))
        assert self.every is not None
        return tuple(range(first + self.every - 1, first + blocks, self.every))


class LayersConfig(_ChosenLayers):
    """Hidden states between the teacher's blocks, for students that learn from its inner layers: about 1.4 bytes per
    channel and layer in bfloat16, 3.1 in float32. An actor holds two units of `store.unit_tokens` in float32: lower
    that for many layers."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Which, as indices into the `hidden_states` of transformers: 0 is what enters the first block, 4 what leaves the
    fourth, and the last one the final hidden state after the last norm."""
    every: int | None = Field(default=None, ge=1)
    """In place of `layers`: what leaves each so-manieth block; 4 keeps 4, 8, 12 and so on."""
    named_by: Literal["students"] | None = None
    """In place of `layers`: those of the teacher that the students' `features.hidden` and `relations` name in pairs. A
    map such as uniform names none, it goes over what the store holds. Stages with one store share its `layers`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """How they are stored. bfloat16: exact for a teacher that runs in it, else within 1/256 of each value."""


class AttentionConfig(_ChosenLayers):
    """Attention maps of the teacher's blocks. They grow with the square of a sequence: in one of T tokens each token
    takes (T + 1) / 2 bytes for each layer and head, of which compression leaves about 0.6; in an actor's memory four
    times that, for two units of `store.unit_tokens`. The teacher runs with `teacher.attention` eager, which computes
    maps in full: SmolLM2 at 512 tokens keeps 0.7 of its speed on a CPU."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Which, as indices into the `attentions` of transformers: 0 is the first block's."""
    every: int | None = Field(default=None, ge=1)
    """In place of `layers`: each so-manieth block's; 4 keeps 3, 7, 11 and so on."""
    heads: Literal["mean", "per_head"] = "mean"
    """mean: averaged over the heads. per_head: each head's, at so many times the size."""
    max_tokens: int = Field(default=1024, ge=1)
    """The longest sequence that is accepted, which bounds what a token takes. `corpus.window` may not be above it."""
    dtype: Literal["uint8", "float32"] = "uint8"
    """uint8: 255 steps of the square root of a weight, within 1/254 of the row's largest and far closer for small ones.
    float32: exact, and about five times as large."""


class SignalConfig(Section):
    """What is kept of the teacher at each position. All of it is part of the store's identity."""

    topk: TopKConfig | None = TopKConfig()
    """The largest logits of each position, and the rest of the vocabulary as one curve. null: not kept."""
    sampled: SampledConfig | None = None
    """Ids drawn from the teacher's distribution. null: not kept."""
    hidden: HiddenConfig | None = None
    """The teacher's final hidden state. null: not kept."""
    layers: LayersConfig | None = None
    """Hidden states between the teacher's blocks. null: not kept."""
    attention: AttentionConfig | None = None
    """Attention maps of the teacher's blocks. null: not kept."""
    embeddings: bool = False
    """Keep what enters the first block, too: the same as 0 among `signal.layers.layers`."""

    @model_validator(mode="after")
    def _something(self) -> "SignalConfig":
        if not (self.topk or self.sampled or self.hidden or self.layers or self.attention or self.embeddings):
            raise ValueError("nothing is kept: give one or more of topk, sampled, hidden, layers and attention")
        return self

    def spec(self, *, width: int, calibration: str | None = None, blocks: int = 0, heads: int = 0) -> SignalSpec:
        """width, blocks, heads: of the teacher; layers and attention need the last two. calibration: digest of the
        store's vector, for an int8 hidden part."""
        layers = set(self.layers.chosen(blocks, 1)) if self.layers else set()
        layers |= {0} if self.embeddings else set()
        dtype = self.layers.dtype if self.layers else "bfloat16"
        attention = None
        if self.attention:
            per_head = heads if self.attention.heads == "per_head" else None
            maps, most = self.attention.chosen(blocks, 0), self.attention.max_tokens
            attention = AttentionSpec(maps, most, self.attention.heads, per_head, self.attention.dtype)
        return SignalSpec(
            self.topk.spec() if self.topk else None,
            SampledSpec(self.sampled.draws) if self.sampled else None,
            HiddenSpec(width, self.hidden.dtype, calibration) if self.hidden else None,
            LayersSpec(tuple(sorted(layers)), width, dtype) if layers or self.layers else None,
            attention,
        )
