"""Sequences out of shards and into another, as columns: what stays the same is carried over, code by code.

Enters: a unit of a source, the sequences wanted of it. Leaves: `Row`s; from them a shard of the new signal. Costs: only
a top-k part that changes, or is packed, is decoded and encoded again.

Why not all of it through decoded rows: an int8 hidden state that is read and written again gets another scale (it is
rounded up to bfloat16, so the largest code may be 126, and then the next scale down fits as well) and its error grows
with every copy. Columns of lists have one value per sequence, so a sequence can be lifted out as it is; a packed column
has all of a row group in one value, and cannot be cut.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.codecs.columns import flat
from stillroom.storage.codecs.signal import SignalCodec, rows_of
from stillroom.storage.errors import CorruptShard
from stillroom.storage.files import sha256_hex
from stillroom.storage.identity import Identity
from stillroom.storage.records import ShardRef, Signal, SignalSpec, TopK, Unit
from stillroom.storage.schema import footer_metadata, parquet_settings, shard_schema
from stillroom.storage.shard import row_groups, shard_path, signal_codec
from stillroom.storage.store import Store
from stillroom.storage.surgery.changes import cut
from stillroom.storage.surgery.plan import Source


@dataclass(frozen=True)
class Row:
    """A sequence on its way.

    columns: one value each, of the columns that are carried over. before, after: its top-k rows as they were decoded,
    and cut to what is to be written; None where they are carried over or left out.
    """

    columns: dict[str, pa.Array]
    before: TopK | None
    after: TopK | None


class SourceShard:
    """A committed shard of a source, verified against its digest when opened.

    Raises CorruptShard, FormatMismatch, StoreError as `ShardReader` does.
    """

    def __init__(self, source: Source, unit: str) -> None:
        self.ref = source.ref(unit)
        self._source, self._unit = source, source.units[unit]
        self._where = f"{source.uri}/{self.ref.path}"
        self.provenance: Any = source.store.reader(self.ref).footer["provenance"]
        # Whole, as all of it is wanted: a view of a mapped file, one request to an object store.
        data = source.store.files.open(self.ref.path).read_buffer()
        self._file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)

    def rows(self, digests: set[str], target: Identity) -> Iterator[tuple[str, Row]]:
        """The sequences of these digests, row group by row group, ready to be written under `target`."""
        signal, unit = self._source.identity.signal, self._unit
        carried = shard_schema(_carried_codec(self._source.store, target)).names
        for number, group in enumerate(row_groups(unit.rows, signal)):
            wanted = [row - group.start for row in group if unit.sequences[row] in digests]
            if not wanted:
                continue
            columns = self._columns(number, len(group))
            tops = self._cut(columns, wanted, number, target) if topk_rewritten(signal, target.signal) else None
            if len(wanted) < len(group):
                # Copied out: else one sequence of each of a hundred groups would keep a hundred groups in memory.
                columns = {name: columns[name].take(pa.array(wanted)) for name in carried}
            found = columns["sequence"].to_pylist()
            expected = [unit.sequences[group.start + row] for row in wanted]
            if found != expected:
                raise self._corrupt(number, f"holds sequences {found[:1]} …, its plan says {expected[:1]} …")
            for i, digest in enumerate(expected):
                before, after = tops[i] if tops else (None, None)
                yield digest, Row({name: columns[name].slice(i, 1) for name in carried}, before, after)

    def _columns(self, group: int, expected: int) -> dict[str, pa.Array]:
        try:
            table = self._file.read_row_group(group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._corrupt(group, " ".join(str(error).split())) from error
        if table.num_rows != expected:
            raise self._corrupt(group, f"holds {table.num_rows} sequences, expected {expected}")
        return {name: table.column(name).combine_chunks() for name in table.column_names}

    def _cut(
        self, columns: dict[str, pa.Array], wanted: list[int], group: int, target: Identity
    ) -> list[tuple[TopK, TopK]]:
        """Top-k rows of each sequence that is wanted, before and after."""
        old, new = self._source.identity.signal.topk, target.signal.topk
        assert old is not None
        assert new is not None
        rows = rows_of(flat(columns["input_ids"])[1], columns["context"].to_numpy())
        try:
            before = SignalCodec(SignalSpec(topk=old), target.vocabulary).decode(columns, rows).topk
        except ValueError as error:
            raise self._corrupt(group, str(error)) from error
        assert before is not None
        if len(wanted) < len(rows):
            before, rows = before[np.flatnonzero(np.repeat(np.isin(np.arange(len(rows)), wanted), rows))], rows[wanted]
        after = cut(before, old, new, target.vocabulary)
        ends = np.cumsum(rows)
        parts = [slice(int(end - count), int(end)) for end, count in zip(ends, rows, strict=True)]
        return [(before[part], after[part]) for part in parts]

    def _corrupt(self, group: int, problem: str) -> CorruptShard:
        uri = self._source.uri
        return CorruptShard(f"{self._where}, row group {group} {problem}; run `stillroom verify {uri}`")


def topk_rewritten(source: SignalSpec, target: SignalSpec) -> bool:
    """Whether top-k is decoded and encoded; the other parts are carried over, or left out."""
    return target.topk is not None and (target.topk != source.topk or target.topk.layout == "packed")


def _carried_codec(source: Store, target: Identity) -> SignalCodec:
    """Of the parts that are carried over as they are."""
    whole = signal_codec(source.files, source.identity)
    spec, old = target.signal, source.identity.signal
    topk = None if topk_rewritten(old, spec) else spec.topk
    return SignalCodec(replace(spec, topk=topk), whole.vocabulary, whole.calibration)


def write_rows(store: Store, unit: Unit, rows: Seq[Row], provenance: dict[str, Any]) -> ShardRef:
    """As `write_shard`, of rows in the unit's order.

    Raises ValueError if a top-k row breaks the contract of its codec, StoreFull, StoreError.
    """
    identity = store.identity
    codec = signal_codec(store.files, identity)
    schema = shard_schema(codec)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **parquet_settings(codec)) as writer:
        for group in row_groups(unit.rows, identity.signal):
            batch = _record_batch(schema, identity, rows[group.start : group.stop])
            writer.write_batch(batch, row_group_size=len(group))
        writer.add_key_value_metadata(footer_metadata(identity, unit.id, provenance))
    data = memoryview(sink.getvalue())
    digest = sha256_hex(data)
    path = shard_path(unit.id, digest)
    store.files.write(path, data)
    return ShardRef(unit.id, path, digest, data.nbytes)


def _record_batch(schema: pa.Schema, identity: Identity, rows: Seq[Row]) -> pa.RecordBatch:
    columns = {name: pa.concat_arrays([row.columns[name] for row in rows]) for name in rows[0].columns}
    if rows[0].after is not None:
        codec = SignalCodec(SignalSpec(topk=identity.signal.topk), identity.vocabulary)
        tops = [row.after for row in rows if row.after is not None]
        counts = np.array([len(top) for top in tops], np.int64)
        arrays = codec.encode(Signal(TopK.concatenate(tops)), counts)
        columns |= {field.name: array for field, array in zip(codec.fields(), arrays, strict=True)}
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)
