"""What a recipe says: one frozen model, with the meaning of each field under it.

Enters: validated values. Leaves: `Recipe`, which the rest of the pipeline reads and never changes. Costs: nothing.

The text under a field is its documentation everywhere: in the starter that `stillroom init` writes, in
`stillroom init --reference`, and in the message when the field is missing. Relative paths are relative to the
folder in which `stillroom` is started.
"""

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from stillroom.pipeline.corpus.config import CorpusConfig
from stillroom.pipeline.recipe.generate_schema import GenerateConfig
from stillroom.pipeline.recipe.section import Section
from stillroom.pipeline.recipe.signal_schema import SignalConfig
from stillroom.pipeline.recipe.teacher_schema import RayConfig, TeacherConfig, require_split
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.features.maps import named_layers

#: A corpus source: the responses that are kept. What says which, in the run's folder.
GENERATIONS, VERDICTS = "generations", "verdicts.parquet"


class FidelityConfig(Section):
    """How far the stored signal may be from the whole vocabulary's, measured at a few positions that a store keeps in
    full. A student whose loss and temperature the store does not support within these bounds is refused."""

    positions: int = Field(default=256, ge=0, le=256)
    """Positions kept in full, 4 bytes × vocabulary each, counted apart. 0: none, and nothing is measured or refused."""
    max_gradient_angle_deg: float | None = Field(default=30.0, gt=0, le=180)
    """Largest mean angle, in degrees, between the student's gradient from the stored signal and from the whole
    vocabulary: top-64 measures 3° at T = 1, 20° at 2 and 61° at 4; 50 draws 23° at 1. null: no bound."""
    max_kl_added: float | None = Field(default=1e-3, gt=0)
    """Largest mean KL, in nats, that rounding may add to the teacher's distribution. null: no bound."""


class StoreConfig(Section):
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


class TrainConfig(Section):
    """When students are trained. Each has its own settings under `students`."""

    read_through: bool = False
    """Train while teachers still write: a student waits, with a word, only where its next unit is not there yet. `run`
    then teaches and trains at once, on devices of their own; `train` follows a `teach` that runs elsewhere."""
    patience_s: float | None = Field(default=1800, gt=0)
    """How long `train` goes on waiting when teachers give no sign of life (no commit, no progress file): loading a
    large teacher, or a cluster's queue, takes a while. null: for ever."""
    processes: int = Field(default=1, ge=1)
    """Processes of this machine that train a student together, each with its share of every step's packs; the numbers
    are those of one, but for rounding. With GPUs: how many, as each process takes one."""
    side_by_side: int = Field(default=1, ge=1)
    """How many students train at once. With GPUs each has ones of its own; else they share a device."""
    rank_timeout_s: float = Field(default=1800, gt=0)
    """How long one of several processes waits for another before training ends: longer than a checkpoint takes."""


class AnswersConfig(Section):
    """Each student's greedy answers to held-out prompts beside the teacher's responses that are kept: BLEU and ROUGE-L
    (`pip install stillroom[answers]`), and both sides' words in `answers/` of the run's folder."""

    prompts: int = Field(default=32, ge=1)
    """Prompts that are asked; fewer where fewer are held out."""
    max_tokens: int = Field(default=64, ge=1)
    """The most tokens of an answer."""


class LmEvalConfig(Section):
    """Downstream tasks by EleutherAI's evaluation harness (`pip install stillroom[lm-eval]`)."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks or groups, of the harness or of include_path. Those of the harness load data from the hub."""
    include_path: Path | None = None
    """A folder with tasks of your own, YAML as the harness has it; with data on this machine they run offline."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many documents of each task. null: all."""


class EvaluateConfig(Section):
    """What is measured on the held-out documents."""

    teacher: bool = True
    """Measure the teacher too: perplexity, memory and latency. Loads it once more."""
    latency_tokens: int = Field(default=64, ge=1)
    """Tokens generated to measure latency."""
    answers: AnswersConfig | None = None
    """Answers of the students beside the teacher's. null: none."""
    lm_eval: LmEvalConfig | None = None
    """Downstream tasks, of every student and of the teacher where it is measured. null: none."""


class Recipe(Section):
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
    generate: GenerateConfig | None = None
    """Responses that the teacher writes, for students to learn from. null: none."""
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
        require_split(self.teacher, self.ray, self.signal)
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
        layers = self.signal.layers
        if layers and layers.named_by:
            named = named_layers([(s.name, features) for s in self.students for features in s.all_features()])
            layers = layers.model_copy(update={"layers": named, "named_by": None})
            object.__setattr__(self, "signal", self.signal.model_copy(update={"layers": layers}))
        if not self.store.path:  # the one field whose default comes from another section
            store = self.store.model_copy(update={"path": str(self.run_dir / "store")})
            object.__setattr__(self, "store", store)
        self._settle_generations()
        self._require_responses()
        if self.train.read_through and self.train.side_by_side > 1:
            raise ValueError(
                f"train.read_through and train.side_by_side {self.train.side_by_side}: one student at a time trains "
                "beside the teachers; leave one of both out"
            )
        for number, student in enumerate(self.students):
            if self.train.processes > student.batch_packs:
                raise ValueError(
                    f"train.processes is {self.train.processes}, students.{number}.batch_packs {student.batch_packs}: "
                    "each process takes whole packs of a step; raise batch_packs, or set processes to at most "
                    f"{student.batch_packs}"
                )
            if self.train.processes > 1 and student.device not in ("auto", "cpu", "cuda"):
                raise ValueError(
                    f"train.processes is {self.train.processes}, students.{number}.device {student.device}: processes "
                    "take GPUs by their number, or the CPU; set device to auto, cuda or cpu, or processes to 1"
                )
            if student.mix:
                student.mix.require_names(self.corpus.names(), f"students.{number}.mix")
        return self

    def _require_responses(self) -> None:
        """Answers are compared with responses of the teacher to prompts that nobody learned from."""
        if self.evaluate.answers is None:
            return
        if not any(source.path.startswith(f"{GENERATIONS}:") for source in self.corpus.sources):
            what = "corpus.sources has no generations" if self.generate else "the recipe has no generate section"
            raise ValueError(
                f"evaluate.answers has no teacher responses to compare with: {what}; add it, or leave answers out"
            )
        if not self.corpus.heldout:
            raise ValueError("evaluate.answers asks held-out prompts, and corpus.heldout is 0: set it to 0.1, say")

    def _settle_generations(self) -> None:
        """A folder of their own, and the corpus source `generations`."""
        if self.generate is None:
            if any(source.path == GENERATIONS for source in self.corpus.sources):
                raise ValueError("corpus.sources has generations, and the recipe no generate section that makes them")
            return
        engine, path = self.generate.engine, self.generate.path or str(self.run_dir / "generations")
        if engine.tensor_parallel_size > 1 and engine.tensor_parallel_size != self.ray.gpus_per_actor:
            raise ValueError(
                f"generate.engine.tensor_parallel_size is {engine.tensor_parallel_size}, ray.gpus_per_actor "
                f"{self.ray.gpus_per_actor:g}: an engine has the GPUs of its actor, so set both to the same"
            )
        if self.teacher.quantisation and engine.quantization is None:
            raise ValueError(
                f"teacher.quantisation is {self.teacher.quantisation}, which vLLM does not make: the responses would "
                "be those of the teacher as it lies. Set generate.engine.quantization to vLLM's name of one, or "
                "generate by a recipe without teacher.quantisation and read its verdicts.parquet as a corpus source "
                "generations:PATH"
            )
        if path == self.store.path:
            raise ValueError("generate.path and store.path are the same: each needs a folder of its own")
        object.__setattr__(self, "generate", self.generate.model_copy(update={"path": path}))
        sources = tuple(
            source.model_copy(update={"path": f"{GENERATIONS}:{self.run_dir / VERDICTS}"})
            if source.path == GENERATIONS
            else source
            for source in self.corpus.sources
        )
        object.__setattr__(self, "corpus", self.corpus.model_copy(update={"sources": sources}))
