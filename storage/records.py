"""The words of the contract as types. Everything that crosses a room's border is one of these.

Enters: numpy arrays. Leaves: frozen records. Costs: nothing is copied, one hash per sequence.

Shape suffixes: T tokens of a sequence, R signal rows of it, K kept ids, V vocabulary, G grid points of
β = 1/temperature, M trained positions of a pack.
"""

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

#: β = 1/T at which the tail's log-partition is kept; β = 0 is log(V − K) and costs nothing. Ten points give
#: 2e-4 nats worst error after cubic interpolation over T in 1..10, six points 2.7e-3 (real teacher, k = 64).
BETAS: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def digest128(*parts: bytes) -> str:
    """32 hex digits of BLAKE2b over the parts, each framed by its length so that parts cannot run together."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.hexdigest()


@dataclass(frozen=True, eq=False)
class Sequence:
    """The token ids that the teacher sees at once, and from where on its signal is kept.

    input_ids: int32 [T], T ≥ 1.
    context: leading tokens that repeat the end of the previous window of the same document. They are
        there to be read, not learned: the previous window's rows already cover them.
    """

    input_ids: Int32
    context: int = 0

    @property
    def first_position(self) -> int:
        """First position whose signal is kept: row `context − 1` predicts the first new token."""
        return max(self.context - 1, 0)

    @property
    def rows(self) -> int:
        """R, the number of signal rows: positions first_position … T − 1."""
        return len(self.input_ids) - self.first_position

    @cached_property
    def digest(self) -> str:
        """The sequence's address: a function of its ids and its context alone, 32 hex digits."""
        ids = np.ascontiguousarray(self.input_ids, dtype="<i4")
        return digest128(b"stillroom.sequence.1", self.context.to_bytes(4, "little"), ids.tobytes())


@dataclass(frozen=True)
class TopK:
    """What the teacher says at R positions: the K largest logits, and the rest of the vocabulary as one curve.

    ids: int32 [R, K], by falling logit.
    logits: float32 [R, K], raw logits in nats as the model returns them.
    tail_lse: float32 [R, G], log Σ_{i not kept} exp(β z_i) at β = BETAS.
    """

    ids: Int32
    logits: Float32
    tail_lse: Float32

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> "TopK":
        return TopK(self.ids[rows], self.logits[rows], self.tail_lse[rows])

    @staticmethod
    def concatenate(blocks: Seq["TopK"]) -> "TopK":
        return TopK(
            np.concatenate([b.ids for b in blocks]),
            np.concatenate([b.logits for b in blocks]),
            np.concatenate([b.tail_lse for b in blocks]),
        )


@dataclass(frozen=True)
class SignalSpec:
    """What is kept per position, and how finely. Part of the identity.

    k: kept ids, 1 ≤ k < V.
    gap_step: the gaps to the top logit are rounded to multiples of this many nats; None keeps them float32.
        Adds KL 6.5e-5 nats at 1/16, 2.6e-4 at 1/8, 1.0e-3 at 1/4 for 158, 148, 142 bytes a token all told
        (T = 1, k = 64, measured; ten to a hundred times less at T = 2 and 4).
    """

    k: int
    gap_step: float | None = 1 / 8

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Unit:
    """A batch of sequences: the unit of work, of retry and of commit.

    sequences: their digests, in the order of the shard's rows.
    tokens, contexts: T and context of each.
    """

    sequences: tuple[str, ...]
    tokens: tuple[int, ...]
    contexts: tuple[int, ...]

    @cached_property
    def id(self) -> str:
        """A function of the sequences alone: planned twice, it is the same unit."""
        return digest128(b"stillroom.unit.1", *(s.encode() for s in self.sequences))

    @property
    def rows(self) -> tuple[int, ...]:
        """R of each sequence."""
        return tuple(t - max(c - 1, 0) for t, c in zip(self.tokens, self.contexts, strict=True))


@dataclass(frozen=True)
class ShardRef:
    """A committed shard, as the log and a pinned snapshot name it. The digest is in the file's name."""

    unit: str
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Receipt:
    """What an actor returns for a unit: where its shard lies and what it took. No signal travels in it."""

    shard: ShardRef
    sequences: int
    tokens: int
    rows: int
    batches: int
    seconds: float


@dataclass(frozen=True)
class Pack:
    """Sequences laid end to end in one window of T tokens, with the positions that train.

    A position t trains if the token it predicts does: its successor lies in the same sequence, the loss
    mask has it, and t ≥ first_position. Only those M positions carry labels and signal.

    input_ids: int32 [T]; position_ids: int32 [T], from 0 in every sequence; segment_ids: int32 [T], 0, 1, …
        and −1 on padding. Padding is one segment of its own with its own positions from 0.
    positions: int64 [M] into the window; labels: int32 [M], the next token; weights: float32 [M].
    topk: the teacher at those M positions, or None for a corpus without signal.
    sequences: digests of the sequences in it, for messages.
    index: the pack's number in the epoch over all ranks; epoch: from 0.
    """

    input_ids: Int32
    position_ids: Int32
    segment_ids: Int32
    positions: NDArray[np.int64]
    labels: Int32
    weights: Float32
    topk: TopK | None
    sequences: tuple[str, ...]
    epoch: int
    index: int
