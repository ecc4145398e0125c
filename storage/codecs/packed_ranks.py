"""Sets of ids as sets of ranks: ids by how often they were kept so far, coded by halving.

Enters: how many ids each position adds, and which ids are known to be no part of them. Leaves: the ids. Costs: up to
20 steps over all intervals that hold ids; one sort of V counts a batch.

A set has no order, and none is paid for: of n ids in an interval of ranks, the number in its left half is coded, then
both halves likewise. A list of n draws would cost log2(n!) bits more, 4.5 bytes at n = 14.
"""

import numpy as np

from stillroom.storage.codecs.entropy import Coder, Int64, Model, classes_below, classify

#: Halvings down to the buckets, which have contexts of their own: four ranks wide at 32, eight at 64, and so on.
LEVELS = 7

#: Interval sizes n up to which a context is shared: 1, 2, 3, 4, 5–6, 7–9, …
SIZES = np.array([1, 2, 3, 4, 6, 9, 14, 20, 28, 40, 56])


def spans(starts: Int64, lengths: Int64) -> Int64:
    """starts[0], starts[0] + 1, … for lengths[0] numbers, then the same from starts[1], …"""
    ends = np.cumsum(lengths)
    return np.asarray(np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths))


class Ranks:
    """How often each id was kept so far, and the ids by falling frequency, then rising id.

    ids: int64 [V] by rank; rank: int64 [V] by id; rate: int64 [V] by id, the bit length of 512 · seen / positions.
    """

    def __init__(self, vocabulary: int) -> None:
        self._seen = np.zeros(vocabulary, np.int64)
        self.learn(np.zeros(0, np.int64), 0)

    def learn(self, ids: Int64, positions: int) -> None:
        """Count ids of a batch; `positions` with it."""
        self._seen += np.bincount(ids, minlength=len(self._seen))
        # numpy sorts 16 bits by radix.
        self.ids = np.argsort((0xFFFF - np.minimum(self._seen, 0xFFFF)).astype(np.uint16), kind="stable")
        self.rank = np.empty_like(self.ids)
        self.rank[self.ids] = np.arange(len(self.ids))
        self.rate = np.frexp((self._seen << 9) // (positions + 1))[1].astype(np.int64)


class RankSets:
    """Codes sets of at most `k` ids of a vocabulary."""

    def __init__(self, vocabulary: int, k: int) -> None:
        self._vocabulary = vocabulary
        edges = np.flatnonzero(np.diff(classify(np.arange(vocabulary))[0], prepend=-1))
        edges = edges[:: -(-len(edges) // (1 << LEVELS))]
        self._edges = np.append(edges, np.full((1 << LEVELS) + 1 - len(edges), vocabulary))
        self._sizes = len(SIZES) + 1
        nodes = (1 << LEVELS) + 1  # the last for all halvings within buckets
        self._model = Model(np.tile(np.arange(self._sizes), nodes), classes_below(k + 1))

    def code(
        self, coder: Coder, ranks: Ranks, counts: Int64, asked: Int64, write: tuple[Int64, Int64] | None
    ) -> tuple[Int64, Int64]:
        """(row, rank) of counts[row] ids each.

        asked: rising row << 32 | rank of ids that are no part of the sets. Raises ValueError where what is read cannot
        be. write: (row, ids) of all that is kept.
        """
        if (counts < 0).any():
            raise ValueError("packed data holds more ids than its counts")
        asked_row = asked >> 32
        begin = np.searchsorted(asked_row, np.arange(len(counts)))
        keys = None
        if write is not None:
            keys = np.sort(write[0] << 32 | ranks.rank[write[1]])
            at = np.searchsorted(asked, keys)
            other = np.ones(len(keys), bool)
            inside = at < len(asked)
            other[inside] = asked[at[inside]] != keys[inside]
            # Ranks among the ids that were not asked about: each minus the asked ones below it.
            keys = (keys - (at - begin[keys >> 32]))[other]
        row, rank = self._halve(coder, counts, keys)
        gaps_closed = asked - (np.arange(len(asked)) - begin[asked_row])
        rank = rank + np.searchsorted(gaps_closed, row << 32 | rank, side="right") - begin[row]
        if rank.max(initial=0) >= self._vocabulary:
            raise ValueError("packed data holds a rank beyond the vocabulary")
        return row, rank

    def _halve(self, coder: Coder, counts: Int64, keys: Int64 | None) -> tuple[Int64, Int64]:
        """(row, rank), the ranks within a row distinct. keys: rising row << 32 | rank to write."""
        row = np.flatnonzero(counts)
        work = np.stack([row, counts[row], np.zeros(len(row), np.int64), np.full(len(row), 1 << LEVELS)])
        for level in range(LEVELS):
            middle = work[2] + work[3] >> 1
            node = (1 << level) - 1 + (work[2] >> LEVELS - level)
            work = self._split(coder, work, middle, node, self._edges, keys)
        work[2:] = self._edges[work[2:]]
        straight = np.arange(self._vocabulary + 1)
        done = []
        while work.shape[1]:
            row, number, low, high = work
            if (number > high - low).any():
                raise ValueError("packed data holds more ids in a bucket than it has")
            full, one = number == high - low, (number == 1) & (high - low > 1)
            done.append((np.repeat(row[full], number[full]), spans(low[full], number[full])))
            done.append((row[one], self._single(coder, row[one], low[one], high[one], keys)))
            work = work[:, ~full & ~one]
            node = np.full(work.shape[1], 1 << LEVELS)
            work = self._split(coder, work, work[2] + work[3] >> 1, node, straight, keys)
        none = np.zeros(0, np.int64)
        return np.concatenate([none, *(d[0] for d in done)]), np.concatenate([none, *(d[1] for d in done)])

    def _split(self, coder: Coder, work: Int64, middle: Int64, node: Int64, edges: Int64, keys: Int64 | None) -> Int64:
        """Intervals [row, number, low, high] of edges, cut at `middle`; those without ids go."""
        row, number, low, high = work
        left = np.where(edges[middle] == edges[high], number, 0)
        open_ = (edges[middle] > edges[low]) & (edges[middle] < edges[high])
        write = None
        if keys is not None:
            ends = (np.searchsorted(keys, row << 32 | edges[bound]) for bound in (low, middle))
            write = -np.subtract(*ends)[open_]
        context = node * self._sizes + np.searchsorted(SIZES, number)
        left[open_] = coder.numbers(self._model, context[open_], write)
        if (left > number).any():
            raise ValueError("packed data splits more ids than there are")
        halves = [[row, left, low, middle], [row, number - left, middle, high]]
        cut = np.concatenate([np.stack(half) for half in halves], axis=1)
        some: Int64 = cut[:, cut[1] > 0]
        return some

    def _single(self, coder: Coder, row: Int64, low: Int64, high: Int64, keys: Int64 | None) -> Int64:
        """The rank of the one id in each interval, as plain bits."""
        write = None
        if keys is not None:
            write = (keys[np.searchsorted(keys, row << 32 | low)] & 0xFFFFFFFF) - low
        found = coder.bits(np.frexp(high - low - 1)[1].astype(np.int64), write)
        if (found >= high - low).any():
            raise ValueError("packed data holds a rank outside its bucket")
        return low + found
