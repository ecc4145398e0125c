"""What a student run is: the fields of a recipe's student, and the job file that its process reads.

Enters: JSON or a recipe's mapping. Leaves: frozen pydantic models, and notices on unusual values. Costs: no torch,
no transformers: `stillroom --help` and an already finished run must answer at once.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from stillroom.pipeline.student.features.config import FeaturesConfig
from stillroom.pipeline.student.schedules import Scheduled, Value, at, ends, extremes, shown
from stillroom.pipeline.student.section import Section as _Config
from stillroom.storage.errors import RecipeError, UnsupportedSignal
from stillroom.storage.identity import canonical_json
from stillroom.storage.records import SignalSpec, digest128

#: Fields that cannot change a trained number (device: beyond the noise of its arithmetic). A resumed run may
#: change them; it may change no other.
FREE_FIELDS = frozenset(
    {"name", "device", "checkpoint_every", "keep_last", "log_every", "eval_every", "eval_packs", "export_dtype"}
)


#: Fields that came after the first release: left out of the numbers where they say nothing, so that what was trained
#: without them stays what it is.
LATER_FIELDS = frozenset({"features", "phases"})


class CutConfig(_Config):
    """A student made of the teacher's own layers."""

    layers: Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """How many of the teacher's layers, spread evenly with the first and the last; or their numbers, from 0."""

    @field_validator("layers")
    @classmethod
    def _rising(cls, layers: int | list[int]) -> int | list[int]:
        if isinstance(layers, list) and any(a >= b for a, b in pairwise(layers)):
            raise ValueError("layer numbers must rise: a layer learned its place from those below it")
        return layers


class ModelConfig(_Config):
    """Where the student's weights start. Give one of the two."""

    from_: str | None = Field(default=None, alias="from")
    """A Hugging Face id or a folder with model and tokenizer."""

    cut: CutConfig | None = None
    """A cut of the teacher: its config with fewer layers, embeddings, head and the chosen layers copied."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.from_ is None) == (self.cut is None):
            raise ValueError("give one of `from` (a Hugging Face id or a folder) and `cut` (the teacher's layers)")
        return self


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

    @field_validator("js", mode="before")
    @classmethod
    def _weight_alone(cls, js: Any) -> Any:
        ramp = isinstance(js, dict) and "from" in js
        return {"weight": js} if ramp or (isinstance(js, int | float) and not isinstance(js, bool)) else js

    @model_validator(mode="after")
    def _some(self) -> Self:
        negative = [name for name, weight in self._named().items() if extremes(weight)[0] < 0]
        if negative:
            raise ValueError(f"{negative[0]}: expected at least 0, got {shown(self._named()[negative[0]])}")
        # Ramps are monotone: if all are 0 at a step, they are at the first one or at the end.
        if not all(any(ends(weight)[i] > 0 for weight in self._named().values()) for i in (0, 1)):
            raise ValueError("every output loss has weight 0: give one a weight, or set alpha to 0")
        return self

    def _named(self) -> dict[str, Value]:
        names = ("forward_kl", "reverse_kl", "tv", "mse", "cosine")
        return {name: getattr(self, name) for name in names} | {"js": self.js.weight}

    def names(self) -> list[str]:
        """Of the losses that count at any step."""
        return [name for name, weight in self._named().items() if extremes(weight)[1] > 0]

    def weights(self, step: int = 0, total_steps: int = 1) -> dict[str, float]:
        """Of the losses that count at step `step`, from 0, of so many; by name, at least one."""
        found = {name: at(weight, step, total_steps) for name, weight in self._named().items()}
        return {name: weight for name, weight in found.items() if weight > 0}


class LossConfig(_Config):
    """loss = alpha · Σ weight · output loss at temperature T + (1 − alpha) · cross-entropy on the text."""

    alpha: Scheduled = 0.7
    """Weight of the distillation term, a number or a schedule; the text's own next tokens get 1 − alpha."""

    signal: Literal["auto", "topk", "sampled", "hidden"] = "auto"
    """Which part of the store teaches. auto: hidden if it is there, else topk, else sampled."""

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


class PhaseConfig(_Config):
    """One part of a curriculum. What it leaves out is as the student says."""

    steps: int = Field(ge=1)
    """Optimizer steps."""

    losses: LossConfig | None = None
    """In place of the student's `losses`, as a whole. null: the student's."""

    temperature: Scheduled | None = None
    """In place of the temperature alone."""

    features: FeaturesConfig | Literal["none"] | None = None
    """In place of the student's `features`, as a whole. none: no feature losses. null: the student's."""

    corpus: Path | None = None
    """The `corpus.parquet` of another recipe with the same tokenizer, for fine-tuning on its text. It has no signal, so
    losses.alpha must be 0 and features none. null: the recipe's own corpus."""

    lr: float | None = Field(default=None, gt=0.0)
    """A peak learning rate: its warm-up and decay begin anew with this phase, and last until another that has one.
    null: the decay of the phase before goes on."""

    @field_validator("temperature")
    @classmethod
    def _on_the_grid(cls, temperature: Value | None) -> Value | None:
        return None if temperature is None else LossConfig(temperature=temperature).temperature


class StudentConfig(_Config):
    """One student, as a recipe states it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name; also its folder's."""

    model: ModelConfig
    """Where the weights start."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order of training and of dropout."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Give this or `epochs`, not both."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the training split; 1 if `steps` is not given either."""

    batch_packs: int = Field(default=8, ge=1)
    """Packs per optimizer step."""

    micro_packs: int = Field(default=1, ge=1)
    """Packs per forward and backward; what fits in memory. Changes the result by rounding only."""

    window: int | None = Field(default=None, ge=1)
    """Tokens per pack; the manifest's window if left out, and never more than that."""

    packing: bool = True
    """Several sequences per window, isolated from each other; false: one per row, padded."""

    losses: LossConfig = LossConfig()
    """What is minimised."""

    features: FeaturesConfig | None = None
    """What is learned from inside the teacher, beside its output. null: nothing."""

    phases: Annotated[list[PhaseConfig], Field(min_length=1)] | None = None
    """A curriculum: parts of the training with losses of their own, one after the other, in place of `steps` and
    `epochs`. null: one phase."""

    lr: float = Field(default=3e-5, gt=0.0)
    """Peak learning rate of AdamW."""

    warmup_steps: int = Field(default=20, ge=0)
    """Steps over which the rate rises from zero."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""

    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """The rate at the last step, as a share of the peak."""

    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled decay; not on norms, biases and embeddings."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's two decay rates."""

    grad_clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient over all parameters; null: no limit."""

    bf16: bool | Literal["auto"] = "auto"
    """bfloat16 autocast over float32 weights; auto: on a GPU that has it."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""

    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept."""

    log_every: int = Field(default=10, ge=1)
    """Steps between printed lines and TensorBoard points; `log.jsonl` has every step."""

    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on the held-out split; null: before and after training only."""

    eval_packs: int | None = Field(default=None, ge=1)
    """At most this many held-out packs per evaluation; null: all."""

    on_nan: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is not finite: end the run, or leave the step out and log it."""

    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the exported weights. They are trained in float32."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto (a GPU if there is one), cpu, cuda, cuda:N or mps."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give `steps` or `epochs`, not both")
        if self.phases is not None and not (self.steps is None and self.epochs is None):
            raise ValueError("`phases` have steps of their own: leave out `steps` and `epochs`")
        for number, phase in enumerate(self.phases or []):
            if phase.losses and phase.losses.signal not in ("auto", self.losses.signal):
                raise ValueError(
                    f"phases.{number}.losses.signal is {phase.losses.signal}, losses.signal {self.losses.signal}: one "
                    "part of the store teaches all phases; set losses.signal alone"
                )
            if phase.corpus and (self.all_losses()[number].distils or self.phase_features()[number]):
                raise ValueError(
                    f"phases.{number}.corpus has no signal of the teacher: set the phase's losses to {{alpha: 0}}, and "
                    "its features to none"
                )
        if self.batch_packs % self.micro_packs:
            raise ValueError(
                f"batch_packs ({self.batch_packs}) must be a multiple of micro_packs ({self.micro_packs}): "
                "every forward of a step should have the same size"
            )
        return self

    def numbers(self) -> dict[str, Any]:
        """The fields that define the trained numbers, by name; a checkpoint resumes only under equal ones."""
        return {
            key: value
            for key, value in (self.model_dump(mode="json") | {"losses": self.losses.numbers()}).items()
            if key not in FREE_FIELDS and not (key in LATER_FIELDS and value is None)
        }

    def all_losses(self) -> list[LossConfig]:
        """Of each phase; the part of the store that teaches is the same in all."""
        if not self.phases:
            return [self.losses]
        found = []
        for phase in self.phases:
            losses = self.losses
            if phase.losses:
                losses = phase.losses.model_copy(update={"signal": self.losses.signal})
            if phase.temperature is not None:
                losses = losses.model_copy(update={"temperature": phase.temperature})
            found.append(losses)
        return found

    def phase_features(self) -> list[FeaturesConfig | None]:
        """Of each phase; None where nothing inside the teacher is learned from."""
        asked = [phase.features or self.features for phase in self.phases] if self.phases else [self.features]
        return [f if isinstance(f, FeaturesConfig) and f.parts() else None for f in asked]

    def all_features(self) -> list[FeaturesConfig]:
        """Those of any phase."""
        return [features for features in self.phase_features() if features]

    def corpora(self) -> list[Path]:
        """Manifests of the phases that have a corpus of their own."""
        return list(dict.fromkeys(phase.corpus for phase in self.phases or [] if phase.corpus))

    @property
    def distils(self) -> bool:
        """Whether the teacher's output is learned from at any step."""
        return any(losses.distils for losses in self.all_losses())

    @property
    def taught(self) -> bool:
        """Whether anything of the teacher is learned from: its output, or what lies inside it."""
        return self.distils or bool(self.all_features())

    def temperatures(self, grid: tuple[float, ...] = ()) -> list[float]:
        """At which it is distilled: the ends of every schedule, and what of the grid lies between them."""
        spans = [extremes(losses.temperature) for losses in self.all_losses() if losses.distils]
        return sorted({t for low, high in spans for t in (low, high, *(g for g in grid if low < g < high))})

    @property
    def digest(self) -> str:
        """32 hex digits over `numbers()`."""
        return digest128(b"stillroom.student.1", canonical_json(self.numbers()))


class StudentJob(_Config):
    """All that a student process is told."""

    student: StudentConfig
    """What to train and how."""

    manifest: Path
    """The corpus manifest: order, split, mask and weight."""

    snapshot: Path | None = None
    """The pinned store; null for a corpus without signal (alpha must then be 0)."""

    run_dir: Path
    """Where everything of this run is written."""

    tokenizer: Path
    """Folder of the tokenizer that made the corpus."""

    teacher: Path | None = None
    """The teacher's folder; read for a cut only."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.snapshot is None and self.student.distils:
            raise ValueError("without a snapshot there is no teacher to learn from: set student.losses.alpha to 0")
        if self.snapshot is None and self.student.taught:
            raise ValueError("without a snapshot there is no teacher to learn from: leave out student.features")
        if self.student.model.cut is not None and self.teacher is None:
            raise ValueError("a cut needs the teacher's folder: set `teacher`")
        return self

    @staticmethod
    def read(path: Path) -> "StudentJob":
        """Raises RecipeError in one line: file, key, what is wrong."""
        try:
            return StudentJob.model_validate_json(path.read_bytes())
        except OSError as error:
            raise RecipeError(f"job file {path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise RecipeError(f"job file {path}: {_one_line(error)}") from error


def _one_line(error: ValidationError) -> str:
    faults = (f"{'.'.join(map(str, fault['loc'])) or 'job'}: {fault['msg']}" for fault in error.errors())
    return "; ".join(faults)


def student_window(config: StudentConfig, manifest_window: int) -> int:
    """Tokens per pack. Raises RecipeError if more are asked for than the manifest's window has."""
    if config.window is not None and config.window > manifest_window:
        raise RecipeError(
            f"student {config.name}: window is {config.window}, the corpus was cut at {manifest_window}: "
            f"set it to at most {manifest_window}"
        )
    return config.window or manifest_window


def teaching_part(asked: str, spec: SignalSpec) -> str:
    """Which part of a store teaches: "hidden", "topk" or "sampled".

    asked: `losses.signal`. Raises UnsupportedSignal if the store does not hold it.
    """
    held = [part for part in ("hidden", "topk", "sampled") if getattr(spec, part) is not None]
    if not held:
        raise UnsupportedSignal(
            f"the store holds {spec.in_words()} alone, and a student learns from the teacher's output: teach with "
            "signal.topk, sampled or hidden beside it, into another store"
        )
    if asked == "auto":
        return held[0]
    if asked not in held:
        raise UnsupportedSignal(
            f"losses.signal is {asked}, the store holds {spec.in_words()}: set it to {' or '.join(held)}, or teach "
            f"with signal.{asked} into another store"
        )
    return asked


def require_determined(losses: LossConfig, part: str) -> None:
    """Raises UnsupportedSignal if the part that teaches does not determine an output loss, with the remedy."""
    asked = losses.output.names() if losses.distils else []
    if part == "sampled" and (refused := sorted(set(asked) - {"forward_kl"})):
        raise UnsupportedSignal(
            f"losses.output.{refused[0]} on draws from the teacher, which determine the forward KL alone (up to a "
            "constant, at temperature 1): keep forward_kl alone, or use a store with hidden states or top-k logits"
        )
    if part == "topk" and "cosine" in asked:
        raise UnsupportedSignal(
            "losses.output.cosine needs the teacher's logits of the whole vocabulary, of which top-k has some and one "
            "sum of the others: leave it out, or teach with signal.hidden"
        )


def advice(config: StudentConfig, part: str = "topk") -> list[str]:
    """Notices for values that are allowed and unusual: the chapter's ranges (§2.3, §7.1), and what was measured.

    part: of the store that teaches. The angles are between the gradient from the top 64 ids with one tail bucket and
    the one from the full vocabulary (`make bench`); a store has its own, `stillroom inspect` shows them.
    """
    notices = []
    for losses in dict.fromkeys(losses for losses in config.all_losses() if losses.distils):
        if not (extremes(losses.alpha)[0] >= 0.5 and extremes(losses.alpha)[1] <= 0.9):
            notices.append(f"losses.alpha is {shown(losses.alpha)}; 0.5 … 0.9 is advised")
        if extremes(losses.temperature)[0] < 2 and part == "hidden":
            notices.append(
                f"losses.temperature is {shown(losses.temperature)}; 2 … 10 is the advised range for full-vocabulary "
                "signals"
            )
        if extremes(losses.temperature)[1] > 2 and part == "topk":
            notices.append(
                f"losses.temperature is {shown(losses.temperature)}: above 2, top-k ids with one tail bucket no longer "
                "point where the full vocabulary does (the gradient is 20° off at 2, 61° at 4, for 64 ids); "
                "signal.hidden does"
            )
        if "mse" in losses.output.names() and extremes(losses.temperature)[1] > 2 and part == "topk":
            notices.append(
                f"losses.output.mse at temperature {shown(losses.temperature)} on top-k: its tail teaches nothing, and "
                "the kept ids hold a few percent of the probability; signal.hidden has all of it"
            )
    for features in dict.fromkeys(config.all_features()):
        hidden = features.parts().get("hidden")
        if hidden and not 0.1 <= extremes(hidden.weight)[1] <= 0.5:
            notices.append(f"features.hidden.weight is {shown(hidden.weight)}; 0.1 … 0.5 is advised")
    if not 1e-5 <= config.lr <= 5e-5:
        notices.append(f"lr is {config.lr:g}; 1e-5 … 5e-5 is advised")
    if config.steps is not None and config.warmup_steps * 2 > config.steps:
        notices.append(f"warmup_steps is {config.warmup_steps}, more than half of the {config.steps} steps")
    return notices
