"""What every row of a signal must be, whatever wrote it; and whether rows stand where the contract has them.

Enters: decoded signals, sequence by sequence. Leaves: one line on what is wrong, or None. Costs: a few passes over the
kept values, no copy of more than one sequence.

That probabilities sum to 1 needs no check: Z is the sum of what is stored (kept logits and tail), whatever that is.
What can be wrong is the curve of the tail, and there a log-partition has little freedom. With z_k the lowest kept logit
and f(β) = log Σ_{i not kept} exp(β z_i):

    f(0) = log(V − K)        f is convex        f'(β) = E_β[z_tail] ≤ max z_tail ≤ z_k,  so f(β) ≤ β z_k + log(V − K)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.codecs.tail import STEP
from stillroom.storage.records import BETAS, Sampled, Sequence, Signal, SignalSpec, TopK, TopKSpec

#: Shifts at which the most likely id is held against the text. Row t predicts token t + 1.
SHIFTS = (-2, -1, 0, 1, 2)

#: Below this many positions the agreement of a shift is chance.
_ENOUGH_POSITIONS = 200

#: By how many standard errors another shift must agree better than +1: one of five chances is always the largest.
_STANDARD_ERRORS = 5

#: float32's relative rounding, four times.
_EPSILON = 4 * 2.0**-24


def signal_problem(signal: Signal, spec: SignalSpec, vocabulary: int) -> str | None:
    """What is wrong with the rows of one sequence, in words, or None.

    Draws need no look of their own: decoding has refused ids that do not rise or leave the vocabulary, and counts that
    do not sum to N; and scales of hidden states that are negative or no numbers.
    """
    if signal.topk is not None and spec.topk is not None:
        problem = topk_problem(signal.topk, spec.topk, vocabulary)
        if problem:
            return problem
    if signal.hidden is not None and not np.isfinite(signal.hidden).all():
        return "hidden states are not finite"
    return None


def topk_problem(topk: TopK, spec: TopKSpec, vocabulary: int) -> str | None:
    """NaN and −inf, order, range and distinctness of ids, and the tail's curve. Slots beyond a row's count are left
    out of it."""
    used = np.arange(topk.ids.shape[1]) < topk.kept[:, None]
    last = np.take_along_axis(topk.logits, topk.kept[:, None].astype(np.int64) - 1, axis=1)
    logits = np.where(used, topk.logits, last)
    if not (np.isfinite(logits).all() and np.isfinite(topk.tail_lse).all()):
        return "logits or tail are not finite"
    if (np.diff(logits, axis=1) > 0).any():
        return "logits do not fall with rank"
    if ((topk.ids < 0) & used).any() or ((topk.ids >= vocabulary) & used).any():
        return f"an id lies outside 0 … {vocabulary - 1}"
    # Unused slots take part as distinct ids beyond the vocabulary.
    ids = np.where(used, topk.ids, vocabulary + np.arange(topk.ids.shape[1]))
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        return "an id stands twice at one position"
    return _tail_problem(topk, last[:, 0].astype(np.float64), spec.gap_step or 0.0, vocabulary)


def _tail_problem(topk: TopK, lowest_R: NDArray[np.float64], gap_step: float, vocabulary: int) -> str | None:
    at_zero_R = np.log(vocabulary - topk.kept.astype(np.float64))
    curve_RG = np.column_stack([at_zero_R, topk.tail_lse.astype(np.float64)])
    # Each point is rounded to STEP / 2, and in float32 before that; a second difference sums four roundings.
    rounding = STEP / 2 + _EPSILON * float(np.abs(curve_RG).max(initial=0))
    if (np.diff(curve_RG, n=2, axis=1) < -5 * 4 * rounding).any():
        return "the tail's log-partition is not convex in β"
    # A whole step: what was transcoded has been rounded to half of a finer one before.
    bound_RG = np.outer(lowest_R + gap_step, BETAS) + at_zero_R[:, None] + 5 * rounding
    if (topk.tail_lse > bound_RG).any():
        return "the tail holds more than V − K ids below the lowest kept logit can"
    return None


class Agreement:
    """Counts how often the most likely id of row t is the token at t + shift, over a whole store."""

    def __init__(self) -> None:
        self._hits = np.zeros(len(SHIFTS), dtype=np.int64)
        self._seen = np.zeros(len(SHIFTS), dtype=np.int64)

    def add(self, sequence: Sequence, signal: Signal) -> None:
        """By the largest logit; without logits by the id drawn most often. Hidden states alone say nothing."""
        if signal.topk is not None:
            best_R, sure_R = signal.topk.ids[:, 0], np.ones(len(signal), bool)
        elif signal.sampled is not None:
            best_R, sure_R = _most_drawn(signal.sampled)
        else:
            return
        rows = np.arange(sequence.first_position, len(sequence.input_ids))
        for i, shift in enumerate(SHIFTS):
            at = rows + shift
            inside = (at >= 0) & (at < len(sequence.input_ids)) & sure_R
            self._hits[i] += int((best_R[inside] == sequence.input_ids[at[inside]]).sum())
            self._seen[i] += int(inside.sum())

    def shares(self) -> dict[str, float] | None:
        """Agreement by shift, 0 … 1; None where nothing could be compared: an empty store, or hidden states alone."""
        if not self._seen.any():
            return None
        shares = self._hits / np.maximum(self._seen, 1)
        return {f"{shift:+d}": round(float(share), 4) for shift, share in zip(SHIFTS, shares, strict=True)}

    def problem(self) -> str | None:
        """What a peak elsewhere than at +1 means, or None where there is none that is more than chance."""
        if self._seen.min() < _ENOUGH_POSITIONS:
            return None
        shares = self._hits / self._seen
        best, following = int(np.argmax(shares)), SHIFTS.index(1)
        spread = np.sqrt(((shares * (1 - shares)) / self._seen)[[best, following]].sum())
        if shares[best] - shares[following] <= _STANDARD_ERRORS * spread:
            return None
        shift = SHIFTS[best]
        meaning = (
            "students would learn to repeat their input, unless it is the teacher that does so: an untrained one with "
            "tied embeddings copies what it reads"
            if shift == 0
            else f"students would learn to say the token at {shift:+d}"
        )
        return (
            f"rows look shifted: top-1 agrees with the token at {shift:+d} ({shares[best]:.4f}) more than at +1 "
            f"({shares[following]:.4f}); {meaning}"
        )


def _most_drawn(sampled: Sampled) -> tuple[Any, Any]:
    """The id drawn most often at each position, and where no other was drawn as often."""
    most_R = sampled.counts.max(axis=1)
    best_R = np.take_along_axis(sampled.ids, sampled.counts.argmax(axis=1)[:, None], axis=1)[:, 0]
    return best_R, (sampled.counts == most_R[:, None]).sum(axis=1) == 1
