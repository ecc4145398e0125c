"""The text that the page shows token by token, and what the teacher says at each token.

Enters: a store, and the corpus manifest of a run. Leaves: documents with their rows. Costs: the shards that hold them,
decoded once; nothing else of the store.

A token is shown with the prediction made for it: row t of a sequence is about token t + 1. A document is its windows
end to end, without the tokens that a window repeats of the one before. The first token has no prediction.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.pipeline.report.store_data import full_rows
from stillroom.pipeline.report.teacher import TeacherRows, of_draws, of_full, of_topk
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Int32, Sequence, Signal
from stillroom.storage.store import Store

#: Documents to choose among.
DOCUMENTS = 20

#: Rows rebuilt from hidden states at once.
_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Window:
    """A sequence that the page shows the rows start … stop − 1 of: those that predict tokens start + 1 … stop.

    sequence: as the teacher read it. teacher: those rows.
    """

    sequence: Sequence
    start: int
    stop: int
    teacher: TeacherRows


@dataclass(frozen=True, eq=False)
class Document:
    """title: where it was read. tokens: of the whole document; what is shown may be less. heldout: None of a store,
    which does not know."""

    title: str
    windows: tuple[Window, ...]
    tokens: int
    heldout: bool | None

    @property
    def ids(self) -> Int32:
        """The tokens shown, the first of which has no row if the document begins there."""
        return np.concatenate([_shown(window) for window in self.windows])


def _shown(window: Window) -> Int32:
    first = 0 if window.start == 0 else window.start + 1
    return np.asarray(window.sequence.input_ids[first : window.stop + 1], np.int32)


def of_run(manifest: Manifest, store: Store, *, tokens: int, documents: int = DOCUMENTS) -> list[Document]:
    """Held-out documents, evenly over the corpus, or training ones where none is held out; `tokens` in all at most."""
    index = manifest.index()
    split = index.heldout if index.heldout.any() else ~index.heldout
    chosen = _spread(np.unique(index.documents[split]), documents)
    limit = tokens // max(len(chosen), 1)
    wanted: list[tuple[str, list[tuple[Sequence, int, int]], int]] = []
    for number in chosen:
        rows = manifest.rows(np.flatnonzero(index.documents == number))
        rows = sorted(rows, key=lambda row: row.window)
        spans = list(_spans([row.sequence for row in rows], limit))
        total = sum(len(row.sequence.input_ids) - row.sequence.context for row in rows)
        wanted.append((f"{rows[0].source}, line {rows[0].line}", spans, total))
    signals = _signals(store, {s.digest for _, spans, _ in wanted for s, _, _ in spans})
    teach = _Teach(store)
    heldout = bool(index.heldout.any())
    found = []
    for title, spans, total in wanted:
        there = [span for span in spans if span[0].digest in signals]
        if there:
            windows = tuple(Window(s, a, b, teach(signals[s.digest], s, a, b)) for s, a, b in there)
            found.append(Document(title, windows, total, heldout))
    return found


def of_store(store: Store, *, tokens: int, documents: int = DOCUMENTS) -> list[Document]:
    """Sequences of the store's first units by id: a store does not know which were documents."""
    limit, teach, found = tokens // documents, _Teach(store), []
    for _, ref in sorted(store.committed().items()):
        for stored in store.reader(ref):
            s = stored.sequence
            if stored.signal is None or s.rows < 2:
                continue
            a, b = s.first_position, min(len(s.input_ids) - 1, s.first_position + limit)
            window = Window(s, a, b, teach(stored.signal, s, a, b))
            found.append(Document(f"sequence {s.digest[:12]}", (window,), len(s.input_ids), None))
            if len(found) == documents:
                return found
    return found


def _spread(numbers: NDArray[np.int64], count: int) -> list[int]:
    """At most `count` of them, evenly."""
    if len(numbers) <= count:
        return [int(n) for n in numbers]
    return [int(numbers[i]) for i in np.linspace(0, len(numbers) - 1, count).round().astype(int)]


def _spans(sequences: list[Sequence], limit: int) -> Iterator[tuple[Sequence, int, int]]:
    """Rows of each window that predict tokens not seen before, `limit` in all at most."""
    left = limit
    for sequence in sequences:
        start, stop = sequence.first_position, len(sequence.input_ids) - 1
        stop = min(stop, start + left)
        if stop <= start:
            continue
        yield sequence, start, stop
        left -= stop - start
        if left <= 0:
            return


def _signals(store: Store, digests: set[str]) -> dict[str, Signal]:
    """Signals of these sequences, as far as they are committed."""
    found: dict[str, Signal] = {}
    refs = store.committed()
    for unit in store.planned():
        if unit.id not in refs or not digests.intersection(unit.sequences):
            continue
        for stored in store.reader(refs[unit.id]):
            if stored.sequence.digest in digests and stored.signal is not None:
                found[stored.sequence.digest] = stored.signal
    return found


class _Teach:
    """Rows start … stop − 1 of a sequence's signal, as the page shows them."""

    def __init__(self, store: Store) -> None:
        self._spec, self._vocabulary = store.identity.signal, store.identity.vocabulary
        self._rebuild: Any = None
        if self._spec.topk is None and self._spec.hidden is not None:
            self._rebuild = full_rows(store)

    def __call__(self, signal: Signal, sequence: Sequence, start: int, stop: int) -> TeacherRows:
        first = sequence.first_position
        rows = signal[start - first : stop - first]
        if rows.topk is not None:
            return of_topk(rows.topk, self._vocabulary)
        if rows.hidden is not None:
            blocks = [rows[at : at + _BLOCK] for at in range(0, len(rows), _BLOCK)]
            return TeacherRows.concatenate([of_full(self._rebuild(block)) for block in blocks])
        if rows.sampled is not None:
            return of_draws(rows.sampled)
        nothing = np.zeros((len(rows), 0))
        return TeacherRows(
            nothing.astype(np.int32), nothing.astype(np.float32), np.zeros(len(rows), np.float32), np.zeros(len(rows))
        )
