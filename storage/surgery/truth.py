"""The fidelity sample goes along when a store is transcoded: it is of the teacher, not of the codec.

Enters: sources, what is picked of them, the destination. Leaves: truth files under the destination's units and
identity. Costs: the full logits of one unit's sampled positions in memory.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np

from stillroom.storage.fidelity.sample import LIMIT, SEQUENCES
from stillroom.storage.fidelity.truth import Truth, read_positions, truth_blocks, write_truth
from stillroom.storage.order import digest_keys, mix
from stillroom.storage.records import Unit
from stillroom.storage.store import Store
from stillroom.storage.surgery.plan import Picked, Source


class TruthCarrier:
    """Which sequences' truth goes along, and the writing of it.

    A store keeps the truth of at most 32 sequences and 256 positions, those of smallest hash
    (storage/fidelity/sample.py). Of several stores that each keep the smallest of their own, the smallest of all are
    kept here, after what the destination has counted already.
    """

    def __init__(self, sources: Seq[Source], picked: Picked, store: Store) -> None:
        self.positions = 0
        self._sources, self._picked, self._store = sources, picked, store
        self._chosen = self._choose()

    def carry(self, unit: Unit) -> None:
        """Write the part of the sample that lies in this unit. Before the unit is committed, as when teaching."""
        blocks = []
        for digest in sorted(self._chosen & set(unit.sequences)):
            place = self._picked.places[digest]
            source = self._sources[place.source]
            for block in truth_blocks(source.store.files, [source.units[place.unit]], source.identity):
                blocks += list(_of_sequence(block, digest))
        if blocks:
            whole = Truth.concatenate(blocks)
            write_truth(self._store.files, unit, whole, self._store.identity)
            self.positions += len(whole)

    def _choose(self) -> frozenset[str]:
        committed = self._store.committed()
        units = {unit.id: unit for unit in self._store.planned() if unit.id in committed}
        held = read_positions(self._store.files, units.values(), self._store.identity)
        found: dict[str, int] = {}
        for number, source in enumerate(self._sources):
            truths = read_positions(source.store.files, source.units.values(), source.identity)
            for digest, positions in truths.items():
                place = self._picked.places.get(digest)
                if place is not None and place.source == number and digest not in held:
                    found[digest] = len(positions)
        digests = list(found)
        room = LIMIT - sum(len(positions) for positions in held.values())
        chosen: list[str] = []
        for row in np.argsort(mix(digest_keys(digests)), kind="stable") if digests else ():
            room -= found[digests[row]]
            if room < 0 or len(held) + len(chosen) >= SEQUENCES:
                break
            chosen.append(digests[row])
        return frozenset(chosen)


def _of_sequence(block: Truth, digest: str) -> Iterator[Truth]:
    """The rows of a block that are of one sequence, if any."""
    rows = np.array([row for row, sequence in enumerate(block.sequences) if sequence == digest], np.int64)
    if not len(rows):
        return
    second = np.isin(block.alone_rows, rows)
    yield Truth(
        (digest,) * len(rows),
        block.positions[rows],
        block.logits[rows],
        block.alone[second],
        np.searchsorted(rows, block.alone_rows[second]),
    )
