"""Which two earlier positions say most about what a position keeps: the search behind the `packed` codec.

Enters: what all positions of a row group keep. Leaves: for each position two earlier ones. Costs: about half
of writing. Only the writer searches; readers are told.

The best reference shares 66 % of its ids with a position, the best pair 83 % (real teacher, k = 64, among 40,960
positions; the position before shares 22 %, the last with the same input token 43 %). Found in two steps: positions
vote by the ids that are rare enough to have short lists, and of the best voted in each of `BLOCKS` stretches the one
that saves most is taken.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.codecs.entropy import Int64
from stillroom.storage.codecs.packed_ranks import spans

#: How far back references may lie, in positions.
WINDOW = 1 << 14

#: An id takes part in the vote if at most this many positions of the window hold it. 64 costs 0.5 bytes a position
#: (groups of 4,096) and saves a tenth of writing.
LONGEST = 256

#: Stretches of the window, each with a finalist.
BLOCKS = 32

#: Votes, and cells of the position × id table, that are held at once.
CELLS, TABLE = 1 << 19, 1 << 21


@dataclass
class ReferenceSearch:
    """Finds references for positions given as flat entries: row int64 [E], ids int64 [E], offset int64 [R + 1]."""

    row: Int64
    ids: Int64
    offset: Int64
    vocabulary: int
    _table: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self) -> None:
        order = np.argsort(self.ids, kind="stable")
        self._holders = self.row[order]
        self._key = self.ids[order] << 32 | self._holders
        held = np.bincount(self.ids, minlength=self.vocabulary)
        # What an id would cost to name without a reference, in bits, rounded up.
        self._weight = np.frexp((len(self.offset) - 1) / np.maximum(held, 1))[1].astype(np.int32)

    def find(self, start: int, stop: int) -> Int64:
        """References [2, stop − start] of positions start … stop − 1, all before `start`, which is at least 1."""
        first = max(0, start - WINDOW)
        step = max(1, min(CELLS // (start - first), TABLE // self.vocabulary))
        parts = [self._find(first, start, a, min(a + step, stop)) for a in range(start, stop, step)]
        return np.concatenate(parts, axis=1)

    def _find(self, first: int, limit: int, start: int, stop: int) -> Int64:
        n, entries = stop - start, slice(int(self.offset[start]), int(self.offset[stop]))
        ids, row = self.ids[entries], self.row[entries] - start
        if len(self._table) < n * self.vocabulary:
            self._table = np.zeros(n * self.vocabulary, np.int32)
        begin = np.searchsorted(self._key, ids << 32 | first)
        length = np.searchsorted(self._key, ids << 32 | limit) - begin
        votes = (length > 0) & (length <= LONGEST)
        cell = row * self.vocabulary + ids
        self._table[cell] = self._weight[ids]
        near = self._best(begin[votes], length[votes], row[votes], ids[votes], n, first, limit)
        lengths = self.offset[near + 1] - self.offset[near]
        covered = np.repeat(np.arange(n) * self.vocabulary, lengths) + self.ids[spans(self.offset[near], lengths)]
        self._table[covered] = 0
        votes &= self._table[cell] > 0
        far = self._best(begin[votes], length[votes], row[votes], ids[votes], n, first, limit)
        self._table[cell] = 0
        return np.stack([near, far])

    def _best(self, begin: Int64, length: Int64, row: Int64, ids: Int64, n: int, first: int, limit: int) -> Int64:
        """Of the finalists of n positions, each one's best by the table; the latest of equals."""
        block = -(-(limit - first) // BLOCKS)
        width = BLOCKS * block
        cells = self._holders[spans(begin, length)] + np.repeat(row * width - first, length)
        votes = np.bincount(cells, np.repeat(self._weight[ids], length), n * width).reshape(n, BLOCKS, block)
        finalists = np.minimum(first + np.argmax(votes, axis=2) + np.arange(BLOCKS) * block, limit - 1)
        flat = finalists.ravel()
        lengths = self.offset[flat + 1] - self.offset[flat]
        base = np.repeat(np.repeat(np.arange(n) * self.vocabulary, BLOCKS), lengths)
        saved = self._table[base + self.ids[spans(self.offset[flat], lengths)]]
        score = np.add.reduceat(saved, np.cumsum(lengths) - lengths).reshape(n, BLOCKS)
        best = BLOCKS - 1 - np.argmax(score[:, ::-1], axis=1)
        return np.asarray(finalists[np.arange(n), best])
