"""Whether a teacher may be kept at all: a sequence must get the same logits alone as in a batch.

Enters: a teacher and the sequences of one unit. Leaves: how far apart the two are, or BatchDependent. Costs: one
batch of the unit, and two of its sequences alone.

Rows are scored in isolation, so a batch's other sequences may move them by rounding only. A model that reads its
padding, pools statistics over the batch or gives experts a capacity moves them by what its neighbours say, and its
cache would be of no distribution at all.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from stillroom.storage.errors import BatchDependent
from stillroom.storage.fidelity.measure import TEMPERATURES, NoiseBand, noise
from stillroom.storage.records import Sequence, SignalSpec
from stillroom.workers.teacher import Teacher

#: Largest mean KL in nats that rounding explains. Measured: float32 3e-7, bfloat16 1e-4 (5e-3 at the worst position);
#: a model that reads its padding has 0.1 and more.
MOST_KL = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}

#: Of a sequence, its last ones: what leaks adds up along it.
POSITIONS = 8


@dataclass(frozen=True)
class BatchDependence:
    """positions: compared, 0 where no batch of the unit holds two sequences. KL at T = 1, in nats. band: all that was
    compared, None where nothing was."""

    positions: int
    kl_mean_nats: float = 0.0
    kl_worst_nats: float = 0.0
    band: NoiseBand | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "band": self.band.as_dict() if self.band else None}


def require_batch_free(
    teacher: Teacher, sequences: Seq[Sequence], *, signal: SignalSpec, dtype: str
) -> BatchDependence:
    """Score one batch of a unit, and its shortest and its longest sequence alone.

    dtype: of the forward pass, a key of `MOST_KL`.
    Raises BatchDependent where they differ by more than rounding, BadLogits.
    """
    group = next((group for group in teacher.batches(sequences) if len(group) > 1), None)
    if group is None:
        return BatchDependence(0)
    batch = sorted((sequences[i] for i in group), key=lambda s: (len(s.input_ids), s.digest))
    probed = {s.digest: s for s in (batch[0], batch[-1])}
    positions = {
        digest: range(max(s.first_position, len(s.input_ids) - POSITIONS), len(s.input_ids))
        for digest, s in probed.items()
    }
    together = teacher.score_with_truth(batch, signal=signal, positions=positions).truth
    pairs = []
    for digest, sequence in probed.items():
        alone = teacher.score_with_truth([sequence], signal=signal, positions={digest: positions[digest]}).truth
        pairs.append((together[digest], alone[digest], [(digest, t) for t in positions[digest]]))
    band = noise(pairs, vocabulary=teacher.vocabulary, temperatures=TEMPERATURES)
    row = band.rows[0]
    found = BatchDependence(band.positions, row.kl_nats, row.kl_worst_nats, band)
    if not found.kl_mean_nats <= MOST_KL[dtype]:
        raise BatchDependent(
            f"the teacher depends on its batch: sequences {' and '.join(probed)} get other logits alone than among "
            f"{len(batch)}, KL {found.kl_mean_nats:.2g} nats in the mean of {found.positions} positions, expected at "
            f"most {MOST_KL[dtype]:g} in {dtype}; nothing was scored. Try teacher.attention eager, or "
            "teacher.batch_tokens 1, which scores every sequence alone"
        )
    return found
