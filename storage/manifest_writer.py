"""Writes a corpus manifest: rows in, one Parquet file out, all of it or nothing.

Enters: `ManifestRow`s in corpus order, at the end what holds for all of them. Leaves: the file, synced and renamed
into place. Costs: one row group of memory (about 64k tokens) and 16 bytes of scratch disk per row.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import StoreFull
from stillroom.storage.files import sync_to_disk
from stillroom.storage.identity import canonical_json
from stillroom.storage.manifest import (
    INTS,
    META_DIGEST_KEY,
    META_KEY,
    SCHEMA,
    VERSION,
    ManifestMeta,
    ManifestRow,
    RowsDigest,
    runs_from_mask,
)
from stillroom.storage.records import Int32, digest128

#: Tokens per row group: 256 KiB of ids, and a random read of one sequence decodes that much.
GROUP_TOKENS = 65_536
GROUP_ROWS = 16_384
#: Digests sorted at once when duplicates are counted: 2^21 × 16 bytes = 32 MiB.
_DUPLICATE_SLICE = 1 << 21


class ManifestWriter:
    """Appends rows to a temporary file beside `path`; `commit` makes it `path` in one step.

    As a context manager it removes the temporary file when the block ends without `commit`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._digests = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed in __exit__)
        self._parquet = pq.ParquetWriter(
            self._file, SCHEMA, compression="zstd", use_dictionary=["source", "split"],
            column_encoding={"input_ids.list.element": "BYTE_STREAM_SPLIT"},
            write_page_checksum=True, write_statistics=False,
        )  # fmt: skip
        self._pending: list[tuple[ManifestRow, Int32]] = []
        self._pending_tokens = 0
        self._rows_digest = RowsDigest()
        self.rows = 0

    def __enter__(self) -> "ManifestWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self._parquet.close()
            self._file.close()
        self._digests.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, row: ManifestRow) -> None:
        """Raises StoreFull when the disk is."""
        runs = runs_from_mask(row.mask)
        assert len(row.mask) == len(row.sequence.input_ids) >= 1, "a mask entry per token, at least one token"
        self._rows_digest.add(row, runs)
        self._pending.append((row, runs))
        self._pending_tokens += len(row.mask)
        self.rows += 1
        if self._pending_tokens >= GROUP_TOKENS or len(self._pending) >= GROUP_ROWS:
            self._flush()

    def count_duplicates(self) -> int:
        """Rows so far whose sequence an earlier row has. Exact, in 64 MiB: the digests lie in a scratch file."""
        self._flush()
        self._digests.flush()
        return count_duplicates(self._digests, self.rows)

    def commit(self, meta: ManifestMeta) -> None:
        """Write the footer, sync, rename over `path`."""
        self._flush()
        meta = replace(meta, rows=self.rows, rows_digest=self._rows_digest.hex(), version=VERSION)
        text = canonical_json(asdict(meta))
        with _full_disk_named(self.path):
            self._parquet.add_key_value_metadata({META_KEY: text, META_DIGEST_KEY: digest128(text)})
            self._parquet.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            sync_to_disk(self.path.parent)

    def _flush(self) -> None:
        if not self._pending:
            return
        with _full_disk_named(self.path):
            self._digests.write(b"".join(bytes.fromhex(row.sequence.digest) for row, _ in self._pending))
            self._parquet.write_table(_table(self._pending), row_group_size=GROUP_ROWS)
        self._pending, self._pending_tokens = [], 0


def _table(pending: list[tuple[ManifestRow, Int32]]) -> Any:
    rows = [row for row, _ in pending]
    columns = [
        pa.array([r.document for r in rows], pa.int64()),
        pa.array([r.source for r in rows], pa.string()).dictionary_encode(),
        pa.array([r.line for r in rows], pa.int64()),
        pa.array([r.window for r in rows], pa.int32()),
        pa.array([r.sequence.digest for r in rows], pa.string()),
        pa.array([len(r.mask) for r in rows], pa.int32()),
        pa.array([r.sequence.context for r in rows], pa.int32()),
        pa.array([r.trained for r in rows], pa.int32()),
        pa.array(["heldout" if r.heldout else "train" for r in rows], pa.string()).dictionary_encode(),
        pa.array([r.weight for r in rows], pa.float32()),
        _lists([r.sequence.input_ids for r in rows]),
        _lists([runs for _, runs in pending]),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _lists(values: list[Int32]) -> Any:
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values), pa.int32()), type=INTS)


def count_duplicates(file: Any, rows: int, *, at_once: int = _DUPLICATE_SLICE) -> int:
    """Rows minus distinct ones, of `rows` 16-byte digests in a binary file. Passes over it once per `at_once` rows."""
    slices = -(-rows // at_once)
    distinct = 0
    for number in range(slices):
        file.seek(0)
        kept = []
        while block := file.read(16 << 16):
            digests = np.frombuffer(block, "V16")
            leading = digests.view("<u4").reshape(-1, 4)[:, 0]
            kept.append(digests[leading % slices == number])
        distinct += len(np.unique(np.concatenate(kept)))
    file.seek(0, os.SEEK_END)
    return rows - distinct


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreFull(f"no room left for the corpus manifest {path}: {error.strerror}; free some space") from error
