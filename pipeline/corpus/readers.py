"""Files to records, streaming.

Enters: a `SourceFile`. Leaves: records with the line they came from; what cannot be read leaves as a `BadLine`, so
that nothing is lost without a word and one bad file does not stop a corpus. Costs: one line, one batch of 256
rows, or one whole document where a .txt file is one; lines above `limit_bytes` are passed over unread.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import zstandard

from stillroom.pipeline.corpus import python_text
from stillroom.pipeline.corpus.config import SourceConfig
from stillroom.pipeline.corpus.generations import FIELD, kept_responses
from stillroom.pipeline.corpus.sources import SourceFile

_READ_BYTES = 1 << 20
#: zstd input fed at once: the output of one call has no bound but its ratio, about 10 on text.
_ZSTD_BYTES = 1 << 15
_ROWS = 256
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """What one line, row or file says. line: from 1."""

    source: str
    line: int
    fields: dict[str, Any]
    settings: SourceConfig


@dataclass(frozen=True)
class BadLine:
    """What could not be read. records: how many it stands for, where that is known."""

    source: str
    line: int
    reason: str
    records: int = 1


@dataclass(frozen=True)
class BlankLine:
    """A line of white space between records."""


Read = Record | BadLine | BlankLine


def read(file: SourceFile, *, limit_bytes: int) -> Iterator[Read]:
    """All that is in a file, in order."""
    try:
        match file.kind:
            case "parquet" | "arrow":
                yield from _table_rows(file)
            case "python":
                yield from _python(file)
            case "generations":
                for row, kept in kept_responses(file.path):
                    yield Record(file.name, row, {FIELD: kept}, file.settings)
            case "txt":
                yield from _txt(file, limit_bytes)
            case _:
                yield from _jsonl(file, limit_bytes)
    except OSError as error:
        yield BadLine(file.name, 0, f"cannot be read: {error.strerror or error}")


class _Cut(Exception):
    """The compressed stream ends or breaks in the middle; carries the reason."""


def _chunks(path: Path, compressed: bool) -> Iterator[bytes]:
    with path.open("rb") as file:
        if compressed:
            yield from _decompressed(file)
        else:
            while chunk := file.read(_READ_BYTES):
                yield chunk


def _decompressed(file: BinaryIO) -> Iterator[bytes]:
    """All frames of a zstd file. zstandard's own reader ends in silence where a file is cut short; this raises _Cut."""
    frame = None
    while chunk := file.read(_ZSTD_BYTES):
        while chunk:
            # The largest window there is: corpora packed with --long=31 need it.
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise _Cut(f"damaged zstd data ({error})") from error
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise _Cut("the zstd data is cut short: copy or download the file again")


def _lines(chunks: Iterator[bytes], limit_bytes: int) -> Iterator[bytes | None]:
    """Lines without their ends; None for one above the limit, of which no more than that is held."""
    parts: list[bytes] = []
    held = 0
    first = True
    for chunk in chunks:
        if first and chunk:
            chunk, first = chunk.removeprefix(_BOM), False
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            total = held + len(piece)
            yield b"".join([*parts, piece]).removesuffix(b"\r") if total <= limit_bytes else None
            parts, held = [], 0
        held += len(rest)
        parts.append(rest)
        if held > limit_bytes:
            parts = []
    if held:
        yield b"".join(parts).removesuffix(b"\r") if held <= limit_bytes else None


def _numbered_lines(file: SourceFile, limit_bytes: int) -> Iterator[tuple[int, str | BadLine]]:
    number = 0
    try:
        for line in _lines(_chunks(file.path, file.kind == "jsonl.zst"), limit_bytes):
            number += 1
            yield number, _decoded(file, number, line, limit_bytes)
    except _Cut as error:
        yield number + 1, BadLine(file.name, number + 1, str(error))


def _decoded(file: SourceFile, number: int, line: bytes | None, limit_bytes: int) -> str | BadLine:
    if line is None:
        return BadLine(file.name, number, f"more than corpus.max_document_mib = {limit_bytes >> 20} MiB")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return BadLine(file.name, number, f"invalid UTF-8 at byte {error.start} ({error.reason})")


def _jsonl(file: SourceFile, limit_bytes: int) -> Iterator[Read]:
    for number, line in _numbered_lines(file, limit_bytes):
        if isinstance(line, BadLine):
            yield line
        elif not line.strip():
            yield BlankLine()
        else:
            yield _parsed(file, number, line)


def _parsed(file: SourceFile, number: int, line: str) -> Record | BadLine:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        return BadLine(file.name, number, f"invalid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadLine(file.name, number, f"invalid JSON: {error}")
    if not isinstance(fields, dict):
        return BadLine(file.name, number, f"expected a JSON object, got {type(fields).__name__}")
    return Record(file.name, number, fields, file.settings)


def _txt(file: SourceFile, limit_bytes: int) -> Iterator[Read]:
    if file.settings.txt_documents == "file":
        yield _whole_file(file, limit_bytes)
        return
    by_line = file.settings.txt_documents == "line"
    paragraph: list[str] = []
    begun = 0
    for number, line in _numbered_lines(file, limit_bytes):
        if isinstance(line, BadLine):
            yield line
        elif not line.strip():
            if paragraph:
                yield _text(file, begun, "\n".join(paragraph))
            paragraph = []
            yield BlankLine()
        elif by_line:
            yield _text(file, number, line)
        else:
            begun = begun if paragraph else number
            paragraph.append(line)
    if paragraph:
        yield _text(file, begun, "\n".join(paragraph))


def _whole_file(file: SourceFile, limit_bytes: int) -> Record | BadLine:
    with file.path.open("rb") as opened:
        data = opened.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        return BadLine(
            file.name, 1, f"more than corpus.max_document_mib = {limit_bytes >> 20} MiB as one document: "
            "set txt_documents to line or paragraph, or raise the limit",
        )  # fmt: skip
    try:
        text = data.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return BadLine(file.name, line, f"invalid UTF-8 at byte {error.start} ({error.reason})")
    return _text(file, 1, text.replace("\r\n", "\n"))


def _text(file: SourceFile, line: int, text: str) -> Record:
    return Record(file.name, line, {file.settings.text_field: text}, file.settings)


def _python(file: SourceFile) -> Iterator[Read]:
    try:
        for line, text in python_text.documents(file.path.read_bytes()):
            yield _text(file, line, text)
    except SyntaxError as error:
        yield BadLine(file.name, error.lineno or 1, f"not Python of this version: {error.msg}")
    except (ValueError, RecursionError) as error:
        yield BadLine(file.name, 1, f"not Python of this version: {error}")


def _table_rows(file: SourceFile) -> Iterator[Read]:
    row = 0
    try:
        for batch in _arrow_batches(file) if file.kind == "arrow" else _parquet_batches(file):
            if isinstance(batch, BadLine):
                yield batch
                return
            for start in range(0, batch.num_rows, _ROWS):
                for fields in batch.slice(start, _ROWS).to_pylist():
                    row += 1
                    yield Record(file.name, row, fields, file.settings)
    except (pa.ArrowException, OSError) as error:
        yield BadLine(file.name, row + 1, f"cannot be read from this row on: {error}")


def _wanted(file: SourceFile, names: list[str], rows: int) -> list[str] | BadLine:
    fields = file.settings.fields_read()
    wanted = [name for name in dict.fromkeys(fields) if name in names]
    if not wanted:
        return BadLine(file.name, 0, f"has none of the columns {', '.join(fields)}: it has {', '.join(names)}", rows)
    return wanted


def _parquet_batches(file: SourceFile) -> Iterator[Any]:
    # A buffered stream, so that a row group of a gigabyte is not read at once.
    with pq.ParquetFile(file.path, buffer_size=_READ_BYTES, page_checksum_verification=True) as parquet:
        wanted = _wanted(file, parquet.schema_arrow.names, parquet.metadata.num_rows)
        if isinstance(wanted, BadLine):
            yield wanted
        else:
            yield from parquet.iter_batches(batch_size=_ROWS, columns=wanted, use_threads=False)


def _arrow_batches(file: SourceFile) -> Iterator[Any]:
    # Read, not mapped: mapped pages would count as the process's memory.
    with pa.OSFile(str(file.path)) as opened, pyarrow.ipc.open_stream(opened) as stream:
        wanted = _wanted(file, stream.schema.names, 1)
        if isinstance(wanted, BadLine):
            yield wanted
        else:
            yield from (batch.select(wanted) for batch in stream)
