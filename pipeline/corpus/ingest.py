"""The corpus stage: documents in, manifest out.

Enters: a `CorpusConfig` and a fast tokenizer. Leaves: a manifest, written whole or not at all, and the counts of
all that was read, kept and left out. Costs: tokenising once, on the cores the tokenizer uses; memory is one
batch of documents, whatever the corpus. Equal input gives equal bytes.

    find files ─► read records ─► render ─► batch ─► encode ─► split into windows ─► manifest
"""

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from stillroom.pipeline.corpus import sources, windows
from stillroom.pipeline.corpus.config import CorpusConfig
from stillroom.pipeline.corpus.counts import Counts
from stillroom.pipeline.corpus.encode import Encoded, Encoder
from stillroom.pipeline.corpus.readers import BadLine, BlankLine, Record, read
from stillroom.pipeline.corpus.render import RecordError, Rendered, Renderer
from stillroom.storage.errors import CorpusError
from stillroom.storage.identity import canonical_json
from stillroom.storage.manifest import Manifest, ManifestMeta, ManifestRow
from stillroom.storage.manifest_writer import ManifestWriter
from stillroom.storage.records import Sequence, digest128

#: Raised when the rows made of the same input change, so that manifests of before are made anew.
REVISION = 1
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20

Progress = Callable[[Counts], None]
Found = list[sources.SourceFile | sources.Passed]


def ingest(
    config: CorpusConfig, tokenizer: Any, *, out: Path, root: Path = Path(), progress: Progress | None = None
) -> Manifest:
    """Read the corpus and write its manifest to `out`.

    tokenizer: of transformers, a fast one. root: where relative paths start. progress: called with the running
    counts after every batch.

    Raises RecipeError for a source or tokenizer that cannot be used; CorpusError for a corpus without documents, a
    chat template that cannot be masked, and with `strict` for the first bad line.
    """
    encoder = Encoder(config, tokenizer)
    return _ingest(config, encoder, _find(config, root), out, progress)


def ingest_if_needed(
    config: CorpusConfig, tokenizer: Any, *, out: Path, root: Path = Path(), progress: Progress | None = None
) -> tuple[Manifest, bool]:
    """Like `ingest`, but reuses `out` if it was made of this configuration, tokenizer and these files (by path, size
    and time of change). Also returns whether it ingested."""
    held = held_manifest(config, tokenizer, out=out, root=root)
    if held is not None:
        return held, False
    encoder = Encoder(config, tokenizer)
    return _ingest(config, encoder, _find(config, root), out, progress), True


def held_manifest(config: CorpusConfig, tokenizer: Any, *, out: Path, root: Path = Path()) -> Manifest | None:
    """What lies at `out`, if it was made of this configuration, tokenizer and these files."""
    if not out.exists():
        return None
    manifest = Manifest.open(out)
    inputs = _inputs(config, Encoder(config, tokenizer), _find(config, root))
    return manifest if manifest.meta.inputs == inputs else None


def _find(config: CorpusConfig, root: Path) -> Found:
    return [file for source in config.sources for file in sources.find(source, root)]


def _inputs(config: CorpusConfig, encoder: Encoder, found: Found) -> str:
    """Digest of everything the manifest is made of; the files by size and time, not content."""
    files: list[list[Any]] = []
    for file in found:
        if isinstance(file, sources.SourceFile):
            stat = file.path.stat()
            files.append([file.name, stat.st_size, stat.st_mtime_ns])
    parts = [REVISION, config.settings(), encoder.digest, encoder.fingerprint, files]
    return digest128(b"stillroom.inputs.1", canonical_json(parts))


def _ingest(config: CorpusConfig, encoder: Encoder, found: Found, out: Path, progress: Progress | None) -> Manifest:
    renderer = Renderer(config, encoder.template, encoder.digest)
    counts = Counts(pairs_as="chat" if renderer.pairs_as_chat else "plain")
    counts.sources = [{"name": name, "documents": 0} for name in config.names()]
    inputs = _inputs(config, encoder, found)
    with ManifestWriter(out) as writer:
        for batch in _batches(islice(_documents(config, renderer, found, counts), config.limit_documents)):
            encoded = encoder.encode([rendered for _, rendered in batch])
            for (record, rendered), tokens in zip(batch, encoded, strict=True):
                _append(config, writer, counts, record, rendered, tokens)
                if _limit_reached(config, counts):
                    break
            if progress:
                progress(counts)
            if counts.stopped_at:
                break
        counts.duplicate_sequences = writer.count_duplicates()
        _require_training(config, counts)
        writer.commit(
            ManifestMeta(
                window=config.window,
                overlap=config.overlap,
                tokenizer=encoder.digest,
                chat_template=encoder.template_digest,
                vocabulary=encoder.vocabulary,
                counts=counts.as_dict(),
                config=config.settings(),
                inputs=inputs,
            )
        )
    return Manifest.open(out)


def _documents(
    config: CorpusConfig, renderer: Renderer, found: Found, counts: Counts
) -> Iterator[tuple[Record, Rendered]]:
    """All documents in order; counts what is none."""
    limit_bytes = config.max_document_mib << 20
    for file in found:
        if isinstance(file, sources.Passed):
            counts.add_passed(file.name)
            continue
        for item in read(file, limit_bytes=limit_bytes):
            if isinstance(item, BlankLine):
                counts.blank_lines += 1
                continue
            if isinstance(item, Record):
                try:
                    yield item, _rendered(renderer, item, limit_bytes)
                    continue
                except RecordError as error:
                    item = BadLine(item.source, item.line, str(error))
            counts.add_bad(item)
            if config.strict:
                raise CorpusError(
                    f"{item.source}:{item.line}: {item.reason} (corpus.strict stops at the first bad line)"
                )


def _rendered(renderer: Renderer, record: Record, limit_bytes: int) -> Rendered:
    rendered = renderer.render(record.fields, record.settings, f"{record.source}:{record.line}")
    if len(rendered.content) > limit_bytes:
        raise RecordError(f"more than corpus.max_document_mib = {limit_bytes >> 20} MiB as one document")
    return rendered


def _batches(documents: Iterator[tuple[Record, Rendered]]) -> Iterator[list[tuple[Record, Rendered]]]:
    batch: list[tuple[Record, Rendered]] = []
    characters = 0
    for record, rendered in documents:
        batch.append((record, rendered))
        characters += len(rendered.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _append(
    config: CorpusConfig, writer: ManifestWriter, counts: Counts, record: Record, rendered: Rendered, tokens: Encoded
) -> None:
    heldout = is_heldout(rendered.content, share=config.heldout, seed=config.split_seed)
    document = counts.add_document(rendered.form, heldout=heldout, empty=not len(tokens.input_ids))
    # By identity: the same path may stand there twice.
    place = next(i for i, source in enumerate(config.sources) if source is record.settings)
    counts.sources[place]["documents"] += 1
    counts.retokenised_documents += rendered.form == "generations" and rendered.ids is None
    if not len(tokens.input_ids):
        return
    cut = windows.split(len(tokens.input_ids), window=config.window, overlap=config.overlap)
    for number, (start, end, context) in enumerate(cut):
        mask = tokens.mask[start:end].copy()
        mask[:context] = False
        row = ManifestRow(
            sequence=Sequence(tokens.input_ids[start:end], context),
            mask=mask,
            weight=record.settings.weight,
            document=document,
            source=record.source,
            line=record.line,
            heldout=heldout,
            window=number,
        )
        writer.append(row)
        counts.add_sequence(row)


def is_heldout(content: bytes, *, share: float, seed: int) -> bool:
    """Whether a document of this content is held out: a function of content and seed alone."""
    salt = seed.to_bytes(16, "little", signed=True)
    drawn = hashlib.blake2b(content, digest_size=8, salt=salt, person=b"stillroom.split").digest()
    return int.from_bytes(drawn, "little") < share * 2**64


def _limit_reached(config: CorpusConfig, counts: Counts) -> bool:
    if config.limit_documents is not None and counts.documents >= config.limit_documents:
        counts.stopped_at = f"limit_documents = {config.limit_documents}"
    elif config.limit_tokens is not None and counts.tokens >= config.limit_tokens:
        counts.stopped_at = f"limit_tokens = {config.limit_tokens}"
    return counts.stopped_at is not None


def _require_training(config: CorpusConfig, counts: Counts) -> None:
    if not counts.sequences:
        places = ", ".join(source.path for source in config.sources)
        first = f"; the first bad line: {counts.bad_examples[0]}" if counts.bad_examples else ""
        raise CorpusError(
            f"the corpus {places} is empty: {counts.documents} documents, {counts.empty_documents} of them empty, "
            f"{counts.bad_lines} bad lines{first}"
        )
    if not counts.train_sequences:
        raise CorpusError(
            f"every document of the corpus ({counts.documents}) falls into the held-out split and none is left to "
            f"train on: set corpus.heldout to 0 (it is {config.heldout}) or take another corpus.split_seed"
        )
