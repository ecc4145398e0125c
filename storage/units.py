"""Planned units as columns, in memory and as a table: a million of them in 170 MB, and a `Unit` only where one is asked
for.

Enters: units, or a table of theirs from disk. Leaves: the table; and back, `Units`, each id checked against its
sequences. Costs: 2 s a million units of one sequence each; half of it is one hash a unit.
"""

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import pairwise
from operator import eq
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillroom.storage.errors import CorruptShard
from stillroom.storage.pages import check_flat
from stillroom.storage.records import Int32, Unit

Digests = NDArray[np.bytes_]

SCHEMA = pa.schema([("unit", pa.string()), ("sequence", pa.string()), ("tokens", pa.int32()), ("context", pa.int32())])

_UNIT_TAG, _PLAN_TAG = b"stillroom.unit.1", b"stillroom.plan.1"


class Units(Seq[Unit]):
    """Units in order. Equal to any sequence of the same units.

    ids: S32 [U]. starts: int64 [U + 1], where each unit's sequences begin. sequences: S32 [N], digests.
    tokens, contexts: int32 [N].
    """

    def __init__(
        self, ids: Digests, starts: NDArray[np.int64], sequences: Digests, tokens: Int32, contexts: Int32
    ) -> None:
        self.ids, self.starts, self.sequences, self.tokens, self.contexts = ids, starts, sequences, tokens, contexts

    @staticmethod
    def concatenate(parts: Seq["Units"]) -> "Units":
        shift = np.cumsum([0, *(len(p.sequences) for p in parts)], dtype=np.int64)
        digests, numbers = np.zeros(0, "S32"), np.zeros(0, np.int32)
        return Units(
            np.concatenate([digests, *(p.ids for p in parts)]),
            np.concatenate([*(p.starts[:-1] + at for p, at in zip(parts, shift, strict=False)), shift[-1:]]),
            np.concatenate([digests, *(p.sequences for p in parts)]),
            np.concatenate([numbers, *(p.tokens for p in parts)]),
            np.concatenate([numbers, *(p.contexts for p in parts)]),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, at: int) -> Unit: ...
    @overload
    def __getitem__(self, at: slice) -> list[Unit]: ...
    def __getitem__(self, at: int | slice) -> Unit | list[Unit]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        part = slice(int(self.starts[at]), int(self.starts[at + 1]))
        unit = Unit(
            tuple(self.sequences[part].astype(str).tolist()),
            tuple(self.tokens[part].tolist()),
            tuple(self.contexts[part].tolist()),
        )
        unit.__dict__["id"] = self.ids[at].decode()  # hashed when the table was read: the cached property's place
        return unit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seq) and len(self) == len(other) and all(map(eq, self, other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Units({list(self)!r})"


def units_table(units: Iterable[Unit]) -> pa.Table:
    """One row per sequence, in order."""
    units = list(units)
    ids = [u.id for u in units for _ in u.sequences]
    return pa.table(
        [
            pa.array(ids, pa.string()),
            pa.array([s for u in units for s in u.sequences], pa.string()),
            pa.array([t for u in units for t in u.tokens], pa.int32()),
            pa.array([c for u in units for c in u.contexts], pa.int32()),
        ],
        schema=SCHEMA,
    )


def read_units(data: bytes, where: str) -> tuple[Units, dict[bytes, bytes]]:
    """(units, metadata) of a Parquet file of `units_table`.

    Raises CorruptShard, or ValueError, OSError or ArrowException where it is none or claims more than it holds.
    """
    # Not read_table: with it 10 of 480 runs of `stillroom inspect` ended with "terminate called" (pyarrow 26; why
    # is not known), without it 0 of 240.
    check_flat(memoryview(data), bytes_a_row=40, least_a_row=8)
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        table = file.read(use_threads=False) if file.metadata.num_rows else file.schema_arrow.empty_table()
        return units_of_table(table, where), file.metadata.metadata or {}


def units_of_table(table: pa.Table, where: str) -> Units:
    """The units back; rows of one unit are adjacent.

    Raises ValueError if it has other columns, CorruptShard if a value is missing or no digest, or if a unit's id is not
    its sequences' digest.
    """
    if not table.schema.remove_metadata().equals(SCHEMA):
        columns = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        raise ValueError(f"it has columns {columns}; expected {', '.join(SCHEMA.names)}")
    if any(table[name].null_count for name in SCHEMA.names):
        raise CorruptShard(f"{where} has rows without a value; it was damaged")
    ids, sequences = (_digests(table[name], where) for name in ("unit", "sequence"))
    tokens, contexts = (table[name].to_numpy() for name in ("tokens", "context"))
    if not ((tokens >= 1) & (contexts >= 0) & (contexts <= tokens)).all():
        raise CorruptShard(f"{where} has a sequence without tokens or of more context than tokens; it was damaged")
    starts = np.flatnonzero(np.concatenate([np.ones(min(len(ids), 1), bool), ids[1:] != ids[:-1]]))
    units = Units(ids[starts], np.append(starts, len(ids)), sequences, tokens, contexts)
    wrong = np.flatnonzero(_unit_ids(units) != units.ids)
    if len(wrong):
        named = units.ids[wrong[0]].decode(errors="replace")
        raise CorruptShard(f"{where}: unit {named} does not match its sequences; the file was damaged")
    return units


def plan_digest(units: Seq[Unit]) -> str:
    """32 hex digits over the units' ids, in order."""
    ids = units.ids if isinstance(units, Units) else np.array([u.id for u in units], "S32")
    digest = _tagged(_PLAN_TAG)
    digest.update(_framed(ids))
    return str(digest.hexdigest())


def places(digests: Digests, of: Digests) -> NDArray[np.int64]:
    """Where each of `digests`, S32 [N], stands first in `of`: int64 [N], −1 where it does not. By hash, 0.3 s a
    million."""
    found = pc.index_in(_arrow(digests), value_set=_arrow(of))
    return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def first_places(digests: Digests) -> NDArray[np.int64]:
    """Where each distinct one of `digests`, S32 [N], stands first: int64, rising."""
    numbers = _arrow(digests).dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return np.flatnonzero(np.diff(np.maximum.accumulate(numbers), prepend=-1))


def _arrow(digests: Digests) -> pa.Array:
    data = np.ascontiguousarray(digests)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(data), [None, pa.py_buffer(data)])


def _digests(column: pa.ChunkedArray, where: str) -> Digests:
    """S32 of a column of strings. Raises CorruptShard where one has not 32 characters."""
    parts = [np.zeros(0, "S32")]
    for chunk in column.chunks:
        if not len(chunk):
            continue
        offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        if not (np.diff(offsets) == 32).all():
            raise CorruptShard(f"{where} has a digest that is not of 32 characters; it was damaged")
        parts.append(np.frombuffer(chunk.buffers()[2], np.uint8)[offsets[0] : offsets[-1]].view("S32"))
    return np.concatenate(parts)


def _unit_ids(units: Units) -> Digests:
    """`Unit.id` of each, from frames laid end to end."""
    head, framed, found = _tagged(_UNIT_TAG), memoryview(_framed(units.sequences)), []
    for start, stop in pairwise((40 * units.starts).tolist()):
        digest = head.copy()
        digest.update(framed[start:stop])
        found.append(digest.hexdigest())
    return np.array(found, "S32")


def _tagged(tag: bytes) -> Any:
    """`records.digest128` begun: its first part is in."""
    return hashlib.blake2b(len(tag).to_bytes(8, "little") + tag, digest_size=16)


def _framed(digests: Digests) -> bytes:
    """Each digest after its length, as `digest128` takes its parts."""
    frames = np.empty((len(digests), 40), np.uint8)
    frames[:, :8] = np.frombuffer((32).to_bytes(8, "little"), np.uint8)
    frames[:, 8:] = np.ascontiguousarray(digests).view(np.uint8).reshape(len(digests), 32)
    return frames.tobytes()
