"""One unit as one Parquet file: written whole, read by row group, verified both ways.

Enters: a unit's sequences with their `TopK` blocks. Leaves: a `ShardRef`; and back, sequence by sequence. Costs:
encoding about one pass over the kept logits; reading hashes the file once (about 1 GB/s) and then decodes single
row groups.

    shards/<unit>-<sha256>.parquet     the digest in the name is the file's own

    row group 0   rows while their positions sum to at most what `positions_per_group` says
    row group 1   …
"""

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillroom.storage.calibration import Calibration, load_calibration
from stillroom.storage.codecs.columns import flat, lists
from stillroom.storage.codecs.signal import SignalCodec, positions_per_group, rows_of
from stillroom.storage.errors import CorruptShard, FormatMismatch, StoreError
from stillroom.storage.files import Files, sha256_hex
from stillroom.storage.identity import Identity
from stillroom.storage.pages import MOST_BYTES, check_shard
from stillroom.storage.records import Sequence, ShardRef, Signal, SignalSpec, Unit
from stillroom.storage.schema import footer_metadata, parquet_settings, read_footer, shard_schema, value_bytes

FOLDER = "shards"
_MISSING = (
    "the log names this shard: put back a copy of it, or drop it with `stillroom verify {uri} --repair` and run "
    "`stillroom teach` again"
)

_calibrations: dict[str, Calibration] = {}


@dataclass(frozen=True)
class StoredSequence:
    """A row: the sequence and its signal rows first_position … T − 1; no signal where only the text is served."""

    sequence: Sequence
    signal: Signal | None


def row_groups(rows: Seq[int], spec: SignalSpec) -> list[range]:
    """Which rows of a unit share a row group, from their position counts alone.

    A function of the plan, so that the order of training is known before anything is written.
    """
    limit = positions_per_group(spec)
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


def signal_codec(files: Files, identity: Identity) -> SignalCodec:
    """The codec of a store's signal, with its calibration vector where it has one.

    Raises StoreError, CorruptShard if the vector cannot be read, FormatMismatch if the identity states a signal that
    no codec takes.
    """
    hidden = identity.signal.hidden
    calibration = None
    if hidden is not None and hidden.calibration is not None:
        # By content, so that thousands of shards read it once.
        calibration = _calibrations.get(hidden.calibration) or load_calibration(files, hidden.calibration)
        _calibrations[hidden.calibration] = calibration
    try:
        return SignalCodec(identity.signal, identity.vocabulary, calibration)
    except ValueError as error:
        raise FormatMismatch(f"{files.uri}: the identity states a signal that cannot be: {error}") from error


def write_shard(
    files: Files,
    identity: Identity,
    unit: Unit,
    sequences: Seq[Sequence],
    blocks: Seq[Signal],
    provenance: dict[str, Any],
) -> ShardRef:
    """Encode a unit and put it under its content's name. Nothing counts until it is committed.

    sequences, blocks: in the unit's order; block i has `sequences[i].rows` rows.
    provenance: JSON-able, and without times or hosts: equal work gives equal bytes.
    Raises ValueError if blocks break the contract, StoreFull, StoreError.
    """
    assert tuple(s.digest for s in sequences) == unit.sequences
    codec = signal_codec(files, identity)
    schema = shard_schema(codec)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **parquet_settings(codec)) as writer:
        for group in row_groups(unit.rows, identity.signal):
            part = slice(group.start, group.stop)
            batch = _record_batch(codec, schema, sequences[part], blocks[part])
            if batch.nbytes > MOST_BYTES // 2:  # a reader refuses twice that
                raise ValueError(
                    f"unit {unit.id}: a row group of {batch.nbytes:,} bytes, at most {MOST_BYTES // 2:,} are read "
                    "back; lower corpus.window"
                )
            writer.write_batch(batch, row_group_size=len(group))
        writer.add_key_value_metadata(footer_metadata(identity, unit.id, provenance))
    data = sink.getvalue()
    digest = sha256_hex(memoryview(data))
    path = shard_path(unit.id, digest)
    files.write(path, memoryview(data))
    return ShardRef(unit.id, path, digest, data.size)


def _record_batch(
    codec: SignalCodec, schema: pa.Schema, sequences: Seq[Sequence], blocks: Seq[Signal]
) -> pa.RecordBatch:
    for sequence, block in zip(sequences, blocks, strict=True):
        if len(block) != sequence.rows:
            raise ValueError(f"sequence {sequence.digest} has {len(block)} signal rows, expected {sequence.rows}")
        if block.attention is not None and block.attention.widths[0] != sequence.first_position + 1:
            raise ValueError(
                f"sequence {sequence.digest} has attention from position {block.attention.widths[0] - 1} on, expected "
                f"{sequence.first_position}"
            )
    rows = np.array([s.rows for s in sequences], np.int64)
    tokens = np.array([len(s.input_ids) for s in sequences])
    ids = np.concatenate([s.input_ids for s in sequences]).astype(np.int32, copy=False)
    columns = [
        pa.array([s.digest for s in sequences]),
        pa.array([s.context for s in sequences], pa.int32()),
        lists(ids, tokens, pa.int32()),
        *codec.encode(Signal.concatenate(blocks), rows),
    ]
    return pa.record_batch(columns, schema=schema)


class ShardReader:
    """A verified shard, decoded by row group.

    Opening checks the file against its digest, so every byte, the footer's too, is the one committed; page
    checksums are checked again as pages are read, since the file is mapped and may change under us.

    parts: of the signal that are read and decoded; None: all.
    Raises CorruptShard naming the file, FormatMismatch, StoreError.
    """

    def __init__(
        self, files: Files, ref: ShardRef, identity: Identity, *, parts: Collection[str] | None = None
    ) -> None:
        self.where = f"{files.uri}/{ref.path}"
        whole = signal_codec(files, identity)
        self._codec = whole if parts is None else whole.only(parts)
        self._columns = ["context", "input_ids", *(field.name for field in self._codec.fields())]
        try:
            source = files.open(ref.path)
        except StoreError as error:
            if files.exists(ref.path):
                raise
            raise StoreError(f"{error}; {_MISSING.format(uri=files.uri)}") from error
        data = memoryview(source.read_buffer()).cast("B")  # Arrow counts bytes as signed
        found = sha256_hex(data)
        if found != ref.sha256:
            raise CorruptShard(
                f"{self.where} has sha256 {found[:16]}…, committed was {ref.sha256[:16]}…: the file was damaged or "
                "replaced; put back a copy of it (its name holds its digest), or run `stillroom verify "
                f"{files.uri} --repair`, then `stillroom teach` on the recipe; a student that began on this shard "
                "trains anew, from an empty folder"
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
        schema = shard_schema(whole)
        if not self._file.schema_arrow.equals(schema):
            found = ", ".join(f"{field.name} {field.type}" for field in self._file.schema_arrow)
            raise FormatMismatch(
                f"{self.where} has other columns than a shard of format {identity.format} and {whole.spec.in_words()}: "
                f"{found}"
            )
        try:  # a shard of someone else's making has a right digest too
            check_shard(data, value_bytes(schema))
        except ValueError as error:
            raise CorruptShard(f"{self.where}: {error}") from error

    @property
    def groups(self) -> int:
        return int(self._file.num_row_groups)

    def read_group(self, group: int) -> list[StoredSequence]:
        """The sequences of one row group; their arrays are views of its columns."""
        try:
            table = self._file.read_row_group(group, columns=self._columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise CorruptShard(f"{self.where}, row group {group}: {_one_line(error)}") from error
        column = {name: table.column(name).combine_chunks() for name in table.column_names}
        contexts = column["context"].to_numpy()
        ids, tokens = flat(column["input_ids"])
        rows = rows_of(tokens, contexts)
        try:
            if (rows < 1).any() or (contexts < 0).any():
                raise ValueError("a sequence has no signal rows")
            block = self._codec.decode(column, rows)
            _require_first(block, rows, contexts)
        except ValueError as error:
            raise CorruptShard(f"{self.where}, row group {group}: {error}") from error
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


def _require_first(block: Signal, rows: NDArray[np.int64], contexts: NDArray[np.int32]) -> None:
    """Raises ValueError where attention maps begin at other positions than their sequences' signal does."""
    if block.attention is None:
        return
    found = block.attention.widths[np.cumsum(rows) - rows] - 1
    wrong = found != np.maximum(contexts - 1, 0)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(f"attention of sequence {at} begins at position {found[at]}, its context is {contexts[at]}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
