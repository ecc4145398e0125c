"""What a student run is: the fields of a recipe's student, and the job file that its process reads.

Enters: JSON or a recipe's mapping. Leaves: frozen pydantic models, and notices on unusual values. Costs: no torch,
no transformers: `stillroom --help` and an already finished run must answer at once.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stillroom.storage.errors import RecipeError, UnsupportedSignal
from stillroom.storage.identity import canonical_json
from stillroom.storage.records import SignalSpec, digest128

#: Fields that cannot change a trained number (device: beyond the noise of its arithmetic). A resumed run may
#: change them; it may change no other.
FREE_FIELDS = frozenset(
    {"name", "device", "checkpoint_every", "keep_last", "log_every", "eval_every", "eval_packs", "export_dtype"}
)


class _Config(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
    )


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


class LossConfig(_Config):
    """loss = alpha · T² · KL(teacher ‖ student at temperature T) + (1 − alpha) · cross-entropy on the text."""

    alpha: float = Field(default=0.7, ge=0.0, le=1.0)
    """Weight of the distillation term; the text's own next tokens get 1 − alpha."""

    signal: Literal["auto", "topk", "sampled", "hidden"] = "auto"
    """Which part of the store teaches. auto: hidden if it is there, else topk, else sampled."""

    temperature: float = 2.0
    """T, by which both models' logits are divided in the distillation term. 1 … 10."""

    @field_validator("temperature")
    @classmethod
    def _on_the_grid(cls, temperature: float) -> float:
        if not 1.0 <= temperature <= 10.0:
            raise ValueError("must lie in 1 … 10: the store keeps the tail's log-partition for 1/T in 0.1 … 1 only")
        return temperature


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
        if self.batch_packs % self.micro_packs:
            raise ValueError(
                f"batch_packs ({self.batch_packs}) must be a multiple of micro_packs ({self.micro_packs}): "
                "every forward of a step should have the same size"
            )
        return self

    def numbers(self) -> dict[str, Any]:
        """The fields that define the trained numbers, by name; a checkpoint resumes only under equal ones."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in FREE_FIELDS}

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
        if self.snapshot is None and self.student.losses.alpha > 0:
            raise ValueError("without a snapshot there is no teacher to learn from: set student.losses.alpha to 0")
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


def advice(config: StudentConfig, part: str = "topk") -> list[str]:
    """Notices for values that are allowed and unusual: the chapter's ranges (§2.3, §7.1), and what was measured.

    part: of the store that teaches. The angles are between the gradient from the top 64 ids with one tail bucket and
    the one from the full vocabulary (`make bench`); a store has its own, `stillroom inspect` shows them.
    """
    notices = []
    losses = config.losses
    if losses.alpha > 0 and not 0.5 <= losses.alpha <= 0.9:
        notices.append(f"losses.alpha is {losses.alpha:g}; 0.5 … 0.9 is advised")
    if losses.alpha > 0 and losses.temperature < 2 and part == "hidden":
        notices.append(
            f"losses.temperature is {losses.temperature:g}; 2 … 10 is the advised range for full-vocabulary signals"
        )
    if losses.alpha > 0 and losses.temperature > 2 and part == "topk":
        notices.append(
            f"losses.temperature is {losses.temperature:g}: above 2, top-k ids with one tail bucket no longer point "
            "where the full vocabulary does (the gradient is 20° off at 2, 61° at 4, for 64 ids); signal.hidden does"
        )
    if not 1e-5 <= config.lr <= 5e-5:
        notices.append(f"lr is {config.lr:g}; 1e-5 … 5e-5 is advised")
    if config.steps is not None and config.warmup_steps * 2 > config.steps:
        notices.append(f"warmup_steps is {config.warmup_steps}, more than half of the {config.steps} steps")
    return notices
