"""What a recipe says about responses that the teacher writes: prompts, decoding, engine, and which of them are kept.

Enters: validated values. Leaves: frozen settings. Costs: nothing. The text under a field is its documentation
everywhere, as in schema.py.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stillroom.pipeline.corpus.config import SourceConfig
from stillroom.pipeline.recipe.section import Section
from stillroom.storage.generations.records import Decoding


class PromptSource(SourceConfig):
    """One place to read prompts from. A bare string in the recipe stands for `path` alone."""

    reference_field: str = "reference"
    """Field that holds the right answer. Where it is missing, a pair's response or the last turn of the assistant is
    it."""

    continue_tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Documents to be continued instead of prompts: of each a random stretch of so many tokens, at least and at most,
    is the prompt, as it is. Against overfitting to the prompts. null: prompts."""
    continuations: int = Field(default=1, ge=1)
    """Stretches of each document, with `continue_tokens`; drawn from its content and `decoding.seed`."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.continue_tokens is not None and self.continue_tokens[0] > self.continue_tokens[1]:
            raise ValueError(f"expected continue_tokens as [least, most], got {list(self.continue_tokens)}")
        return self

    def fields_read(self) -> tuple[str, ...]:
        return (*super().fields_read(), self.reference_field)


class DecodingConfig(Section):
    """How the teacher is asked. All of it is part of the identity of the generations."""

    method: Literal["greedy", "sample", "beam"] = "sample"
    """greedy: the most likely token each time. sample: drawn, by temperature, top_p and top_k. beam: search for the
    response of the largest total logprob."""
    n: int = Field(default=1, ge=1, le=1024)
    """Responses per prompt."""
    max_tokens: int = Field(default=256, ge=1)
    """The most tokens of a response; one that is not finished by then is truncated."""
    min_tokens: int = Field(default=0, ge=0)
    """A response may not end before."""
    temperature: float = Field(default=0.8, gt=0, le=10)
    """Of sampling: logits are divided by it."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Of sampling: only the most likely tokens that together hold this share of the probability."""
    top_k: int = Field(default=0, ge=0)
    """Of sampling: only so many of the most likely tokens. 0: all."""
    beams: int = Field(default=4, ge=2, le=64)
    """Of beam search: how many responses are followed at a time."""
    length_penalty: float = 0.0
    """Of beam search: responses are ranked by total logprob / tokens to this power. 0: by total logprob."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a response."""
    seed: int = 0
    """Of sampling. Each response draws from a seed of its own, made of this, its prompt and its number."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.method == "greedy" and self.n > 1:
            raise ValueError(f"greedy gives one response, got n {self.n}: set method to sample or beam")
        if self.method == "beam" and self.n > self.beams:
            raise ValueError(f"expected at least n beams, got n {self.n} and beams {self.beams}")
        if self.method == "beam" and (self.stop or self.min_tokens):
            raise ValueError("vLLM's beam search knows neither stop nor min_tokens: leave them out")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"expected min_tokens of at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        return self

    def spec(self) -> Decoding:
        """Without what the method does not use: it changes nothing of what is written."""
        drawn, searched = self.method == "sample", self.method == "beam"
        return Decoding(
            method=self.method,
            n=self.n,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature if drawn else None,
            top_p=self.top_p if drawn else None,
            top_k=self.top_k if drawn else None,
            beams=self.beams if searched else None,
            length_penalty=self.length_penalty if searched else None,
            stop=self.stop,
            seed=self.seed if drawn else None,
        )


class EngineConfig(Section):
    """How vLLM runs the teacher. `ray` says how many engines, and what each is given."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the forward pass. null: as `teacher.dtype`."""
    quantization: str | None = None
    """vLLM's name of a quantisation of the weights, such as `fp8`. null: as they are, which a recipe with
    `teacher.quantisation` may not have: that is made by torchao, for scoring, and vLLM does not make it."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share a model; `ray.gpus_per_actor` must be the same."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Tokens of prompt and response together. null: the model's own limit."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of each GPU that an engine takes."""
    cpu_kv_cache_gib: int = Field(default=1, ge=1)
    """GiB for keys and values where an engine runs on a CPU."""
    max_num_seqs: int = Field(default=128, ge=1)
    """Responses that an engine writes at one time."""
    enforce_eager: bool = False
    """Leave out CUDA graphs and compilation: starts faster, writes slower. Always so on a CPU."""


class QualityConfig(Section):
    """Which responses are kept. All stay in the store of generations, with the reason; other filters need no new
    generation."""

    min_tokens: int = Field(default=1, ge=0)
    """Shorter responses are dropped; the end-of-sequence token counts."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longer ones are dropped. null: no bound."""
    truncated: Literal["drop", "keep"] = "drop"
    """Those that reached `decoding.max_tokens` before they ended."""
    ngram: int = Field(default=4, ge=1)
    """Length in tokens of what counts as repeated."""
    max_repetition: float | None = Field(default=0.5, ge=0, le=1)
    """Dropped are those of which a larger share of n-grams occurred before in the same response. null: no bound."""
    duplicates: Literal["drop", "keep"] = "drop"
    """A response with the text of an earlier one to the same prompt."""
    min_mean_logprob: float | None = Field(default=None, le=0)
    """Dropped are those whose tokens have a lower mean logprob (nats, the teacher's own at T = 1). null: no bound."""
    reference: Literal["exact", "numeric"] | None = None
    """Drop what disagrees with the prompt's reference, where it has one. exact: the same text but for blanks at the
    ends. numeric: the last number in the response equals the last in the reference. null: not looked at."""
    function: str | None = None
    """Your own: `module:name` or `path/file.py:name`, called with (prompt, response, reference), texts of which the
    last may be None. It returns true or false, or a score. It runs in this process: name only code that you trust."""
    min_score: float | None = None
    """Dropped are those to which `function` gives less. null: no bound."""
    keep: Literal["all", "best"] = "all"
    """all: every response that passes. best: of those to one prompt the best."""
    best_by: Literal["mean_logprob", "total_logprob", "score"] = "mean_logprob"
    """What is best: the largest mean or total logprob, or score of `function`."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.function is None and (self.min_score is not None or self.best_by == "score"):
            raise ValueError("min_score and best_by score need a function")
        if self.function is not None and not all(self.function.rpartition(":")[::2]):
            raise ValueError(f"expected function as module:name or path/file.py:name, got {self.function}")
        return self


class GenerateConfig(Section):
    """Responses that the teacher writes to prompts, for students to learn from (sequence-level distillation). A corpus
    source `generations` stands for those that are kept."""

    prompts: tuple[PromptSource, ...] = Field(min_length=1)
    """Where the prompts come from: sources as those of `corpus`. Records have a prompt, messages that end with the
    user's, or a text."""
    system: str | None = Field(default=None, min_length=1)
    """A system prompt for conversations that have none of their own."""
    prompts_as: Literal["auto", "chat", "plain"] = "auto"
    """Prompts through the tokenizer's chat template, or as they are; auto is chat where there is a template."""
    limit_prompts: int | None = Field(default=None, ge=1)
    """Stop after so many prompts."""
    strict: bool = False
    """Stop at the first prompt that cannot be used (empty, too long, a bad line) instead of leaving it out with a
    notice."""
    path: str = ""
    """Folder of the generations, on storage that every node sees, or `s3://bucket/prefix`. Empty: `generations` in the
    run's folder."""
    unit_tokens: int = Field(default=16384, ge=1)
    """Tokens of a work unit, prompts and the most that may be generated: what is retried and committed as a whole."""
    decoding: DecodingConfig = DecodingConfig()
    """How the teacher is asked."""
    engine: EngineConfig = EngineConfig()
    """How vLLM runs the teacher."""
    quality: QualityConfig = QualityConfig()
    """Which responses are kept."""

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict | SourceConfig) else value
