"""The `topk` codec: ids by rank, gaps to the top logit in fixed steps of a nat, the tail as a curve.

Enters: a `TopK` of R positions. Leaves: plain Arrow columns, and back. Costs: one pass each way; decoding is one
multiply-subtract per kept id.

    topk_ids    int32            by falling logit, so that the first K' of each row are the top K'
    topk_gap    int16 or float32 code = round((top_logit − logit) / gap_step); float32 holds the gap in nats
    top_logit   float32          one a position
    tail_code   int32            ten a position, see codecs/tail.py
    topk_count  int32            one a position: how many ids it keeps; only with a nucleus

    logit = top_logit − topk_gap · gap_step

Error: |logit − exact| ≤ gap_step / 2. Because kept logits and tail are stored each for itself and Z is their sum,
probabilities add up to 1 whatever was rounded, and no tail can come out negative.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillroom.storage.codecs.columns import Counts, element, flat, flat_list, lists, require_lengths
from stillroom.storage.codecs.tail import decode_tail, encode_tail
from stillroom.storage.records import BETAS, Float32, Int32, TopK, TopKSpec


@dataclass(frozen=True)
class TopKCodec:
    """Encodes blocks of one spec over a vocabulary of `vocabulary` real ids. Raises ValueError if k does not fit it."""

    spec: TopKSpec
    vocabulary: int

    def __post_init__(self) -> None:
        if not 1 <= self.spec.k < self.vocabulary:
            raise ValueError(f"k={self.spec.k} of a vocabulary of {self.vocabulary}, k is 1 … {self.vocabulary - 1}")

    def fields(self) -> list[pa.Field]:
        gap = pa.float32() if self.spec.gap_step is None else pa.int16()
        columns = [
            flat_list("topk_ids", pa.int32()),
            flat_list("topk_gap", gap),
            flat_list("top_logit", pa.float32()),
            flat_list("tail_code", pa.int32()),
        ]
        return columns + ([flat_list("topk_count", pa.int32())] if self.spec.nucleus else [])

    def encodings(self) -> dict[str, str]:
        """Every column is split into byte planes: zstd then sees the nearly constant high bytes as runs."""
        return {element(field.name): "BYTE_STREAM_SPLIT" for field in self.fields()}

    def encode(self, block: TopK, rows: Counts) -> list[pa.Array]:
        """See `Codec`. A short row, an id outside the vocabulary or repeated, a logit that is not finite or out of
        order would be read back as truth for years, so each is checked here, once."""
        check_topk(block, self.spec, self.vocabulary)
        top = np.ascontiguousarray(block.logits[:, 0])
        gaps = gap_codes(block, self.spec.gap_step)
        tail = encode_tail(block.tail_lse, top, self.vocabulary - block.kept)
        kept: Any = rows * self.spec.k
        ids, flat_gaps = block.ids.ravel(), gaps.ravel()
        if block.counts is not None:
            used = np.arange(block.ids.shape[1]) < block.counts[:, None]
            ids, flat_gaps = block.ids[used], gaps[used]
            kept = sums_by_sequence(block.counts, rows)
        values = [(ids, kept), (flat_gaps, kept), (top, rows), (tail.ravel(), rows * len(BETAS))]
        if block.counts is not None:
            values.append((block.counts, rows))
        return [
            lists(column, lengths, field.type.value_type)
            for (column, lengths), field in zip(values, self.fields(), strict=True)
        ]

    def decode(self, columns: Mapping[str, pa.Array], rows: Counts) -> TopK:
        """The block, in arrays of its own that `torch.from_numpy` takes as they are."""
        flats = {field.name: flat(columns[field.name]) for field in self.fields()}
        total, k = int(rows.sum()), self.spec.k
        require_lengths("top_logit", flats["top_logit"][1], rows)
        require_lengths("tail_code", flats["tail_code"][1], rows * len(BETAS))
        top, counts = flats["top_logit"][0], None
        if self.spec.nucleus:
            require_lengths("topk_count", flats["topk_count"][1], rows)
            counts = flats["topk_count"][0]
            if total and not (counts.min() >= 1 and counts.max() <= k):
                raise ValueError(f"column topk_count holds {counts.min()} … {counts.max()}, expected 1 … {k}")
        kept = rows * k if counts is None else sums_by_sequence(counts, rows)
        require_lengths("topk_ids", flats["topk_ids"][1], kept)
        require_lengths("topk_gap", flats["topk_gap"][1], kept)
        ids, gaps = flats["topk_ids"][0], flats["topk_gap"][0]
        tail_size = self.vocabulary - (k if counts is None else counts)
        tail = decode_tail(flats["tail_code"][0].reshape(total, len(BETAS)), top, tail_size)
        if counts is None:
            # Arrow's memory is not to be written to, and torch wants arrays that may be: 2 % of decoding.
            ids_RK = ids.reshape(total, k).copy()
            return TopK(ids_RK, logits_of(gaps.reshape(total, k), top, self.spec.gap_step), tail)
        width = int(counts.max(initial=1))
        used = np.arange(width) < counts[:, None]
        ids_RK = np.full((total, width), -1, np.int32)
        ids_RK[used] = ids
        gaps_RK = np.zeros((total, width), gaps.dtype)
        gaps_RK[used] = gaps
        logits = logits_of(gaps_RK, top, self.spec.gap_step)
        logits[~used] = -np.inf
        return TopK(ids_RK, logits, tail, counts)


def logits_of(gaps_RK: NDArray[Any], top_logit_R: Float32, gap_step: float | None) -> Float32:
    """top_logit − gap · gap_step, float32 [R, K]."""
    step = -np.float32(1.0 if gap_step is None else gap_step)
    logits: Float32 = np.multiply(gaps_RK, step, dtype=np.float32)
    logits += top_logit_R[:, None]
    return logits


def gap_codes(block: TopK, gap_step: float | None) -> NDArray[np.int16] | Float32:
    """Gaps to the top logit [R, K], as codes or in nats; 0 in the unused slots of a nucleus.

    Raises ValueError naming the row where one does not fit its type.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, and refused
        gaps: Float32 = block.logits[:, :1] - block.logits
        if block.counts is not None:
            gaps[np.arange(gaps.shape[1]) >= block.counts[:, None]] = 0
        codes: Float32 = gaps if gap_step is None else np.rint(gaps / np.float32(gap_step))
    largest = float(np.finfo(np.float32).max) if gap_step is None else np.iinfo(np.int16).max
    if codes.max(initial=0) > largest:
        row = int(np.argmax(codes.max(axis=1)))
        gap = float(gaps[row].max())
        remedy = f"a gap_step above {gap / 32767:g} holds it" if np.isfinite(gap) else "no gap_step holds it"
        raise ValueError(f"row {row}: a kept logit lies {gap:g} nats below the top one; {remedy}")
    return codes if gap_step is None else codes.astype(np.int16)


def sums_by_sequence(counts: Int32, rows: Counts) -> Counts:
    """int64 [sequences]: the sum of `counts` over each sequence's positions."""
    ends = np.cumsum(rows)
    sums = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return np.asarray(sums[ends] - sums[ends - rows])


def check_topk(block: TopK, spec: TopKSpec, vocabulary: int) -> None:
    """Raises ValueError naming the row that is not distinct ids of the vocabulary by falling finite logit."""
    width = spec.k if spec.nucleus is None else block.ids.shape[1]
    expected = (len(block), width)
    if block.ids.shape != expected or block.logits.shape != expected or not 1 <= width <= spec.k:
        raise ValueError(f"ids {block.ids.shape} and logits {block.logits.shape}, expected both {(len(block), spec.k)}")
    if block.ids.dtype != np.int32 or block.logits.dtype != np.float32:
        raise ValueError(f"ids {block.ids.dtype} and logits {block.logits.dtype}, expected int32 and float32")
    if block.tail_lse.shape != (len(block), len(BETAS)):
        raise ValueError(f"tail_lse {block.tail_lse.shape}, expected {(len(block), len(BETAS))}")
    if (block.counts is None) != (spec.nucleus is None):
        raise ValueError("a nucleus needs counts, and only a nucleus has them")
    ids, logits = block.ids, block.logits
    if block.counts is not None:
        if block.counts.dtype != np.int32 or block.counts.shape != (len(block),):
            raise ValueError(f"counts {block.counts.dtype} {block.counts.shape}, expected int32 {(len(block),)}")
        if not (np.all(block.counts >= 1) and np.all(block.counts <= width)):
            raise ValueError(f"counts outside 1 … {width}")
        unused = np.arange(width) >= block.counts[:, None]
        # Unused slots take part below as distinct ids beyond the vocabulary and as the row's last logit.
        ids = np.where(unused, vocabulary + np.arange(width, dtype=np.int32), ids)
        last = np.take_along_axis(logits, block.counts[:, None].astype(np.int64) - 1, axis=1)
        logits = np.where(unused, last, logits)
        outside = ((ids >= vocabulary) & ~unused).any(axis=1)
    else:
        outside = (ids >= vocabulary).any(axis=1)
    bad = ~np.isfinite(logits).all(axis=1)
    bad |= (logits[:, 1:] > logits[:, :-1]).any(axis=1)
    bad |= (ids < 0).any(axis=1) | outside
    ordered = np.sort(ids, axis=1)
    bad |= (np.diff(ordered, axis=1) == 0).any(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"row {row} is not {width} distinct ids below {vocabulary} by falling finite logit")


def first_k(block: TopK, k: int) -> TopK:
    """The top k of a block that keeps more: what is cut off joins the tail. Exact up to float32's rounding."""
    if block.ids.shape[1] <= k:
        return block
    counts = None if block.counts is None else np.minimum(block.counts, k)
    cut = TopK(block.ids[:, :k], block.logits[:, :k], _with_cut(block, np.full(len(block), k)), counts)
    return TopK(np.ascontiguousarray(cut.ids), np.ascontiguousarray(cut.logits), cut.tail_lse, counts)


def nucleus(block: TopK, mass: float, temperature: float, tail_lse_at_T: Float32) -> TopK:
    """Of each row, the fewest first ids that hold `mass` at this temperature (all that are there if none do).

    tail_lse_at_T: float32 [R], the block's tail log-partition at 1/temperature.
    """
    scaled = block.logits.astype(np.float64) / temperature
    total = np.logaddexp(np.logaddexp.reduce(scaled, axis=1), tail_lse_at_T)
    held = np.cumsum(np.exp(scaled - total[:, None]), axis=1)
    counts = np.minimum(1 + (held < mass).sum(axis=1), block.kept).astype(np.int32)
    width = int(counts.max(initial=1))
    unused = np.arange(width) >= counts[:, None]
    ids, logits = block.ids[:, :width].copy(), block.logits[:, :width].copy()
    ids[unused], logits[unused] = -1, -np.inf
    return TopK(ids, logits, _with_cut(block, counts), counts)


def _with_cut(block: TopK, keep: NDArray[Any]) -> Float32:
    """The tail's log-partition when only the first `keep` ids of each row stay: the others join it.

    BETAS are multiples of the first, so one exponential per id and its powers do; relative to the largest logit that
    is cut, so that no sum vanishes.
    """
    first = int(keep.min(initial=block.ids.shape[1]))
    gone = np.arange(first, block.ids.shape[1]) >= keep[:, None]
    logits = np.where(gone, block.logits[:, first:], -np.inf).astype(np.float64)
    top = logits.max(axis=1, initial=-np.inf)
    shift = np.where(np.isfinite(top), top, 0.0)
    base = np.exp(BETAS[0] * (logits - shift[:, None]))
    power = np.ones_like(base)
    tail = block.tail_lse.astype(np.float64)
    with np.errstate(divide="ignore"):  # nothing may be cut from a row: log 0
        for g, beta in enumerate(BETAS):
            power *= base
            tail[:, g] = np.logaddexp(tail[:, g], np.log(power.sum(axis=1)) + beta * shift)
    return tail.astype(np.float32)
