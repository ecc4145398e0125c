"""What a student run is: the fields of a recipe's student, and the job file that its process reads.

Enters: JSON or a recipe's mapping. Leaves: frozen pydantic models, and notices on unusual values. Costs: no torch,
no transformers: `stillroom --help` and an already finished run must answer at once.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from stillroom.pipeline.student.features.config import FeaturesConfig
from stillroom.pipeline.student.losses_config import LossConfig as LossConfig
from stillroom.pipeline.student.mix_config import MixConfig as MixConfig
from stillroom.pipeline.student.phase_config import PhaseConfig as PhaseConfig
from stillroom.pipeline.student.run_config import AdvanceConfig, Precision
from stillroom.pipeline.student.run_config import KeepBest as KeepBest
from stillroom.pipeline.student.run_config import LoraConfig as LoraConfig
from stillroom.pipeline.student.schedules import extremes, shown
from stillroom.pipeline.student.section import Section as _Config
from stillroom.storage.errors import RecipeError, UnsupportedSignal
from stillroom.storage.identity import canonical_json
from stillroom.storage.records import SignalSpec, digest128

#: Fields that cannot change a trained number (device, compile: beyond the noise of its arithmetic). A resumed run may
#: change them; it may change no other. A finished one is exported again under another export_dtype, not trained.
FREE_FIELDS = frozenset(
    {
        "name", "device", "compile", "checkpoint_every", "keep_last", "log_every", "eval_every", "eval_packs",
        "export_dtype",
    }
)  # fmt: skip


#: Fields that came after the first release: left out of the numbers where they say nothing, so that what was trained
#: without them stays what it is.
LATER_FIELDS = frozenset({"advance", "features", "keep_best", "mix", "lora", "phases"})


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
    """Packs per forward and backward, of each process; what fits in memory. Changes the result by rounding only."""

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

    mix: MixConfig | None = None
    """Shares of the corpus's sources in each step. null: as the corpus has them."""

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

    precision: Precision = "auto"
    """float32, or bfloat16 or float16 autocast over float32 weights. auto: bfloat16 on a GPU that has it, else float32.
    float16, for GPUs that have no bfloat16, scales the loss and leaves out steps that overflow."""

    lora: LoraConfig | None = None
    """Adapters, which alone are trained; the other weights stay as they start. null: all weights are trained."""

    compile: bool = False
    """torch.compile of the student's layers: minutes at the start, then faster steps on a GPU. Changes the result by
    rounding only. Not with features, which look at layers as they run."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""

    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept."""

    keep_best: KeepBest | None = None
    """A metric of the held-out split: the checkpoint of its best evaluation is kept beside the last ones, and the
    export is of it. null: the export is of the last step."""

    advance: AdvanceConfig | None = None
    """Ends training when the student has learned enough, at the latest after `steps`. null: after all steps."""

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

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        if isinstance(given, dict) and "bf16" in given:
            now = "bfloat16" if given["bf16"] is True else "float32" if given["bf16"] is False else "auto"
            raise ValueError(f"bf16 is called precision now: write `precision: {now}` in its place")
        return given

    @field_validator("keep_best", mode="before")
    @classmethod
    def _metric_alone(cls, keep_best: Any) -> Any:
        return {"metric": keep_best} if isinstance(keep_best, str) else keep_best

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precision == "float16" and any("attention" in features.parts() for features in self.all_features()):
            raise ValueError(
                "features.attention with precision float16: weights below 6e-8 are zero in it, and their KL takes the "
                "logarithm; set precision to bfloat16 or float32"
            )
        if self.compile and self.all_features():
            raise ValueError(
                "compile with features: layers that are compiled together cannot be looked at one by one; leave out one"
            )
        if self.advance and not self.eval_every:
            raise ValueError("advance looks at evaluations while training: set eval_every to the steps between them")
        if self.advance and self.phases:
            raise ValueError("advance ends a whole run, phases are parts of one: leave out one, or make stages of them")
        if self.keep_best and not self.eval_every:
            raise ValueError("keep_best compares evaluations while training: set eval_every to the steps between them")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give `steps` or `epochs`, not both")
        if self.phases is not None and not (self.steps is None and self.epochs is None):
            raise ValueError("`phases` have steps of their own: leave out `steps` and `epochs`")
        if self.mix and self.mix.by == "sampling" and not (self.steps or self.phases):
            raise ValueError("mix.by is sampling, and each source has epochs of its own: set `steps`")
        if self.mix and self.corpora():
            raise ValueError("mix and phases.corpus together: a mix is of the sources of the recipe's own corpus")
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
        # Which checkpoint is the best depends on which were evaluated, and on what.
        free = FREE_FIELDS - {"eval_every", "eval_packs"} if self.keep_best or self.advance else FREE_FIELDS
        return {
            key: value
            for key, value in self._stated().items()
            if key not in free and not (key in LATER_FIELDS and value is None)
        }

    def _stated(self) -> dict[str, Any]:
        """All fields; the precision under the name and in the words of the first release, so that what was trained
        then stays what it is."""
        stated = self.model_dump(mode="json") | {"losses": self.losses.numbers()}
        precision = stated.pop("precision")
        return stated | {"bf16": {"float32": False, "bfloat16": True}.get(precision, precision)}

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

    start: str | None = None
    """Digest of the folder where the weights start, `model.from`; null: not known, and not compared."""

    processes: int = Field(default=1, ge=1)
    """How many train it on this machine, where nothing else started us as one of several."""

    rank_timeout_s: float = Field(default=1800.0, gt=0.0)
    """How long one of several processes waits for another."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.snapshot is None and self.student.distils:
            raise ValueError("without a snapshot there is no teacher to learn from: set student.losses.alpha to 0")
        if self.snapshot is None and self.student.taught:
            raise ValueError("without a snapshot there is no teacher to learn from: leave out student.features")
        if self.student.model.cut is not None and self.teacher is None:
            raise ValueError("a cut needs the teacher's folder: set `teacher`")
        if self.processes > self.student.batch_packs:
            raise ValueError(
                f"batch_packs is {self.student.batch_packs}, processes {self.processes}, each of which takes whole "
                f"packs of a step: set processes to at most {self.student.batch_packs}, or raise batch_packs"
            )
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
    """Which part of a store teaches: "hidden", "topk", "sampled" or "topk+sampled".

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
    parts = asked.split("+")
    if not {*parts} <= {*held}:
        raise UnsupportedSignal(
            f"losses.signal is {asked}, the store holds {spec.in_words()}: set it to {' or '.join(held)}, or teach "
            f"with {' and '.join(f'signal.{part}' for part in parts)} into another store"
        )
    return asked


def require_determined(losses: LossConfig, part: str) -> None:
    """Raises UnsupportedSignal if the part that teaches does not determine an output loss, with the remedy."""
    asked = losses.output.names() if losses.distils else []
    if "sampled" in part.split("+") and (refused := sorted(set(asked) - {"forward_kl"})):
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
