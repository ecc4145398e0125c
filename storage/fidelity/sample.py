"""Which positions of a store keep the teacher's full logits: few, fixed by content alone.

Enters: units to be scored, and what is kept already. Leaves: positions by sequence. Costs: 1.6 µs a sequence.

A bottom-k sample by hash: first of sequences, then of the rows of each, so that few sequences are scored a second time
for the noise band.
"""

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from stillroom.storage.order import digest_keys, mix
from stillroom.storage.records import Unit

#: Positions of a store, sequences that they lie in, positions of a sequence: few sequences are scored a second time.
LIMIT = 256
SEQUENCES = 32
PER_SEQUENCE = 8


def choose(
    units: Iterable[Unit], *, wanted: int = LIMIT, held: Mapping[str, Collection[int]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Positions to keep the truth of, rising, by sequence digest; all of them have rows.

    units: those still to be scored. wanted: positions of the whole store, at most 256. held: what the store keeps
    already (`read_positions`); it counts, and is not chosen again.

    A bottom-k sample by hash: first of sequences, at most 32 of a store, then of 8 rows of each. A function of the
    sequences alone, not of their order or units; a run that was stopped and goes on with the units that are left
    chooses what it would have chosen. Raises ValueError if more than 256 are wanted.
    """
    if not 0 <= wanted <= LIMIT:
        raise ValueError(f"{wanted} positions of truth wanted, a store keeps 0 … {LIMIT}")
    held = held or {}
    rows = {
        sequence: range(max(context - 1, 0), tokens)
        for unit in units
        for sequence, tokens, context in zip(unit.sequences, unit.tokens, unit.contexts, strict=True)
        if sequence not in held
    }
    room = wanted - sum(len(positions) for positions in held.values())
    chosen: dict[str, tuple[int, ...]] = {}
    for sequence in _smallest(list(rows), SEQUENCES - len(held)):
        if room <= 0:
            break
        chosen[sequence] = _positions(sequence, rows[sequence], min(PER_SEQUENCE, room))
        room -= len(chosen[sequence])
    return chosen


def _smallest(sequences: list[str], count: int) -> list[str]:
    """The `count` sequences of smallest hash, in its order. Mixed, as units hold sequences sorted by digest."""
    hashes = mix(digest_keys(sequences))
    count = min(max(count, 0), len(sequences))
    nearest = np.argpartition(hashes, count - 1)[:count] if count else np.zeros(0, np.int64)
    return [sequences[i] for i in nearest[np.argsort(hashes[nearest])]]


def _positions(sequence: str, rows: range, count: int) -> tuple[int, ...]:
    at = np.arange(rows.start, rows.stop)
    hashes = mix(mix(digest_keys([sequence])) ^ at.astype(np.uint64))
    return tuple(sorted(at[np.argsort(hashes, kind="stable")[:count]].tolist()))
