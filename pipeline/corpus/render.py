"""Records to text, with the stretches of it that are to be learned.

Enters: a record's fields. Leaves: a `Rendered` document, or a `RecordError` with the reason. Costs: one rendering of
the chat template, and two more for each turn of the assistant when only responses are learned.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from stillroom.pipeline.corpus.config import CorpusConfig, Form, SourceConfig
from stillroom.pipeline.corpus.generations import FIELD, Kept
from stillroom.storage.errors import CorpusError
from stillroom.storage.records import Int32

Message = dict[str, Any]
Template = Callable[[list[Message], bool], str]
Span = tuple[int, int]


class RecordError(Exception):
    """This record cannot become a document; the message is the reason."""


@dataclass(frozen=True)
class Rendered:
    """A document as text.

    content: what the record says, apart from any template: decides the split. spans: characters that are
    learned, None for all. special: the tokenizer adds its own special tokens (a template has written them). eos: the
    document ends with one. ids: int32 [T] where the tokens are known and not to be made from the text, of which the
    first `unlearned` are a prompt.
    """

    form: Form
    content: bytes
    text: str
    spans: tuple[Span, ...] | None
    special: bool
    eos: bool
    ids: Int32 | None = None
    unlearned: int = 0


class Renderer:
    """Renders records by one configuration.

    template: the tokenizer's chat template, or None if it has none; takes messages and whether the assistant's
    next turn is to be opened. tokenizer: its digest; generations of the same one are taken as ids.
    """

    def __init__(self, config: CorpusConfig, template: Template | None, tokenizer: str = "") -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._template = template
        self.pairs_as_chat = config.pairs_as == "chat" or (config.pairs_as == "auto" and template is not None)

    def render(self, fields: dict[str, Any], settings: SourceConfig, where: str) -> Rendered:
        """Raises RecordError for a record that cannot be used, CorpusError for a template that cannot."""
        if FIELD in fields:
            return self._generation(fields[FIELD], where)
        match _form(fields, settings):
            case "text":
                return self._text(_string(fields, settings.text_field))
            case "pairs":
                prompt = _string(fields, settings.prompt_field)
                response = _string(fields, settings.response_field)
                return self._pair(prompt, response, where)
            case "chat":
                return self._chat(messages_of(fields, settings.messages_field), where)
            case _:
                raise AssertionError("generations are told by their field")

    def _generation(self, kept: Kept, where: str) -> Rendered:
        """All responses to a prompt fall into the same split: its digest decides."""
        response = kept.generation
        content = content_of_prompt(response.prompt)
        if kept.tokenizer == self._tokenizer:
            ids = np.concatenate([response.prompt_ids, response.response_ids])
            unlearned = 0 if self._config.train_on == "all" else len(response.prompt_ids)
            return Rendered("generations", content, response.text, None, False, False, ids, unlearned)
        prompt, conversation = kept.prompts.said(response.prompt)
        if conversation is None:
            rendered = self._text(prompt + response.text)
            return replace(rendered, form="generations", content=content)
        messages = json.loads(conversation)
        if self.pairs_as_chat:
            rendered = self._chat([*messages, {"role": "assistant", "content": response.text}], where)
        else:
            rendered = self._pair("\n\n".join(turn["content"] for turn in messages), response.text, where)
        return replace(rendered, form="generations", content=content)

    def _text(self, text: str) -> Rendered:
        return Rendered("text", _content("text", text), text, None, special=True, eos=self._config.append_eos)

    def _pair(self, prompt: str, response: str, where: str) -> Rendered:
        content = _content("pairs", [prompt, response])
        if self.pairs_as_chat and (prompt or response):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            text, spans = self._templated(turns, where)
            return Rendered("pairs", content, text, spans, special=False, eos=False)
        text = prompt + response
        spans = ((len(prompt), len(text)),) if self._config.train_on == "responses" else None
        return Rendered("pairs", content, text, spans, special=True, eos=self._config.append_eos)

    def _chat(self, messages: list[Message], where: str) -> Rendered:
        text, spans = self._templated(messages, where) if messages else ("", None)
        return Rendered("chat", _content("chat", messages), text, spans, special=False, eos=False)

    def _templated(self, messages: list[Message], where: str) -> tuple[str, tuple[Span, ...] | None]:
        if self._template is None:
            raise CorpusError(
                f"{where} is a conversation and the tokenizer has no chat template: use a tokenizer that has one, "
                "or give pairs with `pairs_as: plain`"
            )
        try:
            full = self._template(messages, False)
            spans = None if self._config.train_on == "all" else _assistant_spans(self._template, messages, full, where)
        except (TemplateError, TypeError, ValueError) as error:
            raise RecordError(f"the chat template refuses it: {error}") from error
        return full, spans


def _assistant_spans(template: Template, messages: list[Message], full: str, where: str) -> tuple[Span, ...]:
    """Where the assistant's turns lie in the full rendering: after the header that opens a turn, to the turn's end.

    Found from renderings of the conversation up to that turn, so it holds only for a template whose rendering of
    a beginning is a beginning of the rendering of the whole.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            ended = template(messages[: i + 1], False)
            _require_beginning(ended, full, messages[: i + 1], where)
            spans.append((_header_end(template, messages, i, full, where), len(ended)))
    return tuple(spans)


def _header_end(template: Template, messages: list[Message], i: int, full: str, where: str) -> int:
    """The character of `full` at which turn i's text begins, behind the header that opens it."""
    if i == 0:
        # No conversation before it to render: the header is what does not change when the text does.
        other = "b" if messages[0]["content"].lstrip().startswith("a") else "a"
        return _agreement(template([{**messages[0], "content": other}], False), full)
    opened = template(messages[:i], True)
    if full.startswith(opened):
        return len(opened)
    # A header that says more than history shows (an opened <think>, say): it ends where the two part. What came
    # before it must still agree.
    before = template(messages[:i], False)
    _require_beginning(before, full, messages[:i], where)
    return max(_agreement(opened, full), len(before))


def _require_beginning(part: str, full: str, messages: list[Message], where: str) -> None:
    if full.startswith(part):
        return
    at = _agreement(part, full)
    raise CorpusError(
        f"{where}: the chat template writes the first {len(messages)} turns differently when more follow (from "
        f"character {at}: {part[at : at + 24]!r} against {full[at : at + 24]!r}), so the assistant's part cannot be "
        "told: set `train_on: all`, split the conversation into one record per response, or use another template"
    )


def _agreement(a: str, b: str) -> int:
    """How many leading characters two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _form(fields: dict[str, Any], settings: SourceConfig) -> Form:
    if settings.form != "auto":
        return settings.form
    present = {name for name, value in fields.items() if value is not None}
    if settings.messages_field in present:
        return "chat"
    if {settings.prompt_field, settings.response_field} <= present:
        return "pairs"
    if settings.text_field in present:
        return "text"
    raise RecordError(
        f"expected {settings.messages_field}, {settings.prompt_field} and {settings.response_field}, or "
        f"{settings.text_field}; got {_names(present)}"
    )


def _names(names: set[str]) -> str:
    shown = sorted(names)[:8]
    return f"the fields {', '.join(shown)}{', …' if len(names) > 8 else ''}" if shown else "no field with a value"


def _string(fields: dict[str, Any], name: str) -> str:
    if fields.get(name) is None:
        raise RecordError(f"field {name} is missing; got {_names({k for k, v in fields.items() if v is not None})}")
    value = fields[name]
    if not isinstance(value, str):
        raise RecordError(f"field {name} is {type(value).__name__}, expected a string")
    return value


def messages_of(fields: dict[str, Any], name: str) -> list[Message]:
    """Raises RecordError where the field holds no conversation."""
    messages = fields.get(name)
    if isinstance(messages, dict) and messages and all(isinstance(v, list) for v in messages.values()):
        # How datasets before 4.0 stored a list of records: a record of lists.
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=False)]
    if not isinstance(messages, list):
        raise RecordError(f"field {name} is {type(messages).__name__}, expected a list of messages")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict):
        raise RecordError(f"{name} is {type(message).__name__}, expected an object with role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise RecordError(f"{name}.{key} is {type(message.get(key)).__name__}, expected a string")
    return {key: value for key, value in message.items() if value is not None}


def content_of_prompt(prompt: str) -> bytes:
    """What decides the split of the responses to a prompt, which is given by its digest."""
    return _content("generations", prompt)


def _content(form: Form, value: Any) -> bytes:
    try:
        if isinstance(value, str):
            return form.encode() + b"\0" + value.encode()
        return form.encode() + b"\0" + json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"text holds half a surrogate pair at character {error.start}, which no UTF-8 has") from error
