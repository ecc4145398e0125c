"""The fidelity sample: at most 256 positions of a store with the teacher's full logits, beside the shards.

Enters: full logits of the positions that storage/fidelity/sample.py chose. Leaves: side files, and back, eight
positions at a time. Costs: 4·V bytes a position, twice that where it was scored alone as well, less a fifth on disk
(SmolLM2-135M, V = 49,152: 157 kB each; 256 positions are written in 1.5 s and read in 0.3 s). Reading hashes a file
once.

    _stillroom/truth/<unit>-<sha256>.parquet     the digest in the name is the file's own

    sequence  string          its digest
    position  int32           t in the sequence, first_position … T − 1
    logits    list<float32>   [V], raw logits in nats as the model returns them, in the batch that made the shard
    alone     list<float32>   [V], the same position in a batch of one: the noise band; or empty

A file counts while its unit is committed; of two files of one unit the smaller name does. Without them a store is
whole, but nobody can say how faithful it is. Rows are sorted by sequence and position, eight to a row group at most.
"""

import json
import re
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillroom.storage.codecs.columns import element, flat, flat_list, lists
from stillroom.storage.errors import CorruptShard
from stillroom.storage.fidelity.sample import LIMIT as LIMIT  # part of what this module offers
from stillroom.storage.fidelity.sample import PER_SEQUENCE as PER_SEQUENCE
from stillroom.storage.fidelity.sample import SEQUENCES as SEQUENCES
from stillroom.storage.fidelity.sample import choose as choose
from stillroom.storage.files import Files, sha256_hex
from stillroom.storage.identity import Identity
from stillroom.storage.records import Float32, Int32, Unit

FOLDER = "_stillroom/truth"
VERSION = 1

_NAME = re.compile(FOLDER + r"/([0-9a-f]{32})-([0-9a-f]{64})\.parquet")
_SCHEMA = pa.schema(
    [
        pa.field("sequence", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        flat_list("logits", pa.float32()),
        flat_list("alone", pa.float32()),
    ]
)

#: What a column of a row group may take decoded beyond its values: page headers, levels.
_SLACK_BYTES = 2**16


@dataclass(frozen=True, eq=False)
class Truth:
    """P positions with the teacher's full logits.

    sequences: digest of each. positions: int32 [P], absolute. logits: float32 [P, V].
    alone: float32 [A, V], a second scoring in a batch of one of the positions at `alone_rows`, int64 [A].
    """

    sequences: tuple[str, ...]
    positions: Int32
    logits: Float32
    alone: Float32
    alone_rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Sequence and position of each, as `storage.fidelity` wants them."""
        return list(zip(self.sequences, self.positions.tolist(), strict=True))

    @property
    def twice(self) -> tuple[Float32, Float32, list[tuple[str, int]]]:
        """Those scored twice, for `fidelity.noise`: float32 [A, V] in a batch and alone, and their keys."""
        keys = self.keys
        return self.logits[self.alone_rows], self.alone, [keys[row] for row in self.alone_rows]

    @staticmethod
    def concatenate(blocks: Seq["Truth"]) -> "Truth":
        starts = np.cumsum([0, *(len(b) for b in blocks)])
        return Truth(
            tuple(s for b in blocks for s in b.sequences),
            np.concatenate([b.positions for b in blocks]),
            np.concatenate([b.logits for b in blocks]),
            np.concatenate([b.alone for b in blocks]),
            np.concatenate([b.alone_rows + start for b, start in zip(blocks, starts, strict=False)]),
        )


def write_truth(files: Files, unit: Unit, truth: Truth, identity: Identity) -> str:
    """Keep a unit's part of the sample; returns the file's name. It counts once the unit is committed.

    Raises ValueError for what would not be read back, StoreFull, StoreError.
    """
    problem = _problem(truth, unit, identity.vocabulary)
    if problem or not 1 <= len(truth) <= LIMIT:
        raise ValueError(f"truth of unit {unit.id}: {problem or f'{len(truth)} positions, expected 1 … {LIMIT}'}")
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, _SCHEMA, **_settings()) as writer:
        order = sorted(range(len(truth)), key=truth.keys.__getitem__)
        for start in range(0, len(order), PER_SEQUENCE):
            writer.write_batch(_batch(truth, np.array(order[start : start + PER_SEQUENCE])))
        stated = {"truth": VERSION, "unit": unit.id, "identity": identity.id, "vocabulary": identity.vocabulary}
        writer.add_key_value_metadata({"stillroom": json.dumps(stated, sort_keys=True)})
    data = memoryview(sink.getvalue())
    name = f"{FOLDER}/{unit.id}-{sha256_hex(data)}.parquet"
    files.write(name, data)
    return name


def _settings() -> dict[str, object]:
    return {
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": False,
        "column_encoding": {element(name): "BYTE_STREAM_SPLIT" for name in ("logits", "alone")},
        "write_statistics": False,
        "write_page_checksum": True,
        "store_schema": False,
    }


def _batch(truth: Truth, rows: NDArray[np.int64]) -> pa.RecordBatch:
    vocabulary = truth.logits.shape[1]
    second = np.full(len(truth), -1, np.int64)
    second[truth.alone_rows] = np.arange(len(truth.alone_rows))
    second = second[rows]
    columns = [
        pa.array([truth.sequences[row] for row in rows], pa.string()),
        pa.array(truth.positions[rows], pa.int32()),
        lists(truth.logits[rows].ravel(), np.full(len(rows), vocabulary), pa.float32()),
        lists(truth.alone[second[second >= 0]].ravel(), np.where(second >= 0, vocabulary, 0), pa.float32()),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def read_truth(files: Files, units: Iterable[Unit], identity: Identity) -> Truth | None:
    """All blocks of `truth_blocks` at once, 300 MB and more at V = 152k; None where there is none."""
    blocks = list(truth_blocks(files, units, identity))
    return Truth.concatenate(blocks) if blocks else None


def truth_blocks(files: Files, units: Iterable[Unit], identity: Identity) -> Iterator[Truth]:
    """The sample of the committed `units`, by file name, at most eight positions at a time and 256 in all.

    Raises CorruptShard naming the file that is damaged, of another store, or not what its unit allows; StoreError.
    """
    left = LIMIT
    for name, unit in _counting(files, units):
        reader = _Reader(files, name, unit, identity)
        for group in range(reader.groups):
            block = reader.read(group)
            if len(block) > left:
                return
            left -= len(block)
            yield block


def read_positions(files: Files, units: Iterable[Unit], identity: Identity) -> dict[str, tuple[int, ...]]:
    """Positions held by sequence digest, without their logits. Raises as `truth_blocks`."""
    found: dict[str, tuple[int, ...]] = {}
    for name, unit in _counting(files, units):
        for sequence, position in _Reader(files, name, unit, identity).keys:
            found[sequence] = (*found.get(sequence, ()), position)
    return found


def truth_bytes(files: Files) -> int:
    """Bytes of all truth files, those of units not yet committed too."""
    return sum(int(files.open(name).size()) for name in files.list(FOLDER))


def _counting(files: Files, units: Iterable[Unit]) -> list[tuple[str, Unit]]:
    """Names that count, with their units. `list` is sorted, so the first name of a unit is its smallest."""
    names: dict[str, str] = {}
    for name in files.list(FOLDER):
        match = _NAME.fullmatch(name)
        if match:
            names.setdefault(match[1], name)
    if not names:
        return []
    return sorted({names[unit.id]: unit for unit in units if unit.id in names}.items())


class _Reader:
    """One file, verified when opened and again as rows are read."""

    def __init__(self, files: Files, name: str, unit: Unit, identity: Identity) -> None:
        self._where = f"{files.uri}/{name}"
        self._unit, self._vocabulary = unit, identity.vocabulary
        match = _NAME.fullmatch(name)
        assert match is not None
        source = files.open(name)
        limit = 2 * LIMIT * 4 * self._vocabulary + LIMIT * _SLACK_BYTES
        if source.size() > limit:
            raise self._corrupt(f"has {source.size():,} bytes, expected at most {limit:,}")
        try:
            data = source.read_buffer()
            digest = sha256_hex(memoryview(data))
            if digest != match[2]:
                raise self._corrupt(f"has sha256 {digest[:16]}…, its name says {match[2][:16]}…")
            self._file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            stated = json.loads((self._file.metadata.metadata or {}).get(b"stillroom", b"null"))
        except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
            raise self._corrupt(f"cannot be read: {error}") from error
        expected = {"truth": VERSION, "unit": unit.id, "identity": identity.id, "vocabulary": identity.vocabulary}
        if stated != expected:
            raise self._corrupt(f"says it is {str(stated)[:200]}, expected {expected}")
        self._check_sizes()
        self.keys = self._read_keys()

    @property
    def groups(self) -> int:
        return int(self._file.num_row_groups)

    def read(self, group: int) -> Truth:
        """Views of the row group's columns."""
        try:
            table = self._file.read_row_group(group, use_threads=False)
            sequences = tuple(str(s) for s in table["sequence"].to_pylist())
            positions = table["position"].combine_chunks().to_numpy()
            logits, lengths = flat(table["logits"].combine_chunks())
            alone, alone_lengths = flat(table["alone"].combine_chunks())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._corrupt(f"row group {group}: {error}") from error
        vocabulary = self._vocabulary
        if not (lengths == vocabulary).all() or not np.isin(alone_lengths, (0, vocabulary)).all():
            sizes = sorted({*lengths.tolist(), *alone_lengths.tolist()})
            raise self._corrupt(f"row group {group}: lists of {sizes} logits, expected {vocabulary} (alone: or none)")
        truth = Truth(
            sequences,
            positions,
            logits.reshape(-1, vocabulary),
            alone.reshape(-1, vocabulary),
            np.flatnonzero(alone_lengths),
        )
        problem = _problem(truth, self._unit, vocabulary)
        if problem:
            raise self._corrupt(f"row group {group}: {problem}")
        return truth

    def _read_keys(self) -> list[tuple[str, int]]:
        """Sequence and position of every row."""
        try:
            table = self._file.read(columns=["sequence", "position"], use_threads=False)
            keys = list(zip(table["sequence"].to_pylist(), table["position"].to_pylist(), strict=True))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._corrupt(f"cannot be read: {error}") from error
        problem = _key_problem(keys, self._unit)
        if problem:
            raise self._corrupt(problem)
        return keys

    def _check_sizes(self) -> None:
        """What would be decoded, before it is: 256 rows, eight to a group, V values each."""
        if not self._file.schema_arrow.equals(_SCHEMA):
            raise self._corrupt(f"has other columns: {' '.join(str(self._file.schema_arrow).split())}")
        metadata = self._file.metadata
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        largest = max((group.num_rows for group in groups), default=0)
        if not 1 <= metadata.num_rows <= LIMIT or sum(g.num_rows for g in groups) != metadata.num_rows:
            raise self._corrupt(f"has {metadata.num_rows:,} rows, expected 1 … {LIMIT}")
        if largest > PER_SEQUENCE:
            raise self._corrupt(f"has {largest:,} rows in a row group, expected at most {PER_SEQUENCE}")
        chunks = [group.column(c) for group in groups for c in range(metadata.num_columns)]
        # Both: runs of one value, or a dictionary, make many values of few bytes.
        values, size = max(c.num_values for c in chunks), max(c.total_uncompressed_size for c in chunks)
        most = PER_SEQUENCE * self._vocabulary
        if values > most or size > 4 * most + _SLACK_BYTES:
            raise self._corrupt(
                f"has a column of {values:,} values and {size:,} bytes in a row group, expected at most {most:,} values"
            )

    def _corrupt(self, what: str) -> CorruptShard:
        return CorruptShard(
            f"fidelity sample {self._where} {' '.join(what.split())}; it was damaged or replaced: put back a copy of "
            "it, or delete it (no shard needs it; fidelity is then measured at the positions that are left)"
        )


def _problem(truth: Truth, unit: Unit, vocabulary: int) -> str | None:
    """What makes this no truth of the unit, in words."""
    shapes = (truth.logits.shape, truth.alone.shape)
    if shapes != ((len(truth), vocabulary), (len(truth.alone_rows), vocabulary)):
        return f"logits and alone of {shapes}, expected [{len(truth)}, {vocabulary}] and as many as alone_rows"
    if truth.logits.dtype != np.float32 or truth.alone.dtype != np.float32 or truth.positions.dtype != np.int32:
        return f"dtypes {truth.logits.dtype}, {truth.alone.dtype}, {truth.positions.dtype}, expected float32 and int32"
    if len(truth.positions) != len(truth):
        return f"{len(truth.positions)} positions for {len(truth)} sequences"
    bad = next((row for row in range(len(truth)) if not np.isfinite(truth.logits[row]).all()), None)
    if bad is not None or not all(np.isfinite(row_V).all() for row_V in truth.alone):
        return f"NaN or infinite logits at {truth.keys[bad] if bad is not None else 'a position scored alone'}"
    rows = truth.alone_rows
    if len(set(rows.tolist())) != len(rows) or not ((rows >= 0) & (rows < len(truth))).all():
        return f"alone_rows {rows.tolist()} are not distinct rows of {len(truth)}"
    return _key_problem(truth.keys, unit)


def _key_problem(keys: list[tuple[str, int]], unit: Unit) -> str | None:
    spans = dict(zip(unit.sequences, zip(unit.tokens, unit.rows, strict=True), strict=True))
    for sequence, position in keys:
        if sequence not in spans:
            return f"sequence {sequence[:40]} is not in unit {unit.id}"
        tokens, rows = spans[sequence]
        if not tokens - rows <= position < tokens:
            return f"position {position} of sequence {sequence}, rows are {tokens - rows} … {tokens - 1}"
    if len(set(keys)) != len(keys):
        return "a position stands twice"
    return None
