"""One unit as one Parquet file: written whole, read by row group, verified both ways.

Enters: a unit's sequences with their `TopK` blocks. Leaves: a `ShardRef`; and back, sequence by sequence. Costs:
encoding about one pass over the kept logits; reading hashes the file once (about 1 GB/s) and then decodes single
row groups.

    shards/<unit>-<sha256>.parquet     the digest in the name is the file's own

    row group 0   rows while their positions sum to at most 2^18 / k
    row group 1   …
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.codecs.topk import TopKCodec, TopKColumns
from stillroom.storage.errors import CorruptShard, FormatMismatch, StoreError
from stillroom.storage.files import Files, sha256_hex
from stillroom.storage.identity import Identity
from stillroom.storage.records import BETAS, Sequence, ShardRef, TopK, Unit
from stillroom.storage.schema import (
    FORMAT_VERSION,
    KEPT_PER_GROUP,
    footer_metadata,
    parquet_settings,
    read_footer,
    shard_schema,
)

FOLDER = "shards"


@dataclass(frozen=True)
class StoredSequence:
    """A row: the sequence and its signal rows first_position … T − 1; no signal where only the text is served."""

    sequence: Sequence
    topk: TopK | None


def row_groups(rows: Seq[int], k: int) -> list[range]:
    """Which rows of a unit share a row group, from their position counts alone.

    A function of the plan, so that the order of training is known before anything is written.
    """
    limit = KEPT_PER_GROUP // k
    groups: list[range] = []
    start = held = 0
    for number, count in enumerate(rows):
        if number > start and held + count > limit:
            groups.append(range(start, number))
            start, held = number, 0
        held += count
    groups.append(range(start, len(rows)))
    return groups


def shard_path(unit: str, sha256: str) -> str:
    return f"{FOLDER}/{unit}-{sha256}.parquet"


def parse_shard_path(path: str) -> tuple[str, str]:
    """(unit, sha256) of a shard's path. Raises StoreError if it is not one."""
    unit, dash, sha256 = path.removeprefix(f"{FOLDER}/").removesuffix(".parquet").partition("-")
    hexadecimal = set(unit + sha256) <= set("0123456789abcdef")
    if not dash or not hexadecimal or len(unit) != 32 or len(sha256) != 64 or path != shard_path(unit, sha256):
        raise StoreError(f"{path!r} in the log is not {FOLDER}/<unit>-<sha256>.parquet")
    return unit, sha256


def write_shard(
    files: Files,
    identity: Identity,
    unit: Unit,
    sequences: Seq[Sequence],
    blocks: Seq[TopK],
    provenance: dict[str, Any],
) -> ShardRef:
    """Encode a unit and put it under its content's name. Nothing counts until it is committed.

    sequences, blocks: in the unit's order; block i has `sequences[i].rows` rows.
    provenance: JSON-able, and without times or hosts: equal work gives equal bytes.
    Raises ValueError if blocks break the contract, StoreFull, StoreError.
    """
    assert tuple(s.digest for s in sequences) == unit.sequences
    codec = TopKCodec(identity.signal, identity.vocabulary)
    schema = shard_schema(identity.signal.gap_step)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **parquet_settings()) as writer:
        for group in row_groups(unit.rows, identity.signal.k):
            part = slice(group.start, group.stop)
            writer.write_batch(_record_batch(codec, schema, sequences[part], blocks[part]), row_group_size=len(group))
        writer.add_key_value_metadata(footer_metadata(identity, unit.id, provenance))
    data = sink.getvalue()
    digest = sha256_hex(memoryview(data))
    path = shard_path(unit.id, digest)
    files.write(path, memoryview(data))
    return ShardRef(unit.id, path, digest, data.size)


def _record_batch(codec: TopKCodec, schema: pa.Schema, sequences: Seq[Sequence], blocks: Seq[TopK]) -> pa.RecordBatch:
    for sequence, block in zip(sequences, blocks, strict=True):
        if len(block) != sequence.rows:
            raise ValueError(f"sequence {sequence.digest} has {len(block)} signal rows, expected {sequence.rows}")
    columns = codec.encode(TopK.concatenate(blocks))
    tokens = np.array([len(s.input_ids) for s in sequences])
    rows = np.array([s.rows for s in sequences])
    ids = np.concatenate([s.input_ids for s in sequences]).astype(np.int32, copy=False)
    k, g = codec.signal.k, len(BETAS)
    flat = [
        (tokens, ids),
        (rows * k, columns.topk_ids),
        (rows * k, columns.topk_gap),
        (rows, columns.top_logit),
        (rows * g, columns.tail_code),
    ]
    lists = [
        pa.ListArray.from_arrays(_offsets(lengths), pa.array(values), type=field.type)
        for (lengths, values), field in zip(flat, list(schema)[2:], strict=True)
    ]
    digests = pa.array([s.digest for s in sequences])
    contexts = pa.array([s.context for s in sequences], pa.int32())
    return pa.record_batch([digests, contexts, *lists], schema=schema)


def _offsets(lengths: np.ndarray[Any, Any]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


class ShardReader:
    """A verified shard, decoded by row group.

    Opening checks the file against its digest, so every byte, the footer's too, is the one committed; page
    checksums are checked again as pages are read, since the file is mapped and may change under us.
    Raises CorruptShard naming the file, FormatMismatch, StoreError.
    """

    def __init__(self, files: Files, ref: ShardRef, identity: Identity) -> None:
        self.where = f"{files.uri}/{ref.path}"
        self._codec = TopKCodec(identity.signal, identity.vocabulary)
        source = files.open(ref.path)
        found = sha256_hex(memoryview(source.read_buffer()))
        if found != ref.sha256:
            raise CorruptShard(
                f"{self.where} has sha256 {found[:16]}…, committed was {ref.sha256[:16]}…: the file was damaged or "
                "replaced; put back a copy of it (its name holds its digest), or teach into another store.path"
            )
        source.seek(0)
        try:
            self._file = pq.ParquetFile(source, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise CorruptShard(f"{self.where} is no Parquet file: {_one_line(error)}") from error
        self.footer = read_footer(self._file.metadata.metadata, self.where)
        stated = self.footer.get("unit"), self.footer.get("identity")
        if stated != (ref.unit, identity.id):
            raise CorruptShard(
                f"{self.where} is unit {stated[0]} of identity {stated[1]}, "
                f"expected unit {ref.unit} of identity {identity.id}"
            )
        if not self._file.schema_arrow.equals(shard_schema(identity.signal.gap_step)):
            found = ", ".join(f"{field.name} {field.type}" for field in self._file.schema_arrow)
            raise FormatMismatch(f"{self.where} has other columns than a shard of format {FORMAT_VERSION}: {found}")

    @property
    def groups(self) -> int:
        return int(self._file.num_row_groups)

    def read_group(self, group: int) -> list[StoredSequence]:
        """The sequences of one row group; their arrays are views of its columns."""
        try:
            table = self._file.read_row_group(group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise CorruptShard(f"{self.where}, row group {group}: {_one_line(error)}") from error
        column = {name: table.column(name).combine_chunks() for name in table.column_names}
        contexts = column["context"].to_numpy()
        ids, tokens = _flat(column["input_ids"])
        topk_ids, counts = _flat(column["topk_ids"])
        rows = tokens - np.maximum(contexts - 1, 0)
        parts = TopKColumns(
            topk_ids,
            _flat(column["topk_gap"])[0],
            _flat(column["top_logit"])[0],
            _flat(column["tail_code"])[0],
        )
        k, total = self._codec.signal.k, int(rows.sum())
        sizes = (len(parts.topk_ids), len(parts.topk_gap), len(parts.top_logit), len(parts.tail_code))
        if sizes != (total * k, total * k, total, total * len(BETAS)) or not np.array_equal(counts, rows * k):
            raise CorruptShard(
                f"{self.where}, row group {group}: columns of {sizes} values for {total} positions, k={k}"
            )
        block = self._codec.decode(parts)
        at = np.concatenate([[0], np.cumsum(tokens)]), np.concatenate([[0], np.cumsum(rows)])
        return [
            StoredSequence(
                Sequence(ids[at[0][i] : at[0][i + 1]], int(contexts[i])),
                block[int(at[1][i]) : int(at[1][i + 1])],
            )
            for i in range(len(tokens))
        ]

    def digests(self) -> list[str]:
        """The sequences' digests as the file states them, in row order."""
        return [str(d) for d in self._file.read(columns=["sequence"], use_threads=False).column(0).to_pylist()]

    def __iter__(self) -> Iterator[StoredSequence]:
        for group in range(self.groups):
            yield from self.read_group(group)


def _flat(column: pa.ListArray) -> tuple[Any, Any]:
    """(values, lengths) of a list column, as numpy views."""
    offsets = column.offsets.to_numpy()
    return column.values.to_numpy()[offsets[0] : offsets[-1]], np.diff(offsets)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
