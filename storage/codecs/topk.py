"""The `topk` codec: ids by rank, gaps to the top logit in fixed steps of a nat, the tail as a curve.

Enters: a `TopK` of R positions. Leaves: four flat numpy columns, and back. Costs: one pass each way; decoding is
one multiply-subtract per kept id.

    topk_ids   int32 [R·K]           by falling logit, so that the first K' of each row are the top K'
    topk_gap   int16 or float32 [R·K]  code = round((top_logit − logit) / gap_step); float32 holds the gap in nats
    top_logit  float32 [R]
    tail_code  int32 [R·G]           see codecs/tail.py

    logit = top_logit − topk_gap · gap_step

Error: |logit − exact| ≤ gap_step / 2. Because kept logits and tail are stored each for itself and Z is their sum,
probabilities add up to 1 whatever was rounded, and no tail can come out negative.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.codecs.tail import decode_tail, encode_tail
from stillroom.storage.records import BETAS, Float32, Int32, SignalSpec, TopK


@dataclass(frozen=True)
class TopKColumns:
    """A block as it lies in the file: flat, one reshape from [R, K] and [R, G]."""

    topk_ids: Int32
    topk_gap: NDArray[np.int16] | Float32
    top_logit: Float32
    tail_code: Int32


@dataclass(frozen=True)
class TopKCodec:
    """Encodes blocks of one signal over a vocabulary of `vocabulary` real ids."""

    signal: SignalSpec
    vocabulary: int

    def __post_init__(self) -> None:
        if not 1 <= self.signal.k < self.vocabulary:
            raise ValueError(f"k={self.signal.k} of a vocabulary of {self.vocabulary}, k is 1 … {self.vocabulary - 1}")

    @property
    def tail_size(self) -> int:
        return self.vocabulary - self.signal.k

    def encode(self, block: TopK) -> TopKColumns:
        """Columns of a block. Raises ValueError where the block breaks the contract, naming the row.

        A short row, an id outside the vocabulary or repeated, a logit that is not finite or out of order
        would be read back as truth for years, so each is checked here, once.
        """
        self._check(block)
        top = np.ascontiguousarray(block.logits[:, 0])
        gaps = self._gaps(block, top)
        tail = encode_tail(block.tail_lse, top, self.tail_size)
        return TopKColumns(block.ids.ravel(), gaps.ravel(), top, tail.ravel())

    def decode(self, columns: TopKColumns) -> TopK:
        """The block, with ids a view of the column and logits float32 [R, K]."""
        rows = len(columns.top_logit)
        gaps = columns.topk_gap.reshape(rows, self.signal.k)
        step = np.float32(1.0 if self.signal.gap_step is None else self.signal.gap_step)
        logits = np.multiply(gaps, -step, dtype=np.float32)
        logits += columns.top_logit[:, None]
        tail = decode_tail(columns.tail_code.reshape(rows, len(BETAS)), columns.top_logit, self.tail_size)
        return TopK(columns.topk_ids.reshape(rows, self.signal.k), logits, tail)

    def _gaps(self, block: TopK, top_R: Float32) -> NDArray[np.int16] | Float32:
        """Gap codes [R, K]. Raises ValueError where one does not fit its type, naming the row."""
        step = self.signal.gap_step
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused
            gaps = top_R[:, None] - block.logits
            codes = gaps if step is None else np.rint(gaps / np.float32(step))
        largest = float(np.finfo(np.float32).max) if step is None else np.iinfo(np.int16).max
        if codes.max(initial=0) > largest:
            row = int(np.argmax(codes.max(axis=1)))
            gap = float(gaps[row].max())
            remedy = f"a gap_step above {gap / 32767:g} holds it" if np.isfinite(gap) else "no gap_step holds it"
            raise ValueError(f"row {row}: a kept logit lies {gap:g} nats below the top one; {remedy}")
        return codes if step is None else codes.astype(np.int16)

    def _check(self, block: TopK) -> None:
        expected = (len(block), self.signal.k)
        if block.ids.shape != expected or block.logits.shape != expected:
            raise ValueError(f"ids {block.ids.shape} and logits {block.logits.shape}, expected both {expected}")
        if block.ids.dtype != np.int32 or block.logits.dtype != np.float32:
            raise ValueError(f"ids {block.ids.dtype} and logits {block.logits.dtype}, expected int32 and float32")
        if block.tail_lse.shape != (len(block), len(BETAS)):
            raise ValueError(f"tail_lse {block.tail_lse.shape}, expected {(len(block), len(BETAS))}")
        bad = ~np.isfinite(block.logits).all(axis=1)
        bad |= (block.logits[:, 1:] > block.logits[:, :-1]).any(axis=1)
        bad |= (block.ids < 0).any(axis=1) | (block.ids >= self.vocabulary).any(axis=1)
        ordered = np.sort(block.ids, axis=1)
        bad |= (np.diff(ordered, axis=1) == 0).any(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(
                f"row {row} is not {self.signal.k} distinct ids below {self.vocabulary} by falling finite logit"
            )
