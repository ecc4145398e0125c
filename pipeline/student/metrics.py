"""What is measured of a student on held-out text: one pure function each.

Enters: the student's log-probabilities or logits of N positions, and what is known of the teacher there. Leaves: a
value per position [N], or of all. Costs: at most one [N, V] buffer of float32, or of one byte a number; the caller cuts
N into slices.

N positions, V vocabulary, K kept ids (−1 in unused slots), P the student's probabilities, all at temperature 1.

A measure that is not determined is None, never 0: KL, agreement and masses where the store keeps draws alone, masses
where no ids are kept beside the hidden states, anything that is not finite.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.pipeline.student.losses.buckets import safe_logsumexp
from stillroom.pipeline.student.losses.divergences import forward_kl

#: Of equal width, over the confidence 0 … 1.
BINS = 15


def full_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(teacher ‖ student) = Σ_i p_i (log p_i − log q_i) over the whole vocabulary. [N], nats. Hinton et al. 2015
    (arXiv 1503.02531), §2. An id to which the teacher gives nothing adds nothing."""
    return forward_kl(log_p_NV, log_q_NV)


def rank_of(student_NV: Tensor, ids_N: Tensor) -> Tensor:
    """How many ids the student finds likelier than this one. int64 [N], 0 for its most likely id.

    student_NV: logits or log-probabilities. Of equal ones the lower id comes first, as with argmax. NaN is likelier
    than anything: a student that says NaN agrees with nobody.

    Agreement with the teacher's most likely id: top-1 is rank = 0, top-5 rank < 5 (as the errors of Russakovsky et al.
    2015, ILSVRC, §4.1, with the teacher's id as the class). The chapter's "token accuracy vs teacher" (§7.3).
    """
    own_N1 = student_NV.gather(-1, ids_N[:, None])
    above_N = (~(student_NV <= own_N1)).sum(-1)
    lower_NV = torch.arange(student_NV.shape[-1], device=ids_N.device) < ids_N[:, None]
    return above_N + (lower_NV & (student_NV == own_N1)).sum(-1)


def student_mass(log_q_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Σ_{i kept} q_i: what the student gives to the ids that the teacher kept. [N], 0 … 1."""
    log_q_NK = log_q_NV.gather(-1, ids_NK.clamp_min(0)).masked_fill(ids_NK < 0, -torch.inf)
    return log_q_NK.exp().sum(-1)


def teacher_mass(logits_NK: Tensor, tail_lse_N: Tensor) -> Tensor:
    """Σ_{i kept} p_i = 1 / (1 + exp(tail − logsumexp(kept))). [N], 0 … 1.

    logits_NK: raw, −inf in unused slots. tail_lse_N: log Σ exp over the ids not kept, −inf where none is left. Exact
    where the store keeps exact logits; a rounding of these by r nats moves it by at most r / 4.
    """
    return torch.sigmoid(safe_logsumexp(logits_NK) - tail_lse_N)


def calibration_bins(confidence_N: NDArray[np.float32], correct_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Sums per bin: count, confidence, correct. float64 [BINS, 3]; those of slices add up.

    confidence: probability of the most likely id. Bins are open on the left: (0, 1/15], (1/15, 2/15] … A confidence
    of NaN makes the first bin's sum NaN.
    """
    exact_N = confidence_N.astype(np.float64)
    bin_N = np.clip(np.ceil(np.nan_to_num(exact_N) * BINS).astype(np.int64) - 1, 0, BINS - 1)
    columns = (np.ones_like(exact_N), exact_N, correct_N.astype(np.float64))
    return np.stack([np.bincount(bin_N, weights=column, minlength=BINS) for column in columns], axis=1)


def calibration_error(bins: NDArray[np.float64]) -> float | None:
    """Expected calibration error: Σ_b share_b · |accuracy_b − confidence_b|, 0 … 1 (Guo et al. 2017, arXiv 1706.04599,
    eq. 3). None without positions."""
    count, confidence, correct = bins.T
    return mean(float(np.abs(correct - confidence).sum()), int(count.sum()))


def perplexity(nll_sum: float, tokens: int) -> float | None:
    """exp of the mean −log q(next token), nll_sum in nats. None without tokens, or where it is beyond float64."""
    if not tokens or not math.isfinite(nll_sum) or nll_sum / tokens > 700.0:
        return None
    return math.exp(nll_sum / tokens)


def finite(value: float) -> float | None:
    """The value, or None for what JSON cannot say: NaN, infinity."""
    return value if math.isfinite(value) else None


def mean(total: float, count: int) -> float | None:
    """None without positions, or where the sum is not finite."""
    return finite(total / count) if count else None
