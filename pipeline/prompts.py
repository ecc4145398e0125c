"""The prompts that a teacher is to answer: records in, a manifest of token ids out, and a table of their texts.

Enters: a `GenerateConfig` and a fast tokenizer. Leaves: `prompts.parquet`, a corpus manifest of which nothing is
learned, so that planning and naming of bad units are those of every corpus; and beside it `prompts.texts.parquet`.
Costs: tokenising once; memory of one batch. Nothing is dropped without a word: what cannot be asked is counted, named,
and with `generate.strict` an error.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2.exceptions import TemplateError

from stillroom.pipeline.corpus import sources
from stillroom.pipeline.corpus.config import CorpusConfig
from stillroom.pipeline.corpus.encode import Encoder
from stillroom.pipeline.corpus.prompt_counts import Places, PromptCounts
from stillroom.pipeline.corpus.readers import BadLine, BlankLine, Record, read
from stillroom.pipeline.corpus.render import RecordError, Rendered, messages_of
from stillroom.pipeline.recipe.generate_schema import GenerateConfig, PromptSource
from stillroom.storage.errors import CorpusError, RecipeError
from stillroom.storage.identity import canonical_json
from stillroom.storage.manifest import Manifest, ManifestMeta, ManifestRow
from stillroom.storage.manifest_writer import ManifestWriter
from stillroom.storage.records import Int32, Sequence, digest128

#: Raised when the same records make other prompts.
REVISION = 1
_BATCH = 256
_TEXTS = pa.schema(
    [("prompt", pa.string()), ("text", pa.string()), ("messages", pa.string()), ("reference", pa.string())]
)


@dataclass(frozen=True)
class PromptText:
    """What a prompt says. text: for people and for a user's function, the user's last turn of a conversation. messages:
    the conversation, system prompt included, or None for plain text. reference: the right answer, or None."""

    text: str
    messages: list[dict[str, Any]] | None
    reference: str | None


class EmptyPrompt(RecordError):
    """A record that has a prompt, in which nothing stands."""


def texts_path(manifest: Path) -> Path:
    return manifest.with_suffix(".texts.parquet")


def ingest_prompts(
    config: GenerateConfig, corpus: CorpusConfig, tokenizer: Any, *, window: int | None, out: Path, root: Path = Path()
) -> tuple[Manifest, PromptCounts, bool]:
    """The manifest of the prompts, made anew only if something that it is made of has changed (last value).

    corpus: for the chat template's options. window: tokens of prompt and response together that the engine takes, None
    where nobody knows.
    Raises RecipeError for a source or tokenizer that cannot be used, CorpusError where no prompt is left, and with
    `strict` for the first that cannot be asked.
    """
    encoder = Encoder(corpus.model_copy(update={"append_eos": False}), tokenizer)
    if config.prompts_as == "chat" and encoder.template is None:
        raise RecipeError("generate.prompts_as is chat, and the tokenizer has no chat template: set it to plain")
    files = [file for source in config.prompts for file in sources.find(source, root)]
    inputs = _inputs(config, encoder, files, window)
    if out.exists() and texts_path(out).exists():
        manifest = Manifest.open(out)
        if manifest.meta.inputs == inputs:
            return manifest, PromptCounts(**manifest.meta.counts), False
    counts, places = PromptCounts(), Places()
    with ManifestWriter(out) as writer, pq.ParquetWriter(_temporary(out), _TEXTS, compression="zstd") as texts:
        for batch in _batches(_records(config, encoder, files, counts)):
            _write_batch(batch, config, encoder, window, writer, texts, counts, places)
            if counts.stopped_at:
                break
        counts.set_duplicates(writer.count_duplicates(), places.repeated)
        _require_some(config, counts)
        texts.close()
        _temporary(out).replace(texts_path(out))
        writer.commit(
            ManifestMeta(
                window=window or 0,
                overlap=0,
                tokenizer=encoder.digest,
                chat_template=encoder.template_digest,
                vocabulary=encoder.vocabulary,
                counts=counts.as_dict(),
                config=config.model_dump(mode="json"),
                inputs=inputs,
            )
        )
    return Manifest.open(out), counts, True


def read_texts(manifest: Path) -> Mapping[str, PromptText]:
    """Texts by prompt digest; of a prompt that occurs twice the first."""
    found: dict[str, PromptText] = {}
    for row in pq.read_table(texts_path(manifest), use_threads=False).to_pylist():
        messages = json.loads(row["messages"]) if row["messages"] else None
        found.setdefault(row["prompt"], PromptText(row["text"], messages, row["reference"]))
    return found


def _temporary(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(f".{texts_path(out).name}.tmp")


def _inputs(config: GenerateConfig, encoder: Encoder, files: list[Any], window: int | None) -> str:
    asked = config.model_dump(mode="json", include={"prompts", "system", "prompts_as", "limit_prompts", "strict"})
    asked["seed"] = config.decoding.seed  # places of stretches
    stats = []
    for file in files:
        if isinstance(file, sources.SourceFile):
            stat = file.path.stat()
            stats.append([file.name, stat.st_size, stat.st_mtime_ns])
    room = None if window is None else window - config.decoding.max_tokens
    return digest128(b"stillroom.prompts.1", canonical_json([REVISION, asked, encoder.fingerprint, stats, room]))


def _records(
    config: GenerateConfig, encoder: Encoder, files: list[Any], counts: PromptCounts
) -> Iterator[tuple[Record, PromptText, Rendered]]:
    """Every record that is a prompt, or a document to be continued, rendered."""
    for file in files:
        if isinstance(file, sources.Passed):
            continue
        for item in read(file, limit_bytes=16 << 20):
            if isinstance(item, BlankLine):
                continue
            if isinstance(item, BadLine):
                _leave_out(config, counts, "unreadable", f"{item.source}:{item.line}: {item.reason}", item.records)
                continue
            try:
                text = _prompt_text(item, config.system)
                yield item, text, _rendered(config, encoder, text)
            except RecordError as error:
                kind = "empty" if isinstance(error, EmptyPrompt) else "without a prompt"
                _leave_out(config, counts, kind, f"{item.source}:{item.line}: {error}")


def _leave_out(config: GenerateConfig, counts: PromptCounts, kind: str, example: str, records: int = 1) -> None:
    counts.leave_out(kind, example, records)
    if config.strict:
        raise CorpusError(f"{example} (generate.strict stops at the first prompt that cannot be used)")


def _prompt_text(record: Record, system: str | None) -> PromptText:
    settings, fields = record.settings, record.fields
    assert isinstance(settings, PromptSource)
    if settings.continue_tokens is not None:
        document = fields.get(settings.text_field)
        if not isinstance(document, str) or not document.strip():
            raise RecordError(f"it has no document in {settings.text_field} to be continued")
        return PromptText(document, None, None)
    reference = fields.get(settings.reference_field)
    if settings.form in ("auto", "chat") and fields.get(settings.messages_field) is not None:
        messages = messages_of(fields, settings.messages_field)
        if messages and messages[-1].get("role") == "assistant":
            last = messages.pop()
            reference = last.get("content") if reference is None else reference
        if not messages or not str(messages[-1].get("content") or "").strip():
            raise EmptyPrompt("the prompt is empty")
        text = str(messages[-1]["content"])
    else:
        name = settings.prompt_field if settings.prompt_field in fields else settings.text_field
        value = fields.get(name)
        if not isinstance(value, str):
            raise RecordError(f"it has no text in {settings.prompt_field}, {settings.messages_field} or "
                              f"{settings.text_field}")  # fmt: skip
        if not value.strip():
            raise EmptyPrompt("the prompt is empty")
        reference = fields.get(settings.response_field) if reference is None else reference
        messages, text = [{"role": "user", "content": value}], value
    if system is not None and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    return PromptText(text, messages, None if reference is None else str(reference))


def _rendered(config: GenerateConfig, encoder: Encoder, prompt: PromptText) -> Rendered:
    messages = prompt.messages or []
    if prompt.messages is None:  # a document to be continued
        return Rendered("text", b"", prompt.text, None, special=True, eos=False)
    if config.prompts_as == "plain" or encoder.template is None:
        text = "\n\n".join(str(turn["content"]) for turn in messages)
        return Rendered("text", b"", text, None, special=True, eos=False)
    try:
        text = encoder.template(messages, True)
    except (TemplateError, TypeError, ValueError) as error:
        raise RecordError(f"the chat template refuses it: {error}") from error
    return Rendered("chat", b"", text, None, special=False, eos=False)


def _batches(found: Iterator[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in found:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_batch(
    batch: list[tuple[Record, PromptText, Rendered]],
    config: GenerateConfig,
    encoder: Encoder,
    window: int | None,
    writer: ManifestWriter,
    texts: Any,
    counts: PromptCounts,
    places: Places,
) -> None:
    rows = []
    encoded = encoder.encode([rendered for _, _, rendered in batch])
    for (record, text, _), tokens in zip(batch, encoded, strict=True):
        for ids, said in _asked(record, text, tokens.input_ids, config, encoder):
            fault = _fault(ids, config, window)
            if fault:
                kind, reason = fault
                _leave_out(config, counts, kind, f"{record.source}:{record.line}: {reason}")
                continue
            sequence = Sequence(ids)
            places.add(sequence.digest, f"{record.source}:{record.line}")
            writer.append(
                ManifestRow(
                    sequence=sequence,
                    mask=np.zeros(len(ids), bool),
                    weight=record.settings.weight,
                    document=counts.prompts,
                    source=record.source,
                    line=record.line,
                    heldout=False,
                )
            )
            messages = None if said.messages is None else json.dumps(said.messages, ensure_ascii=False)
            rows.append(
                {"prompt": sequence.digest, "text": said.text, "messages": messages, "reference": said.reference}
            )
            counts.prompts += 1
            counts.tokens += len(ids)
            if config.limit_prompts is not None and counts.prompts >= config.limit_prompts:
                counts.stopped_at = f"generate.limit_prompts = {config.limit_prompts}"
                break
        if counts.stopped_at:
            break
    if rows:
        texts.write_table(pa.Table.from_pylist(rows, _TEXTS))


def _asked(
    record: Record, text: PromptText, ids: Int32, config: GenerateConfig, encoder: Encoder
) -> Iterator[tuple[Int32, PromptText]]:
    """The prompt itself; or stretches of a document, from places that its content decides, with what they say."""
    settings = record.settings
    assert isinstance(settings, PromptSource)
    if settings.continue_tokens is None:
        yield ids, text
        return
    least, most = settings.continue_tokens
    for number in range(settings.continuations):
        seed = config.decoding.seed.to_bytes(8, "little", signed=True)
        drawn = int(digest128(b"stillroom.continue.1", ids.astype("<i4").tobytes(), bytes([number % 256]), seed), 16)
        size = least + drawn % (most - least + 1)
        start = (drawn >> 64) % max(len(ids) - size, 1)
        stretch = ids[start : start + size] if len(ids) > size else ids[:0]
        yield stretch, PromptText(encoder.text(stretch), None, None)


def _fault(ids: Int32, config: GenerateConfig, window: int | None) -> tuple[str, str] | None:
    """Kind and reason why these ids cannot be asked, or None."""
    if not len(ids):
        return "empty", "the prompt is empty, or its document shorter than continue_tokens"
    most = config.decoding.max_tokens
    if window is not None and len(ids) + most > window:
        return "too long", (
            f"a prompt of {len(ids):,} tokens and up to {most:,} of a response do not fit in {window:,}: shorten it, "
            "or lower generate.decoding.max_tokens"
        )
    return None


def _require_some(config: GenerateConfig, counts: PromptCounts) -> None:
    if not counts.prompts:
        places = ", ".join(source.path for source in config.prompts)
        first = f"; the first that was left out: {counts.bad_examples[0]}" if counts.bad_examples else ""
        raise CorpusError(f"there is no prompt in {places}: {counts.bad} records left out{first}")
