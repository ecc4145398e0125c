"""One unit's responses as one Parquet file, verified both ways.

Enters: responses, by prompt and sample. Leaves: a `ShardRef`, named as every shard is; and back, responses. Costs: one
pass; about 7 bytes a generated token.

    prompt string (digest) | sample int32 | prompt_ids, response_ids list<int32> | logprobs list<float32> |
    finish string | text string

Row group 0 is the whole unit. The metadata key `stillroom` says what the file is, and by which engine.
"""

import json
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillroom.storage.codecs.columns import element, flat, flat_list, lists
from stillroom.storage.errors import CorruptShard, FormatMismatch, StoreError
from stillroom.storage.files import Files, sha256_hex
from stillroom.storage.generations.records import FINISHES, FORMAT_VERSION, Generation, GenerationIdentity
from stillroom.storage.pages import MOST_BYTES, check_shard
from stillroom.storage.records import ShardRef, Unit
from stillroom.storage.schema import value_bytes
from stillroom.storage.shard import shard_path

_LISTS = {"prompt_ids": pa.int32(), "response_ids": pa.int32(), "logprobs": pa.float32()}

SCHEMA = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        *(flat_list(name, kind) for name, kind in _LISTS.items()),
        pa.field("finish", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
_SETTINGS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": False,
    "column_encoding": {element(name): "BYTE_STREAM_SPLIT" for name in _LISTS},
    "write_statistics": False,
    "write_page_checksum": True,
    "store_schema": False,
}


@dataclass(frozen=True)
class StoredUnit:
    """A shard's responses, in the unit's order, and what its engine said of itself. unit: its id."""

    unit: str
    responses: list[Generation]
    engine: dict[str, Any]


def write_generations(
    files: Files, identity: GenerationIdentity, unit: Unit, responses: Seq[Generation], engine: dict[str, Any]
) -> ShardRef:
    """Put a unit's responses under their content's name. Nothing counts until it is committed.

    responses: n of each prompt of the unit, in the unit's order, samples rising. engine: JSON-able, without times or
    hosts. Raises ValueError if they are not that, StoreFull, StoreError.
    """
    _require_complete(unit, responses, identity)
    ids, sizes = _ends(responses)
    columns = [
        pa.array([r.prompt for r in responses]),
        pa.array([r.sample for r in responses], pa.int32()),
        *(lists(values, sizes[name], _LISTS[name]) for name, values in ids.items()),
        pa.array([r.finish for r in responses]),
        pa.array([r.text for r in responses]),
    ]
    table = pa.table(columns, schema=SCHEMA)
    if table.nbytes > MOST_BYTES // 2:  # a reader refuses twice that
        raise ValueError(f"unit {unit.id}: {table.nbytes:,} bytes of responses; lower generate.unit_tokens")
    described = {
        "kind": "generations",
        "format": FORMAT_VERSION,
        "unit": unit.id,
        "identity": identity.id,
        "teacher": identity.teacher,
        "engine": engine,
    }
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SCHEMA, **_SETTINGS) as writer:
        writer.write_table(table, row_group_size=max(1, len(responses)))
        writer.add_key_value_metadata({"stillroom": json.dumps(described, sort_keys=True)})
    data = sink.getvalue()
    digest = sha256_hex(memoryview(data))
    path = shard_path(unit.id, digest)
    files.write(path, memoryview(data))
    return ShardRef(unit.id, path, digest, data.size)


def read_generations(files: Files, identity: GenerationIdentity, ref: ShardRef) -> StoredUnit:
    """Raises CorruptShard naming the file, FormatMismatch, StoreError."""
    where = f"{files.uri}/{ref.path}"
    source = files.open(ref.path)
    data = memoryview(source.read_buffer()).cast("B")
    found = sha256_hex(data)
    if found != ref.sha256:
        raise CorruptShard(
            f"{where} has sha256 {found[:16]}…, committed was {ref.sha256[:16]}…: it was damaged or replaced; put "
            f"back a copy of it (its name holds its digest), or {_again(files)}"
        )
    try:
        check_shard(data, value_bytes(SCHEMA))
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            engine = _engine(file.metadata.metadata, identity, ref, where)
            if not file.schema_arrow.equals(SCHEMA):
                raise FormatMismatch(f"{where} has other columns than a shard of generations")
            table = file.read(use_threads=False)
        return StoredUnit(ref.unit, _responses(table), engine)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptShard(f"{where}: {' '.join(str(error).split())}") from error


def _require_complete(unit: Unit, responses: Seq[Generation], identity: GenerationIdentity) -> None:
    expected = [(prompt, sample) for prompt in unit.sequences for sample in range(identity.decoding.n)]
    if [(r.prompt, r.sample) for r in responses] != expected:
        raise ValueError(f"unit {unit.id} has {len(responses)} responses, expected {len(expected)} in its own order")
    for response in responses:
        if len(response.response_ids) != len(response.logprobs):
            raise ValueError(
                f"prompt {response.prompt}, sample {response.sample}: {len(response.logprobs)} logprobs of "
                f"{len(response.response_ids)} tokens"
            )


def _ends(responses: Seq[Generation]) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Each list column's values end to end, and the lengths."""
    values, sizes = {}, {}
    for name, kind in _LISTS.items():
        parts = [getattr(r, name) for r in responses]
        dtype = kind.to_pandas_dtype()
        values[name] = np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)
        sizes[name] = np.array([len(part) for part in parts], np.int64)
    return values, sizes


def _engine(
    metadata: dict[bytes, bytes] | None, identity: GenerationIdentity, ref: ShardRef, where: str
) -> dict[str, Any]:
    try:
        described = json.loads((metadata or {})[b"stillroom"])
        stated = described["unit"], described["identity"]
        engine: dict[str, Any] = described["engine"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatMismatch(f"{where} is no shard of generations: its footer does not say so ({error!r})") from error
    if stated != (ref.unit, identity.id):
        raise CorruptShard(
            f"{where} is unit {stated[0]} of identity {stated[1]}, expected unit {ref.unit} of identity {identity.id}"
        )
    return engine


def _responses(table: pa.Table) -> list[Generation]:
    column = {name: table.column(name).combine_chunks() for name in table.column_names}
    pieces: dict[str, list[NDArray[Any]]] = {}
    for name in _LISTS:
        values, sizes = flat(column[name])
        pieces[name] = np.split(values, np.cumsum(sizes)[:-1]) if len(sizes) else []
    found = []
    for at, (prompt, sample, finish, text) in enumerate(
        zip(*(column[name].to_pylist() for name in ("prompt", "sample", "finish", "text")), strict=True)
    ):
        ids, logprobs = pieces["response_ids"][at], pieces["logprobs"][at]
        if finish not in FINISHES or len(ids) != len(logprobs):
            raise ValueError(
                f"row {at} is no response: finish {finish!r}, {len(logprobs)} logprobs of {len(ids)} tokens"
            )
        response = Generation(pieces["prompt_ids"][at], sample, ids, logprobs, finish, text)
        if response.prompt != prompt:
            raise ValueError(f"row {at} names prompt {prompt}, its ids are those of {response.prompt}")
        found.append(response)
    return found


def missing(error: StoreError, files: Files) -> StoreError:
    """A shard that the log names and that is gone."""
    return StoreError(f"{error}; the log names it: put back a copy of it, or {_again(files)}")


def _again(files: Files) -> str:
    return f"run `stillroom verify {files.uri} --repair` and then `stillroom generate`, which makes its unit again"
