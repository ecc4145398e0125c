"""Stores with something wrong in them, made as a faulty writer or a faulty disk would make it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.codecs.columns import flat, lists
from stillroom.storage.files import sha256_hex
from stillroom.storage.log import CommitLog
from stillroom.storage.records import Receipt, ShardRef
from stillroom.storage.schema import parquet_settings
from stillroom.storage.shard import shard_path, signal_codec
from stillroom.storage.store import Store, UnitStore

Change = Callable[[pa.Table], pa.Table]


def shards(store: Store) -> list[ShardRef]:
    """Committed shards by path."""
    return sorted(store.committed().values(), key=lambda ref: ref.path)


def flip(path: Path, at: int | None = None) -> None:
    """One bit of a file is another."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def values(name: str, change: Callable[[Any], Any]) -> Change:
    """The flat values of a list column through `change`, which gets a copy; lengths stay."""

    def apply(table: pa.Table) -> pa.Table:
        column = table.column(name).combine_chunks()
        found, lengths = flat(column)
        fresh = lists(np.asarray(change(found.copy())), lengths, column.type.value_type)
        return table.set_column(table.schema.get_field_index(name), table.schema.field(name), fresh)

    return apply


def tampered(store: Store, ref: ShardRef, change: Change) -> ShardRef:
    """Commit in the place of a shard what a faulty writer would have written: right digests, wrong content."""
    file = pq.ParquetFile(Path(store.uri, ref.path))
    metadata = json.loads(file.metadata.metadata[b"stillroom"])
    table = change(file.read())
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, **parquet_settings(signal_codec(store.files, store.identity))) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"stillroom": json.dumps(metadata, sort_keys=True)})
    data = memoryview(sink.getvalue())
    fresh = ShardRef(ref.unit, shard_path(ref.unit, sha256_hex(data)), sha256_hex(data), len(data))
    store.files.write(fresh.path, data)
    replace(store, ref, fresh, table.num_rows)
    return fresh


def replace(store: Store, old: ShardRef, new: ShardRef, sequences: int) -> None:
    """The log names `new`, of so many sequences, where it named `old`."""
    CommitLog.open(store.uri).remove([old])
    store.commit([Receipt(new, sequences, 0, 0, batches=1, seconds=0.0)])


def edit_entry(store: UnitStore, version: int, change: Callable[[str], str]) -> str:
    """Rewrite an entry of the log; returns its name."""
    name = f"_delta_log/{version:020d}.json"
    path = Path(store.uri, name)
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before, "nothing was changed: the test is void"
    return name
