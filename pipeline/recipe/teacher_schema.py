"""What a recipe says about the teacher: the model, how it is run, and on how many processes and nodes.

Enters: validated values. Leaves: frozen settings. Costs: nothing. The text under a field is its documentation
everywhere, as in schema.py.
"""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from stillroom.pipeline.recipe.section import Section
from stillroom.pipeline.recipe.signal_schema import SignalConfig


class TeacherConfig(Section):
    """The model whose logits are kept, and how it is run. Model and dtype are part of the store's identity."""

    model: str = Field(min_length=1)
    """A folder that holds a model and its tokenizer, a Hugging Face id, a .gguf file, or `package:NAME` for an
    installed package that ships one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the forward pass. bfloat16 moves logits by up to 0.8 with the shape of a batch, float32 by nothing that
    counts; a CPU without bfloat16 instructions is slower in it."""
    quantisation: Literal["int8", "int4", "fp8"] | None = None
    """Weights of 8 or 4 bits, made by torchao when the teacher is loaded (`pip install stillroom[quantised]`);
    embeddings and output head stay whole. Part of the store's identity: it is another teacher. int4 needs a GPU. null:
    the weights as they lie, which may be quantised already."""
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
    split: Literal["layers", "tensors"] | None = None
    """For a teacher that is larger than one GPU. layers: its blocks over the `ray.gpus_per_actor` GPUs of each actor,
    which work in turn. tensors: each matrix over `ranks` processes with `ray.gpus_per_actor` each, which work at once
    and belong on one node with fast links. null: each actor holds it on one device."""
    ranks: int = Field(default=1, ge=1)
    """Processes that are one teacher, for split tensors. `ray.actors` counts teachers."""

    @model_validator(mode="after")
    def _ranks_are_of_tensors(self) -> Self:
        if (self.split == "tensors") != (self.ranks > 1):
            raise ValueError(
                f"split is {self.split or 'null'} and ranks {self.ranks}: tensors are spread over 2 ranks or more, "
                "anything else has 1"
            )
        if self.split and self.compile:
            raise ValueError("compile with split is not supported: leave one of them out")
        if self.split == "tensors" and self.quantisation:
            raise ValueError("quantisation with split tensors is not supported: use split layers")
        return self


class RayConfig(Section):
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
    resources: dict[str, float] = Field(default={})
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


def require_split(teacher: TeacherConfig, ray: RayConfig, signal: SignalConfig) -> None:
    """Raises ValueError where a teacher is spread over devices that `ray` does not give it."""
    if teacher.split == "tensors" and ray.placement != "default":
        raise ValueError(
            f"ray.placement is {ray.placement}, but teacher.split tensors sets the ranks of each teacher close "
            "together by itself: leave it out"
        )
    if teacher.split == "tensors" and ray.gpus_per_actor not in (0, 1):
        raise ValueError(
            f"teacher.split is tensors and ray.gpus_per_actor {ray.gpus_per_actor:g}: each of the ranks is a process "
            "with one GPU of its own, set it to 1"
        )
    if teacher.split == "tensors" and signal.attention:
        raise ValueError(
            "signal.attention with teacher.split tensors: each rank computes the maps of its own heads only; use split "
            "layers"
        )
    if teacher.split == "layers" and 0 < ray.gpus_per_actor < 2:
        raise ValueError(
            f"teacher.split is layers and ray.gpus_per_actor {ray.gpus_per_actor:g}: give each actor two GPUs or "
            "more, or leave split out"
        )
