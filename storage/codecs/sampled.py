"""The `sampled` codec: the distinct ids of N draws, and how often each was drawn.

Enters: a `Sampled` of R positions. Leaves: plain Arrow columns, and back. Costs: one pass each way.

    sampled_ids    int32   distinct ids of a position, rising
    sampled_draws  int16   how many of the N draws fell on each
    sampled_count  int16   one a position: how many distinct ids it has

    p = sampled_draws / N

Error: none is added; what was drawn is what is read. p is unbiased at T = 1, and only there: p^(1/T) of a sample says
nothing of what T lifts out of the ids that were not drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom.storage.codecs.columns import Counts, element, flat, flat_list, lists, require_lengths
from stillroom.storage.codecs.topk import sums_by_sequence
from stillroom.storage.order import mix
from stillroom.storage.records import Sampled, SampledSpec

#: Counts are int16.
MOST_DRAWS = 2**15 - 1


def position_keys(digest: str, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The random bits of a sequence's positions: uint64, as many as there are positions.

        key(t) = mix(mix(mix(first 64 bits of the digest) ^ last 64 bits) ^ mix(t))

    with `mix` the finaliser of SplitMix64. A function of the sequence and the position alone, in integers: the same
    in any unit, batch, order, process or release.

    digest: `Sequence.digest`, 32 hex digits. positions: absolute ones, t in the sequence (not rows).
    """
    first, last = (np.array([int(half, 16)], dtype=np.uint64) for half in (digest[:16], digest[16:32]))
    return mix(mix(mix(first) ^ last) ^ mix(np.asarray(positions).astype(np.uint64)))


@dataclass(frozen=True)
class SampledCodec:
    """Encodes blocks of one spec over a vocabulary of `vocabulary` real ids. Raises ValueError if N has no int16."""

    spec: SampledSpec
    vocabulary: int

    def __post_init__(self) -> None:
        if not 1 <= self.spec.draws <= MOST_DRAWS:
            raise ValueError(f"draws={self.spec.draws}, expected 1 … {MOST_DRAWS:,}")

    @property
    def widest(self) -> int:
        """The most distinct ids that a position can have."""
        return min(self.spec.draws, self.vocabulary)

    def fields(self) -> list[pa.Field]:
        return [
            flat_list("sampled_ids", pa.int32()),
            flat_list("sampled_draws", pa.int16()),
            flat_list("sampled_count", pa.int16()),
        ]

    def encodings(self) -> dict[str, str]:
        """Byte planes: 34.5 bytes a position at N = 50; with plain ids 36.9, delta-packed ones 42.5."""
        return {element(field.name): "BYTE_STREAM_SPLIT" for field in self.fields()}

    def encode(self, block: Sampled, rows: Counts) -> list[pa.Array]:
        """See `Codec`. Ids that do not rise or lie outside the vocabulary, and counts that do not sum to N, would be
        another distribution than the teacher's, so they are refused here."""
        if block.ids.dtype != np.int32 or block.counts.dtype != np.int32:
            raise ValueError(f"ids {block.ids.dtype} and counts {block.counts.dtype}, expected both int32")
        if block.ids.ndim != 2 or block.counts.shape != block.ids.shape:
            raise ValueError(f"ids {block.ids.shape} and counts {block.counts.shape}, expected both [R, U]")
        used = block.counts != 0
        distinct = used.sum(axis=1)
        front = np.arange(block.ids.shape[1]) < distinct[:, None]
        stray = (used != front).any(axis=1) | ((block.ids == -1) == used).any(axis=1)
        if stray.any():
            raise ValueError(f"row {int(np.argmax(stray))}: unused slots are not the last ones, with id −1 and count 0")
        ids, draws = block.ids[used], block.counts[used]
        self._check(ids, draws, distinct)
        lengths = sums_by_sequence(distinct, rows)
        values = [(ids, lengths), (draws.astype(np.int16), lengths), (distinct.astype(np.int16), rows)]
        return [
            lists(column, length, field.type.value_type)
            for (column, length), field in zip(values, self.fields(), strict=True)
        ]

    def decode(self, columns: Mapping[str, pa.Array], rows: Counts) -> Sampled:
        """The block, U that of its widest row. Everything that `encode` asks for is asked for again."""
        flats = {field.name: flat(columns[field.name]) for field in self.fields()}
        require_lengths("sampled_count", flats["sampled_count"][1], rows)
        distinct = flats["sampled_count"][0].astype(np.int64)
        if len(distinct) and not (distinct.min() >= 1 and distinct.max() <= self.widest):
            lowest, highest = distinct.min(), distinct.max()
            raise ValueError(f"column sampled_count holds {lowest} … {highest}, expected 1 … {self.widest}")
        lengths = sums_by_sequence(distinct, rows)
        require_lengths("sampled_ids", flats["sampled_ids"][1], lengths)
        require_lengths("sampled_draws", flats["sampled_draws"][1], lengths)
        ids, draws = flats["sampled_ids"][0], flats["sampled_draws"][0]
        self._check(ids, draws, distinct)
        width = int(distinct.max(initial=1))
        used = np.arange(width) < distinct[:, None]
        ids_RU = np.full(used.shape, -1, dtype=np.int32)
        counts_RU = np.zeros(used.shape, dtype=np.int32)
        ids_RU[used], counts_RU[used] = ids, draws
        return Sampled(ids_RU, counts_RU)

    def _check(self, ids: NDArray[Any], draws: NDArray[Any], distinct: NDArray[np.int64]) -> None:
        """Raises ValueError naming the row whose ids do not rise within the vocabulary, or whose counts are not ≥ 1
        with sum N. ids, draws: of all rows, end to end; distinct: int64 [R], how many are each row's."""
        if not len(distinct):
            return
        if distinct.min() < 1:
            raise ValueError(
                f"row {int(np.argmin(distinct))} has no ids, expected counts that sum to {self.spec.draws}"
            )
        starts = np.cumsum(distinct) - distinct
        rising = np.ones(len(ids), dtype=bool)
        rising[1:] = ids[1:] > ids[:-1]
        rising[starts] = True
        good = rising & (ids >= 0) & (ids < self.vocabulary) & (draws >= 1)
        if not good.all():
            row = int(np.searchsorted(starts, int(np.argmin(good)), side="right")) - 1
            raise ValueError(f"row {row} is not rising ids below {self.vocabulary} with counts of at least 1")
        sums = np.add.reduceat(draws, starts, dtype=np.int64)
        if (sums != self.spec.draws).any():
            row = int(np.argmax(sums != self.spec.draws))
            raise ValueError(f"row {row}: counts sum to {sums[row]}, expected {self.spec.draws} draws")
