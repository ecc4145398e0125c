"""The `packed` codec: what the plain `topk` codec holds, at the smallest size we know, for archives.

Enters: a `TopK` of R positions. Leaves: one binary column, and back. Costs (real teacher, k = 64, one
busy core): written at 2,300 to 3,400 positions/s and read at 3,800 to 8,700, as row groups hold 4,096 to 40,960
positions; 83.1 to 80.0 bytes a position, where plain columns take 146.

    topk_packed  binary   a row group's first sequence holds the bytes of all of them, the others none

    byte 0       1, the layout's number
    260 bytes    weights of the tail's guess, int32 little-endian, row g with g + 2 of them, in 2^-20
    the rest     rANS of lanes_for(R · k) lanes (codecs/entropy.py), in the order of codecs/packed_walk.py

The block read is the plain codec's, bit for bit, but for one thing: ids with equal gap codes come by rising id, after
the first (`canonical` does the same to any block). Their order said which of two logits was larger by less than a gap
step, which the plain codec's numbers do not say either, and would cost 7.4 bytes a position. The first of a row is the
teacher's own first.

Damaged bytes raise ValueError or give a block that keeps the contract; what they can make a reader allocate is bounded
by the R and k that it was called with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom.storage.codecs.columns import Counts
from stillroom.storage.codecs.entropy import Int64, Reader, Writer, lanes_for
from stillroom.storage.codecs.packed_walk import WEIGHT_BITS, Entries, G, Walk
from stillroom.storage.codecs.tail import decode_tail, encode_tail
from stillroom.storage.codecs.topk import TopKCodec, check_topk, gap_codes, logits_of
from stillroom.storage.records import Float32, Int32, TopK, TopKSpec

COLUMN = "topk_packed"
LAYOUT = 1

#: Which of the [G, G + 2] weights are stored.
_STORED = np.tril_indices(G, 1, G + 2)


@dataclass(frozen=True)
class PackedCodec:
    """Encodes blocks of one spec over a vocabulary of `vocabulary` real ids. Raises ValueError if k does not fit it."""

    spec: TopKSpec
    vocabulary: int

    def __post_init__(self) -> None:
        TopKCodec(self.spec, self.vocabulary)

    def fields(self) -> list[pa.Field]:
        return [pa.field(COLUMN, pa.binary(), nullable=False)]

    def encodings(self) -> dict[str, str]:
        """PLAIN: the bytes are as good as random."""
        return {}

    def encode(self, block: TopK, rows: Counts) -> list[pa.Array]:
        """See `Codec`; refuses what the plain codec refuses, in the same words."""
        check_topk(block, self.spec, self.vocabulary)
        values = [b""] * len(rows)
        if len(block):
            values[0] = self._pack(block)
        return [pa.array(values, pa.binary())]

    def decode(self, columns: Mapping[str, pa.Array], rows: Counts) -> TopK:
        """The block, ids of equal gap by rising id after the first."""
        column, total = columns[COLUMN], int(rows.sum())
        if len(column) != len(rows) or column.null_count:
            raise ValueError(f"column {COLUMN} has {len(column):,} values, expected {len(rows):,}")
        values = [memoryview(value.as_buffer()) for value in column]
        if any(len(value) for value in values[1:]) or (total == 0 and any(len(value) for value in values)):
            raise ValueError(f"column {COLUMN} has bytes beyond those of its first sequence")
        return self._unpack(values[0], total) if total else self._block(_no_entries())

    def _pack(self, block: TopK) -> bytes:
        entries = self._entries(block)
        weights = _fit_tail(entries.widest, entries.points)
        writer = Writer(lanes_for(len(block) * self.spec.k))
        Walk(writer, self.spec, self.vocabulary, weights).run(len(block), entries)
        return bytes([LAYOUT]) + weights[_STORED].astype("<i4").tobytes() + writer.finish()

    def _unpack(self, data: memoryview, total: int) -> TopK:
        head = 1 + 4 * len(_STORED[0])
        if len(data) < head or data[0] != LAYOUT:
            raise ValueError(f"packed data of {len(data):,} bytes does not start as layout {LAYOUT} does")
        weights = np.zeros((G, G + 2), np.int64)
        weights[_STORED] = np.frombuffer(data[1:head], "<i4")
        reader = Reader(data[head:], lanes_for(total * self.spec.k))
        entries = Walk(reader, self.spec, self.vocabulary, weights).run(total)
        reader.finish()
        return self._block(entries)

    def _entries(self, block: TopK) -> Entries:
        """The block entry by entry, by rising row and id."""
        used = np.arange(block.ids.shape[1]) < block.kept[:, None]
        row, column = np.nonzero(used)
        order = np.argsort(row * self.vocabulary + block.ids[used])
        row, column = row[order], column[order]
        code, low = _integers(gap_codes(block, self.spec.gap_step))
        counts = block.kept.astype(np.int64)
        widest = code[np.arange(len(block)), counts - 1]
        top = np.ascontiguousarray(block.logits[:, 0])
        tail = encode_tail(block.tail_lse, top, self.vocabulary - block.kept).astype(np.int64)
        return Entries(
            row=row,
            ids=block.ids[row, column].astype(np.int64),
            depth=widest[row] - code[row, column],
            low=low[row, column],
            counts=counts,
            widest=widest,
            points=np.cumsum(np.cumsum(tail, axis=1), axis=1),
            top=top.view(np.uint32).astype(np.int64),
            # How many ids at gap 0 are smaller than the first one.
            best=((code + low == 0) & used & (block.ids < block.ids[:, :1])).sum(axis=1),
        )

    def _block(self, entries: Entries) -> TopK:
        """Raises ValueError where the entries are no block: damaged data decodes to anything."""
        total, counts = len(entries.counts), entries.counts
        code = entries.widest[entries.row] - entries.depth
        step, low = self.spec.gap_step, entries.low if self.spec.gap_step is None else np.zeros_like(code)
        full = code << 16 | low
        at_top = np.flatnonzero(full == 0)  # entries come by rising row and id
        nth = np.arange(len(at_top)) - np.searchsorted(entries.row[at_top], entries.row[at_top])
        later = np.ones(len(full), np.int64)
        later[at_top[nth == entries.best[entries.row[at_top]]]] = 0
        order = np.lexsort((entries.ids, later, full, entries.row))
        width = int(counts.max(initial=1)) if self.spec.nucleus else self.spec.k
        used = np.arange(width) < counts[:, None]
        ids = np.full((total, width), -1, np.int32)
        ids[used] = entries.ids[order]
        gaps = np.zeros((total, width), np.int64)
        gaps[used] = full[order]
        top = entries.top.astype(np.uint32).view(np.float32)
        tail = np.diff(np.diff(entries.points, axis=1, prepend=0), axis=1, prepend=0)
        if gaps[:, :1].any() or not np.isfinite(top).all() or (np.abs(tail) >= 1 << 31).any():
            raise ValueError("packed data holds a row that no writer leaves")
        nats_or_codes = gaps.astype(np.uint32).view(np.float32) if step is None else (gaps >> 16).astype(np.int16)
        if not np.isfinite(nats_or_codes).all():
            raise ValueError("packed data holds a gap that is not finite")
        logits = logits_of(nats_or_codes, top, step)
        logits[~used] = -np.inf
        kept: Int32 = counts.astype(np.int32)
        tail_size = self.vocabulary - (kept if self.spec.nucleus else self.spec.k)
        tail_lse: Float32 = decode_tail(tail.astype(np.int32), top, tail_size)
        return TopK(ids, logits, tail_lse, kept if self.spec.nucleus else None)


def canonical(block: TopK, gap_step: float | None) -> TopK:
    """The block with ids of equal gap code by rising id, after the first, as the packed codec gives it back.

    Of a block that the plain codec decoded the logits are then the same to the bit; of others ids move, and each
    takes its own logit along.
    """
    gaps = gap_codes(block, gap_step)
    unused = np.arange(gaps.shape[1]) >= block.kept[:, None]
    later = np.broadcast_to(np.arange(gaps.shape[1]) > 0, gaps.shape)
    order = np.lexsort((block.ids, later, gaps, unused), axis=1)
    ids = np.take_along_axis(block.ids, order, axis=1)
    return replace(block, ids=ids, logits=np.take_along_axis(block.logits, order, axis=1))


def _integers(gaps: NDArray[np.int16] | Float32) -> tuple[Int64, Int64]:
    """(code, low 16 bits): float32 gaps are cut in two, as the bits of floats ≥ 0 rise with their values."""
    if gaps.dtype == np.float32:
        bits = (gaps + np.float32(0)).view(np.uint32).astype(np.int64)
        return bits >> 16, bits & 0xFFFF
    return gaps.astype(np.int64), np.zeros(gaps.shape, np.int64)


def _fit_tail(widest_R: Int64, points_RG: Int64) -> Int64:
    """Weights int64 [G, G + 2] in 2^-20: point g from 1, `widest` and the points before it, by least squares.

    In exact rationals: floats would give other bytes on other machines. One elimination serves all g, as each has
    one variable more than the one before (5.5 bytes a position instead of 9.2 for the second differences).
    """
    known = np.concatenate([np.ones((len(widest_R), 1), np.int64), widest_R[:, None], points_RG], axis=1)
    known = np.clip(known[: 1 << 20], -(1 << 21), 1 << 21)
    moments = (known.T @ known + np.eye(G + 2, dtype=np.int64)).tolist()
    upper = [[Fraction(x) for x in line] for line in moments]
    for i in range(G + 1):
        for j in range(i + 1, G + 2):
            factor = upper[j][i] / upper[i][i]
            upper[j] = [a - factor * b for a, b in zip(upper[j], upper[i], strict=True)]
    weights = np.zeros((G, G + 2), np.int64)
    for g in range(G):
        solved: dict[int, Fraction] = {}
        for i in range(g + 1, -1, -1):
            rest = sum((upper[i][j] * solved[j] for j in range(i + 1, g + 2)), Fraction(0))
            solved[i] = (upper[i][g + 2] - rest) / upper[i][i]
            weights[g, i] = min(max(round(solved[i] * (1 << WEIGHT_BITS)), -(1 << 31)), (1 << 31) - 1)
    return weights


def _no_entries() -> Entries:
    none = np.zeros(0, np.int64)
    return Entries(none, none, none, none, none, none, np.zeros((0, G), np.int64), none, none)
