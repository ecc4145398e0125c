"""What a recipe says about its corpus.

Enters: the recipe's `corpus` section. Leaves: frozen, checked settings. Costs: pydantic's import, nothing else.
"""

from glob import has_magic
from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Form = Literal["text", "pairs", "chat", "generations"]


class SourceConfig(BaseModel):
    """One place to read documents from. A bare string in the recipe stands for `path` alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str
    """A .txt, .jsonl, .jsonl.zst or .parquet file, a folder or a glob of them, a dataset folder written by
    `save_to_disk`, `python:NAME` for the text of a Python package, or `generations` for the responses that this
    recipe's `generate` section keeps."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What a student's `mix` calls it. null: `generations` for those, NAME of `python:NAME`, else the last part of the
    path that has no wildcard, without its ending (`data/wiki/*.jsonl`: wiki)."""

    weight: float = Field(default=1.0, gt=0)
    """Factor on the loss of this source's tokens."""

    form: Literal["auto", "text", "pairs", "chat"] = "auto"
    """What a record is; `auto` decides per record by its fields: messages, else prompt and response, else text."""

    text_field: str = "text"
    """Field that holds a plain document."""

    prompt_field: str = "prompt"
    """Field that holds a pair's prompt."""

    response_field: str = "response"
    """Field that holds a pair's response."""

    messages_field: str = "messages"
    """Field that holds a conversation: a list of {role, content}."""

    txt_documents: Literal["file", "line", "paragraph"] = "file"
    """What one document is in a .txt file: the whole file, every line, or what blank lines separate."""

    splits: tuple[str, ...] | None = None
    """Splits to read of a dataset folder that has several, in this order; must be given for such a folder."""

    @property
    def called(self) -> str:
        """`name`, or what is derived from `path`."""
        return self.name or _derived_name(self.path)

    def fields_read(self) -> tuple[str, ...]:
        """The columns of a table that are read."""
        return (self.text_field, self.prompt_field, self.response_field, self.messages_field)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


def _derived_name(path: str) -> str:
    """A source's name where none is given; several sources may have the same."""
    scheme, _, rest = path.partition(":")
    if scheme == "generations":
        return scheme
    if scheme == "python" and rest:
        return rest
    parts = [part for part in PurePath(path).parts if not has_magic(part) and part not in ("/", ".", "..")]
    if not parts:
        return path
    last = parts[-1]
    for ending in (".zst", ".txt", ".jsonl", ".parquet"):
        last = last[: -len(ending)] if last.lower().endswith(ending) and len(last) > len(ending) else last
    return last


class CorpusConfig(BaseModel):
    """What is read, how it becomes sequences, and what of it is learned or held out."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where the documents come from, in this order; a path, or a list of paths and source settings."""

    window: int = Field(default=1024, ge=2)
    """Most tokens in a sequence. Longer documents are split into several."""

    overlap: int = Field(default=0, ge=0)
    """Tokens of the previous window that a later one repeats as context, read and not learned again. At 0 the first
    token of a later window is never predicted; those are counted."""

    train_on: Literal["responses", "all"] = "responses"
    """Which tokens of pairs and conversations are learned: the assistant's, or all. Plain text is learned whole."""

    pairs_as: Literal["auto", "chat", "plain"] = "auto"
    """Pairs as a conversation of two turns, or as prompt + response with nothing between; `auto` is chat where the
    tokenizer has a chat template."""

    chat_template_options: dict[str, Any] = Field(default_factory=dict)
    """Variables handed to the chat template, such as `enable_thinking: false` or a fixed `date_string`."""

    append_eos: bool = True
    """End plain documents and plain pairs with the tokenizer's end-of-sequence token, unless it stands there."""

    heldout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the documents that evaluates and never trains. Decided by each document's content: what is added
    moves nothing, and copies of a document go together."""

    split_seed: int = 0
    """Another seed holds out other documents."""

    limit_documents: int | None = Field(default=None, ge=1)
    """Stop after so many documents."""

    limit_tokens: int | None = Field(default=None, ge=1)
    """Stop after the document that reaches so many tokens."""

    max_document_mib: int = Field(default=16, ge=1)
    """A document or line above this size is a bad line: tokenising takes 100 to 200 times its size in memory."""

    strict: bool = False
    """Stop at the first bad line instead of counting and reporting it."""

    @field_validator("sources", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict | SourceConfig) else value

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        given = [source.name for source in sources if source.name is not None]
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are named {twice[0]}: give each a name of its own")
        return sources

    def names(self) -> list[str]:
        """Of the sources, in their order. Derived ones may be the same."""
        return [source.called for source in self.sources]

    def settings(self) -> dict[str, Any]:
        """As JSON. A source without a name has no key for it, so that manifests of before names stay what they are."""
        stated = self.model_dump(mode="json")
        for source in stated["sources"]:
            if source["name"] is None:
                del source["name"]
        return stated

    @model_validator(mode="after")
    def _overlap_in_window(self) -> "CorpusConfig":
        if self.overlap >= self.window:
            raise ValueError(f"overlap must be less than window, got overlap {self.overlap} and window {self.window}")
        return self
