"""What the `packed` codec says about each position, in which order, and what it predicts it from.

Enters: a coder, and the entries to write if it is a writer. Leaves: the entries. Costs: 115 to 260 µs a
position to read; the entries once more as history.

One walk serves both directions: it asks the coder for values and hands over those to write, so the two cannot drift
apart. It goes in batches; a batch is predicted from the batches before it alone, and so all its positions are coded
at once. Of a batch it codes, in this order:

    counts     how many ids each position keeps; only with a nucleus
    pointers   two earlier positions that keep much the same (codecs/packed_search.py)
    widest     the largest gap code of each position
    flags      for each id that a pointer's position keeps: is it kept here too?
    others     the ids that no pointer has, as a set of ranks by frequency so far, without those just asked about
    depths     of each kept id by rising id: widest − gap code
    low        the low 16 bits of float32 gaps; only without a gap step
    best       of several ids at gap 0, which one is the largest logit
    tail       the tail's points, each against a linear guess from `widest` and the points before
    top        the top logit's 32 bits
"""

from dataclasses import dataclass

import numpy as np

from stillroom.storage.codecs.entropy import CLASSES, Coder, Int64, Model, classes_below, classify
from stillroom.storage.codecs.packed_ranks import Ranks, RankSets, spans
from stillroom.storage.codecs.packed_search import ReferenceSearch
from stillroom.storage.records import BETAS, TopKSpec

G = len(BETAS)

#: Classes of depth, of how often an id was kept so far, and of `widest`, in contexts.
DEPTHS, RATES, WIDTHS = 14, 11, 11

#: Weights of the tail's guess are multiples of 2^-20.
WEIGHT_BITS = 20


@dataclass
class Entries:
    """Positions as the walk sees them. E kept entries by rising (row, id); R positions.

    row, ids, depth, low: int64 [E]; counts, widest, top, best: int64 [R]; points: int64 [R, G], the tail's curve in
    steps. best: which of the ids at gap 0, by rising id, is the row's first.
    """

    row: Int64
    ids: Int64
    depth: Int64
    low: Int64
    counts: Int64
    widest: Int64
    points: Int64
    top: Int64
    best: Int64

    def cut(self, start: int, stop: int, offset: Int64) -> "Entries":
        e, r = slice(int(offset[start]), int(offset[stop])), slice(start, stop)
        parts = (self.row[e] - start, self.ids[e], self.depth[e], self.low[e])
        return Entries(*parts, self.counts[r], self.widest[r], self.points[r], self.top[r], self.best[r])

    @staticmethod
    def concatenate(parts: "list[Entries]") -> "Entries":
        starts = np.cumsum([0, *(len(p.counts) for p in parts)])
        rows = [p.row + start for p, start in zip(parts, starts[:-1], strict=True)]
        names = ("ids", "depth", "low", "counts", "widest", "points", "top", "best")
        return Entries(np.concatenate(rows), *(np.concatenate([getattr(p, name) for p in parts]) for name in names))


class Walk:
    """Codes R positions of one spec. weights: int64 [G, G + 2] of the tail's guess, in 2^-20."""

    def __init__(self, coder: Coder, spec: TopKSpec, vocabulary: int, weights: Int64) -> None:
        self._coder, self._spec, self._vocabulary, self._weights = coder, spec, vocabulary, weights
        self._ranks = Ranks(vocabulary)
        self._others = RankSets(vocabulary, spec.k)
        self._ids, self._depth, self._widest = (np.zeros(0, np.int64) for _ in range(3))
        self._offset = np.zeros(1, np.int64)
        numbers = classes_below(1 << 16)
        self._count_model = Model(np.zeros(1, np.int64), classes_below(spec.k + 1))
        self._pointer_model = Model(np.arange(2), 64)
        self._widest_model = Model(np.zeros(numbers + 1, np.int64), numbers)
        self._flag_model = Model(np.repeat(np.arange(3 * DEPTHS), RATES), 2)
        self._depth_model = Model(np.repeat(np.arange(4), DEPTHS * WIDTHS), numbers)
        self._best_model = Model(np.zeros(1, np.int64), classes_below(spec.k))
        self._tail_model = Model(np.arange(G), CLASSES)
        self._top_model = Model(np.minimum(np.arange(257), 1), 256)

    def run(self, total: int, entries: Entries | None = None) -> Entries:
        """All positions. entries: what to write, None to read. Raises ValueError where what is read cannot be."""
        offset = search = None
        if entries is not None:
            offset = np.concatenate([[0], np.cumsum(entries.counts)])
            search = ReferenceSearch(entries.row, entries.ids, offset, self._vocabulary)
        done, start = [], 0
        while start < total:
            # Batches grow with what there is to refer to. A sixteenth costs 0.9 bytes a position less than an eighth.
            size = min(max(start // 16, 8), 512, max(1, (1 << 16) // self._spec.k))
            stop = min(start + size, total)
            write = refs = None
            if entries is not None and offset is not None and search is not None:
                write = entries.cut(start, stop, offset)
                refs = search.find(start, stop) if start else None
            batch = self._batch(start, stop - start, write, refs)
            self._remember(batch)
            done.append(batch)
            start = stop
        return Entries.concatenate(done)

    def _batch(self, start: int, n: int, write: Entries | None, refs: Int64 | None) -> Entries:
        coder, none = self._coder, np.zeros(0, np.int64)
        counts = np.full(n, self._spec.k)
        if self._spec.nucleus is not None:
            counts = coder.numbers(self._count_model, np.zeros(n, np.int64), None if write is None else write.counts)
            _require(counts.min() >= 1 and counts.max() <= self._spec.k, f"counts outside 1 … {self._spec.k}")
        like = np.full(n, classes_below(1 << 16))
        row, ids, context, asked = none, none, none, none
        if start:
            refs = self._pointers(start, n, refs)
            like = classify(self._widest[refs[0]])[0]
        widest = coder.numbers(self._widest_model, like, None if write is None else write.widest)
        _require(int(widest.max()) <= 0x7FFF, "a gap beyond its type")
        if start and refs is not None:
            row, ids, context, asked = self._flags(n, refs, write)
        left = counts - np.bincount(row, minlength=n)
        kept = None if write is None else (write.row, write.ids)
        other_row, rank = self._others.code(coder, self._ranks, left, asked, kept)
        other_context = 3 * DEPTHS + np.minimum(classify(rank)[0] >> 3, DEPTHS - 1)
        row, ids = np.concatenate([row, other_row]), np.concatenate([ids, self._ranks.ids[rank]])
        order = np.argsort(row * self._vocabulary + ids)
        row, ids, context = row[order], ids[order], np.concatenate([context, other_context])[order]
        width = np.clip((classify(widest)[0] >> 1) - 12, 0, WIDTHS - 1)
        context = context * WIDTHS + width[row]
        depth = coder.numbers(self._depth_model, context, None if write is None else write.depth)
        _require(bool((depth <= widest[row]).all()), "a logit above the top one")
        low = none
        if self._spec.gap_step is None:
            low = coder.bits(np.full(len(row), 16), None if write is None else write.low)
        at_top = (depth == widest[row]) & (low == 0 if len(low) else True)
        best = self._best(np.bincount(row[at_top], minlength=n), None if write is None else write.best)
        points = self._tail(widest, None if write is None else write.points)
        top = self._top(n, None if write is None else write.top)
        return Entries(row, ids, depth, low, counts, widest, points, top, best)

    def _best(self, ties: Int64, write: Int64 | None) -> Int64:
        """Which of the ids at gap 0 is the first, by rising id: 0.02 bytes a position."""
        best, several = np.zeros_like(ties), np.flatnonzero(ties > 1)
        if len(several):
            none = np.zeros(len(several), np.int64)
            best[several] = self._coder.numbers(self._best_model, none, None if write is None else write[several])
        _require(bool((best < np.maximum(ties, 1)).all()), "a first id beyond those at gap 0")
        return best

    def _pointers(self, start: int, n: int, refs: Int64 | None) -> Int64:
        """References [2, n] as steps back from `start`: the upper six bits against a model, the rest as bits."""
        shift = np.full(n, max((start - 1).bit_length() - 6, 0))
        found = []
        for i in range(2):
            back = None if refs is None else start - 1 - refs[i]
            upper = self._coder.symbols(self._pointer_model, np.full(n, i), None if back is None else back >> shift)
            back = upper << shift | self._coder.bits(shift, back)
            _require(int(back.max()) < start, "a pointer to before the first position")
            found.append(start - 1 - back)
        return np.stack(found)

    def _flags(self, n: int, refs: Int64, write: Entries | None) -> tuple[Int64, Int64, Int64, Int64]:
        """(row, ids, depth context) of what is kept of the references, and (row << 32 | rank) of all asked about."""
        flat = refs.ravel()
        lengths = self._offset[flat + 1] - self._offset[flat]
        at = spans(self._offset[flat], lengths)
        keys = np.repeat(np.tile(np.arange(n), 2), lengths) * self._vocabulary + self._ids[at]
        order = np.argsort(keys, kind="stable")
        keys, depths = keys[order], self._depth[at][order]
        which = np.repeat(np.repeat(np.arange(2), n), lengths)[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        both = np.diff(first, append=len(keys)) == 2
        other = depths[np.minimum(first + 1, len(keys) - 1)]
        mean = np.where(both, depths[first] + other >> 1, depths[first])
        keys, context = keys[first], np.where(both, 2, which[first]) * DEPTHS + _depth_class(mean)
        row, ids = np.divmod(keys, self._vocabulary)
        kept = None
        if write is not None:
            kept = np.isin(keys, write.row * self._vocabulary + write.ids, assume_unique=True).astype(np.int64)
        rates = np.minimum(self._ranks.rate[ids], RATES - 1)
        yes = self._coder.symbols(self._flag_model, context * RATES + rates, kept) == 1
        return row[yes], ids[yes], context[yes], np.sort(row << 32 | self._ranks.rank[ids])

    def _tail(self, widest: Int64, write: Int64 | None) -> Int64:
        """Points [R, G]; integers wrap as int64 does where damaged data make them overflow."""
        known = np.ones((len(widest), G + 2), np.int64)
        known[:, 1] = widest
        for g in range(G):
            guess = (known[:, : g + 2] * self._weights[g, : g + 2]).sum(axis=1) >> WEIGHT_BITS
            rest = None if write is None else write[:, g] - guess
            known[:, g + 2] = guess + self._coder.signed(self._tail_model, np.full(len(widest), g), rest)
        return known[:, 2:]

    def _top(self, n: int, write: Int64 | None) -> Int64:
        first, second = (None, None) if write is None else (write >> 24, write >> 16 & 255)
        first = self._coder.symbols(self._top_model, np.zeros(n, np.int64), first)
        second = self._coder.symbols(self._top_model, 1 + first, second)
        return first << 24 | second << 16 | self._coder.bits(np.full(n, 16), write)

    def _remember(self, batch: Entries) -> None:
        self._ids, self._depth = np.concatenate([self._ids, batch.ids]), np.concatenate([self._depth, batch.depth])
        self._widest = np.concatenate([self._widest, batch.widest])
        self._offset = np.concatenate([self._offset, self._offset[-1] + np.cumsum(batch.counts)])
        self._coder.learn()
        self._ranks.learn(batch.ids, len(self._widest))


def _depth_class(depths: Int64) -> Int64:
    """0, 1, 2, 3, 4–5, 6–7, 8–11, …: two classes a doubling, the last one open."""
    length = np.frexp(depths.astype(np.float64))[1].astype(np.int64)
    upper = 2 * (length - 1) + (depths >> np.maximum(length - 2, 0) & 1)
    found: Int64 = np.minimum(np.where(depths < 2, depths, upper), DEPTHS - 1)
    return found


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"packed data holds {what}")
