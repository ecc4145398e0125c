"""What a recipe says: one frozen model, with the meaning of each field under it.

Enters: validated values. Leaves: `Recipe`, which the rest of the pipeline reads and never changes. Costs: nothing.

The text under a field is its documentation everywhere: in the starter that `stillroom init` writes, in
`stillroom init --reference`, and in the message when the field is missing. Relative paths are relative to the
folder in which `stillroom` is started.
"""

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from stillroom.pipeline.corpus.config import CorpusConfig
from stillroom.pipeline.student.config import StudentConfig
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


class _Section(BaseModel):
    """Unknown keys are refused, nothing changes after validation, a docstring under a field documents it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class TeacherConfig(_Section):
    """The model whose logits are kept, and how it is run. Model and dtype are part of the store's identity."""

    model: str = Field(min_length=1)
    """A folder that holds a model and its tokenizer, a Hugging Face id, a .gguf file, or `package:NAME` for an
    installed package that ships one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the forward pass. bfloat16 moves logits by up to 0.8 with the shape of a batch, float32 by nothing that
    counts; a CPU without bfloat16 instructions is slower in it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the teacher runs. auto: cuda where `ray.gpus_per_actor` is above 0, else cpu."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = None
    """Attention kernel, by its name in transformers. null: the model's own choice."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens of one forward pass, padding included. A sequence that is longer runs alone."""
    slice_positions: int | None = Field(default=None, ge=1)
    """Positions that pass through the output head at once, which bounds memory at this many × vocabulary × 4 bytes.
    null: chosen from the vocabulary."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one actor. null: as many as its CPUs, `ray.cpus_per_actor`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose code you have read."""
    compile: bool = False
    """Compile the forward pass with torch.compile: minutes at the start of each actor, faster after that."""


class NucleusConfig(_Section):
    """Keep fewer ids where fewer hold enough."""

    mass: float = Field(gt=0, lt=1)
    """Ids are kept, largest first, until they hold this share of the probability; at most k and at least one."""
    temperature: float = Field(default=1.0, ge=1, le=10)
    """The temperature at which the share is counted."""


class TopKConfig(_Section):
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


class SampledConfig(_Section):
    """Ids drawn from the teacher's distribution: a small, unbiased estimate of all of it, at temperature 1 alone."""

    draws: int = Field(default=50, ge=1, le=32767)
    """Draws per position, kept as distinct ids with counts."""


class HiddenConfig(_Section):
    """The teacher's final hidden state, from which a student rebuilds the logits of the whole vocabulary with the
    teacher's output head: faithful at every temperature, at about one byte per channel. The head lies once in each
    store."""

    dtype: Literal["int16", "int8", "bfloat16"] = "int16"
    """int16: steps of a size that follows from the output head, entropy-coded: 0.95 bytes a channel. int8: steps
    measured once on the corpus, when the store is founded: 0.91 bytes, and a third less faithful. bfloat16: 1.43 bytes,
    and twice as faithful."""


class _ChosenLayers(_Section):
    """Of the teacher's layers some: by number, or each so many."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Which, by number."""
    every: int | None = Field(default=None, ge=1)
    """Each so many, in place of `layers`."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.layers is None) == (self.every is None) or self.layers == ():
            raise ValueError("expected either layers, a list such as [4, 8], or every, a number")
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


class SignalConfig(_Section):
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


class FidelityConfig(_Section):
    """How far the stored signal may be from the whole vocabulary's, measured at a few positions that a store keeps in
    full. A student whose loss and temperature the store does not support within these bounds is refused."""

    positions: int = Field(default=256, ge=0, le=256)
    """Positions kept in full, 4 bytes × vocabulary each, counted apart. 0: none, and nothing is measured or refused."""
    max_gradient_angle_deg: float | None = Field(default=30.0, gt=0, le=180)
    """Largest mean angle, in degrees, between the student's gradient from the stored signal and from the whole
    vocabulary: top-64 measures 3° at T = 1, 20° at 2 and 61° at 4; 50 draws 23° at 1. null: no bound."""
    max_kl_added: float | None = Field(default=1e-3, gt=0)
    """Largest mean KL, in nats, that rounding may add to the teacher's distribution. null: no bound."""


class StoreConfig(_Section):
    """Where the teacher's signal is kept, and in what portions."""

    path: str = ""
    """A folder. Empty: `store` in the run's folder. Several recipes may share one store
    if their teacher and signal are the same."""
    unit_tokens: int = Field(default=16384, ge=1)
    """Tokens of a work unit, which becomes one shard: the portion that is retried and committed as a whole."""
    min_free_bytes: int = Field(default=1_000_000_000, ge=0)
    """Teaching is refused if it would leave less free disk than this."""
    safety: float = Field(default=1.2, ge=1)
    """The estimated size is multiplied by this before it is compared with the free disk."""


class RayConfig(_Section):
    """How many teachers run at once, and where."""

    address: str | None = None
    """A running cluster, as ray.init takes it (`auto`, `ray://host:10001`). null: under `ray job submit` the job's own
    cluster, else a local Ray, started and stopped by the run."""
    actors: int = Field(default=1, ge=1)
    """Teacher processes, each with a copy of the model. On a cluster, those that find no room wait for it, and the
    others begin."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs that Ray sets aside for each actor."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs that Ray sets aside for each actor; below 1, actors share one."""
    resources: dict[str, float] = {}
    """Further resources that Ray sets aside for each actor, such as `{teachers: 1}`, which nodes offer by
    `ray start --resources`."""
    placement: Literal["default", "spread", "pack"] = "default"
    """Which nodes get actors. spread: as many nodes as there are. pack: as few as hold all actors, which then all wait
    until there is room for the last. default: Ray's own policy."""
    inflight_per_actor: int = Field(default=2, ge=1)
    """Units handed to an actor at a time: 2 keep it busy while a receipt travels."""
    retries: int = Field(default=3, ge=0)
    """How often a unit that lost its actor is tried again, before it is left out; and an actor that dies while it
    loads the teacher."""
    ship: bool = True
    """Send stillroom itself to the nodes of a cluster, which then need not have it installed."""
    dashboard: bool = False
    """Start Ray's dashboard with a local Ray."""

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"expected a whole number above 1, or a part of one GPU, got {value:g}")
        return value

    @field_validator("resources")
    @classmethod
    def _own_keys(cls, value: dict[str, float]) -> dict[str, float]:
        for name, each in value.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(f"expected a resource of your own, got {name}: see ray.cpus_per_actor, gpus_per_actor")
            if each <= 0:
                raise ValueError(f"expected an amount above 0 of {name}, got {each:g}")
        return value


class TrainConfig(_Section):
    """When students are trained. Each has its own settings under `students`."""

    read_through: bool = False
    """Train while teachers still write: a student waits, with a word, only where its next unit is not there yet. `run`
    then teaches and trains at once, on devices of their own; `train` follows a `teach` that runs elsewhere."""
    patience_s: float | None = Field(default=1800, gt=0)
    """How long `train` goes on waiting when teachers give no sign of life (no commit, no progress file): loading a
    large teacher, or a cluster's queue, takes a while. null: for ever."""


class EvaluateConfig(_Section):
    """What is measured on the held-out documents."""

    teacher: bool = True
    """Measure the teacher too: perplexity, memory and latency. Loads it once more."""
    latency_tokens: int = Field(default=64, ge=1)
    """Tokens generated to measure latency."""


class Recipe(_Section):
    """A teacher, a corpus, the signal that is kept, and the students trained from it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run: letters, digits, dots, dashes and underscores."""
    run_dir: Path = Field(default_factory=lambda data: Path("runs") / data.get("name", ""))
    """Folder of the run: resolved recipe, plan, logs, students, summary. Default: `runs/<name>`."""
    teacher: TeacherConfig
    """The model whose logits are kept, and how it is run."""
    corpus: CorpusConfig
    """The text that the teacher reads and the students learn from."""
    signal: SignalConfig = SignalConfig()
    """What is kept of the teacher at each position."""
    fidelity: FidelityConfig = FidelityConfig()
    """How far the stored signal may be from the whole vocabulary's."""
    store: StoreConfig = StoreConfig()
    """Where the teacher's signal is kept, and in what portions."""
    ray: RayConfig = RayConfig()
    """How many teachers run at once, and where."""
    students: tuple[StudentConfig, ...] = ()
    """The students, trained one after the other in this order, each in a process of its own."""
    train: TrainConfig = TrainConfig()
    """When students are trained."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured on the held-out documents."""

    @field_validator("students")
    @classmethod
    def _unique_names(cls, students: tuple[StudentConfig, ...]) -> tuple[StudentConfig, ...]:
        names = [student.name for student in students]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected a different name for each student, got {', '.join(twice)} more than once")
        return students

    @model_validator(mode="after")
    def _settle(self) -> "Recipe":
        if self.teacher.device == "cuda" and self.ray.gpus_per_actor == 0:
            raise ValueError(
                "teacher.device is cuda, but ray.gpus_per_actor is 0 and Ray hides the GPUs from such an actor; "
                "set ray.gpus_per_actor, to 0.5 for two actors on one GPU"
            )
        attention = self.signal.attention
        if attention and self.teacher.attention not in (None, "eager"):
            raise ValueError(
                f"teacher.attention is {self.teacher.attention}, which has no maps for signal.attention to keep; leave "
                "it out, or set it to eager"
            )
        if (attention or self.signal.layers or self.signal.embeddings) and self.teacher.compile:
            raise ValueError(
                "teacher.compile with signal.layers, attention or embeddings: hooks in a compiled pass are not "
                "supported; leave one or the other out"
            )
        if attention and self.corpus.window > attention.max_tokens:
            raise ValueError(
                f"corpus.window is {self.corpus.window:,}, signal.attention.max_tokens {attention.max_tokens:,}: at "
                f"that window maps take {(self.corpus.window + 1) / 2:,.0f} numbers a token for each layer and head, "
                "before compression; set the window to at most max_tokens, or raise max_tokens"
            )
        if not self.store.path:  # the one field whose default comes from another section
            store = self.store.model_copy(update={"path": str(self.run_dir / "store")})
            object.__setattr__(self, "store", store)
        return self
