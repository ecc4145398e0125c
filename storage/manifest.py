"""The corpus manifest: which sequences a corpus holds, in what order, how often, and what of them is learned.

Enters: rows (a sequence, its loss mask, weight, split and origin). Leaves: one Parquet file, and from it an index
of all rows as arrays, or any rows by number. Costs: writing is one row group of memory; the index is 57 bytes a
row; random access decodes one row group of about 64k tokens, of which the last few are kept.

The manifest belongs to the corpus, not to a store: another split, mask, weight or order is another manifest and
the same teacher rows. Plain Parquet, one row per sequence:

    document int64 | source, line | window int32 | sequence (digest, hex) | tokens, context, trained int32
    split "train"/"heldout" | weight float32 | input_ids list<int32> | mask_runs list<int32>

The metadata key `stillroom.manifest` holds the rest as JSON, `stillroom.manifest.digest` that JSON's digest
(Parquet's page checksums do not cover the footer).
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillroom.storage.errors import CorruptShard, FormatMismatch, StoreError
from stillroom.storage.records import Float32, Int32, Sequence, digest128

VERSION = 1
META_KEY, META_DIGEST_KEY = "stillroom.manifest", "stillroom.manifest.digest"
#: How the source of a row begins whose text a teacher wrote.
GENERATIONS = "generations:"


def _column(name: str, kind: Any) -> Any:
    return pa.field(name, kind, nullable=False)


INTS = pa.list_(_column("element", pa.int32()))
SCHEMA = pa.schema(
    [
        _column("document", pa.int64()),
        _column("source", pa.dictionary(pa.int32(), pa.string())),
        _column("line", pa.int64()),
        _column("window", pa.int32()),
        _column("sequence", pa.string()),
        _column("tokens", pa.int32()),
        _column("context", pa.int32()),
        _column("trained", pa.int32()),
        _column("split", pa.dictionary(pa.int32(), pa.string())),
        _column("weight", pa.float32()),
        _column("input_ids", INTS),
        _column("mask_runs", INTS),
    ]
)


def runs_from_mask(mask: NDArray[np.bool_]) -> Int32:
    """bool [T] to int32 run lengths that alternate False, True, False, …; the first may be 0. T = 0 gives none."""
    if len(mask) == 0:
        return np.zeros(0, np.int32)
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    bounds = np.concatenate([(0,), edges, (len(mask),)])
    runs = (bounds[1:] - bounds[:-1]).astype(np.int32)
    return np.concatenate([np.zeros(1, np.int32), runs]) if mask[0] else runs


def mask_from_runs(runs: Int32, length: int) -> NDArray[np.bool_]:
    """The inverse of `runs_from_mask`: bool [length]. Raises CorruptShard if the runs do not add up to it."""
    if int(runs.sum()) != length or (len(runs) and int(runs.min()) < 0):
        raise CorruptShard(f"mask runs cover {int(runs.sum())} tokens, the sequence has {length}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


@dataclass(frozen=True)
class ManifestRow:
    """One sequence as the corpus has it.

    mask: bool [T], True where the token is to be learned; False on the context.
    weight: of its loss. document: its number in the corpus, from 0; source and line: where it was read.
    heldout: it evaluates and never trains. window: which window of its document it is, from 0.
    """

    sequence: Sequence
    mask: NDArray[np.bool_]
    weight: float
    document: int
    source: str
    line: int
    heldout: bool
    window: int = 0

    @property
    def trained(self) -> int:
        """Positions that train: masked-in tokens with a predecessor whose signal is kept."""
        return int(np.count_nonzero(self.mask[max(self.sequence.context, 1) :]))


@dataclass(frozen=True)
class ManifestMeta:
    """What holds for all rows.

    version: of this format. window, overlap: tokens. tokenizer: `tokenizer_digest`. chat_template: its digest, or
    None. vocabulary: V. counts: what the ingest read, kept and left out. config: as resolved. inputs: fingerprint
    of all that the rows were made from. rows, rows_digest: filled in by the writer.
    """

    window: int
    overlap: int
    tokenizer: str
    chat_template: str | None
    vocabulary: int
    counts: dict[str, Any]
    config: dict[str, Any]
    inputs: str
    rows: int = 0
    rows_digest: str = ""
    version: int = VERSION


@dataclass(frozen=True)
class ManifestIndex:
    """All rows without their ids, as arrays of one length.

    sequences: S32, hex digests. tokens, contexts, trained: int32. heldout: bool. weights: float32. documents: int64.
    """

    sequences: NDArray[np.bytes_]
    tokens: Int32
    contexts: Int32
    trained: Int32
    heldout: NDArray[np.bool_]
    weights: Float32
    documents: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class Masks:
    """The loss masks of all rows, as runs end to end.

    runs: int32. runs_at: int64 [rows + 1], where each row's begin.
    """

    runs: Int32
    runs_at: NDArray[np.int64]

    def mask(self, row: int, length: int) -> NDArray[np.bool_]:
        """The mask of a row of `length` tokens, bool [length]."""
        return mask_from_runs(self.runs[self.runs_at[row] : self.runs_at[row + 1]], length)


class RowsDigest:
    """Digest over what decides the training: sequences, masks, splits and weights, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(b"stillroom.manifest.1", digest_size=16)

    def add(self, row: ManifestRow, runs: Int32) -> None:
        self._hash.update(row.sequence.digest.encode())
        self._hash.update(np.float32(row.weight).astype("<f4").tobytes() + bytes([row.heldout]))
        self._hash.update(len(runs).to_bytes(4, "little") + runs.astype("<i4").tobytes())

    def hex(self) -> str:
        return self._hash.hexdigest()


def _index_of(path: Path, batch: Any) -> ManifestIndex:
    """Some rows' part of the index, as arrays of its own: the Parquet buffers are let go."""
    tokens, contexts, trained, weights, documents = (
        batch[name].to_numpy().copy() for name in ("tokens", "context", "trained", "weight", "document")
    )
    return ManifestIndex(
        sequences=np.frombuffer(_digest_bytes(path, batch["sequence"]), "S32"),
        tokens=tokens,
        contexts=contexts,
        trained=trained,
        heldout=pc.equal(batch["split"].cast(pa.string()), "heldout").to_numpy(zero_copy_only=False),
        weights=weights,
        documents=documents,
    )


class _Group:
    """A decoded row group: flat arrays, and where each row begins in them."""

    def __init__(self, table: Any) -> None:
        table = table.combine_chunks()
        self.ids, self.ids_at = _flat(table["input_ids"])
        self.runs, self.runs_at = _flat(table["mask_runs"])
        self.source, self.split = (table[name].cast(pa.string()).to_pylist() for name in ("source", "split"))
        self.document, self.line, self.window, self.context, self.weight = (
            table[name].to_numpy().copy() for name in ("document", "line", "window", "context", "weight")
        )

    def row(self, i: int) -> ManifestRow:
        ids = self.ids[self.ids_at[i] : self.ids_at[i + 1]]
        runs = self.runs[self.runs_at[i] : self.runs_at[i + 1]]
        return ManifestRow(
            sequence=Sequence(ids, int(self.context[i])),
            mask=mask_from_runs(runs, len(ids)),
            weight=float(self.weight[i]),
            document=int(self.document[i]),
            source=self.source[i],
            line=int(self.line[i]),
            heldout=self.split[i] == "heldout",
            window=int(self.window[i]),
        )


def _flat(column: Any) -> tuple[Int32, Int32]:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.values.to_numpy().copy(), array.offsets.to_numpy().copy()


class Manifest:
    """A manifest on disk. Safe to use from several threads: reads of the file take turns."""

    def __init__(self, path: Path, parquet: Any, meta: ManifestMeta, cached_groups: int) -> None:
        self.path = path
        self.meta = meta
        self._parquet = parquet
        self._cached_groups = cached_groups
        self._groups: OrderedDict[int, _Group] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def open(path: Path, *, cached_groups: int = 64) -> "Manifest":
        """Read the footer. cached_groups: decoded row groups kept, about 0.3 MB each.

        Raises StoreError if there is no such file, CorruptShard if it is damaged, FormatMismatch if it is no
        manifest or one of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise StoreError(
                f"no corpus manifest at {path}: `stillroom teach` on its recipe makes one; or correct the path"
            )
        with _damage_named(path):
            parquet = pq.ParquetFile(path, page_checksum_verification=True)
        meta = _read_meta(path, parquet.metadata.metadata or {})
        if not parquet.schema_arrow.equals(SCHEMA):
            raise CorruptShard(_damaged(path, "its columns are not the ones written"))
        if parquet.metadata.num_rows != meta.rows:
            raise CorruptShard(_damaged(path, f"{parquet.metadata.num_rows} rows, {meta.rows} were written"))
        return Manifest(path, parquet, meta, cached_groups)

    @property
    def digest(self) -> str:
        """Digest of sequences, masks, splits and weights in order: equal for equal rows, whatever the file's bytes."""
        return self.meta.rows_digest

    def __len__(self) -> int:
        return self.meta.rows

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        metadata = self._parquet.metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        return np.cumsum([0, *sizes], dtype=np.int64)

    def groups(self) -> list[range]:
        """The row numbers of each row group: what is decoded together."""
        return [range(int(a), int(b)) for a, b in pairwise(self._starts)]

    def index(self) -> ManifestIndex:
        """All rows without ids and masks, read group by group (a million rows of 128 tokens: half a second)."""
        names = ["sequence", "tokens", "context", "trained", "split", "weight", "document"]
        parts = [_index_of(self.path, batch) for batch in self._batches(names)]
        return ManifestIndex(
            **{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(ManifestIndex)}
        )

    def masks(self) -> Masks:
        """All rows' loss masks: 4 bytes per run and 8 per row."""
        lists = [batch["mask_runs"] for batch in self._batches(["mask_runs"])]
        counts = np.concatenate([np.diff(column.offsets.to_numpy()) for column in lists])
        return Masks(
            runs=np.concatenate([column.flatten().to_numpy() for column in lists]),
            runs_at=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)]),
        )

    def generated(self) -> NDArray[np.bool_]:
        """Of all rows, whether a teacher wrote the text. bool [rows]."""
        columns = [batch["source"].cast(pa.string()) for batch in self._batches(["source"])]
        return np.concatenate([pc.starts_with(c, GENERATIONS).to_numpy(zero_copy_only=False) for c in columns])

    def _batches(self, names: list[str]) -> Iterator[Any]:
        """At least one batch, so that an empty manifest gives arrays of the right types."""
        yield pa.RecordBatch.from_pylist([], pa.schema([SCHEMA.field(name) for name in names]))
        with self._lock, _damage_named(self.path):
            yield from self._parquet.iter_batches(batch_size=1 << 17, columns=names, use_threads=False)

    def rows(self, numbers: Seq[int] | NDArray[np.integer[Any]]) -> list[ManifestRow]:
        """The rows of these numbers, in this order; each row group they lie in is decoded once."""
        wanted = np.asarray(numbers, dtype=np.int64)
        assert not len(wanted) or (wanted.min() >= 0 and wanted.max() < len(self)), "row numbers are 0 … rows − 1"
        groups = np.searchsorted(self._starts, wanted, side="right") - 1
        decoded = {int(g): self._group(int(g)) for g in np.unique(groups)}
        return [decoded[int(g)].row(int(n - self._starts[g])) for n, g in zip(wanted, groups, strict=True)]

    def __iter__(self) -> Iterator[ManifestRow]:
        """All rows in order, in one row group of memory."""
        for number, rows in enumerate(self.groups()):
            group = self._group(number)
            yield from map(group.row, range(len(rows)))

    def verify(self) -> None:
        """Read every byte and compare with the digest stated. Raises CorruptShard where they differ."""
        found = _rows_digest_of(self)
        if found != self.digest:
            raise CorruptShard(_damaged(self.path, f"its rows have digest {found}, {self.digest} was written"))

    def _group(self, number: int) -> _Group:
        with self._lock:
            if number in self._groups:
                self._groups.move_to_end(number)
                return self._groups[number]
            with _damage_named(self.path):
                group = _Group(self._parquet.read_row_group(number, use_threads=False))
            self._groups[number] = group
            while len(self._groups) > self._cached_groups:
                self._groups.popitem(last=False)
            return group


def _rows_digest_of(rows: Iterable[ManifestRow]) -> str:
    digest = RowsDigest()
    for row in rows:
        digest.add(row, runs_from_mask(row.mask))
    return digest.hex()


def _digest_bytes(path: Path, column: Any) -> bytes:
    """The hex digits of a string column end to end."""
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    if len(column) and not (np.diff(offsets) == 32).all():
        raise CorruptShard(_damaged(path, "a sequence digest is not of 32 characters"))
    return bytes(column.buffers()[2][offsets[0] : offsets[-1]]) if len(column) else b""


def _read_meta(path: Path, metadata: dict[bytes, bytes]) -> ManifestMeta:
    text = metadata.get(META_KEY.encode())
    if text is None:
        raise FormatMismatch(f"{path} is no corpus manifest: it lacks the metadata key {META_KEY}")
    if metadata.get(META_DIGEST_KEY.encode()) != digest128(text).encode():
        raise CorruptShard(_damaged(path, "its metadata does not have the digest stated"))
    stated = json.loads(text)
    if stated.get("version") != VERSION:
        raise FormatMismatch(
            f"{path} is a corpus manifest of version {stated.get('version')}, this stillroom reads {VERSION}: "
            "delete it and ingest the corpus again"
        )
    return ManifestMeta(**stated)


def _damaged(path: Path, what: object) -> str:
    return f"corpus manifest {path} is damaged ({what}): delete it and ingest the corpus again"


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorruptShard(_damaged(path, error)) from error
