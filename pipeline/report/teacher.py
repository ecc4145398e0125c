"""What the teacher says at stored rows: entropy, retained mass, likeliest ids. Pure functions over numpy.

Enters: decoded signals. Leaves: arrays. Costs: one exp per kept logit and temperature.

R rows, K kept ids, V vocabulary, G grid points of β = 1/T.

Entropy from a top-k. With Z(β) = Σ_i exp(β z_i), the tail's share of Σ_i p_i z_i at β = 1 is its probability times
d/dβ log Z_tail(β), which the stored curve gives. So H = log Z − Σ_kept p z − p_tail · (log Z_tail)'(1) counts every id.
Against the whole logits of 512 positions (SmolLM2-135M, V = 49,152, k = 64, gaps in 1/8): mean difference 1e-5 nats,
mean size 0.005, worst 0.034, nearly all of it the rounding of the gaps. The tail as one bucket would be 0.69 too low.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.codecs.tail import GRID, tail_lse_at
from stillroom.storage.records import Float32, Int32, Sampled, TopK

Float64 = NDArray[np.float64]

#: Points of the tail's curve that its slope at β = 1 is taken from: a polynomial of degree 4 through the last five.
_SLOPE_POINTS = 5

#: Ids of a row that the page shows.
TOP = 8


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """The teacher at R rows, at T = 1.

    ids: int32 [R, K], by falling logit, −1 in unused slots. logits: float32 [R, K], −inf there. tail_lse: float32 [R],
    log Σ exp over the ids that are not kept; −inf where nothing is left. entropy: float64 [R], nats.
    """

    ids: Int32
    logits: Float32
    tail_lse: Float32
    entropy: Float64

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def probabilities(self) -> Float64:
        """[R, K], 0 in unused slots."""
        return np.exp(self.logits.astype(np.float64) - _log_total(self.logits, self.tail_lse)[:, None])

    def __getitem__(self, rows: slice) -> "TeacherRows":
        return TeacherRows(self.ids[rows], self.logits[rows], self.tail_lse[rows], self.entropy[rows])

    @staticmethod
    def concatenate(parts: Seq["TeacherRows"]) -> "TeacherRows":
        """Rows under each other; narrower ones are filled up."""
        width = max(part.ids.shape[1] for part in parts)

        def wide(array: NDArray[np.generic], fill: float) -> NDArray[np.generic]:
            return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)

        return TeacherRows(
            np.concatenate([wide(part.ids, -1) for part in parts]).astype(np.int32),
            np.concatenate([wide(part.logits, -np.inf) for part in parts]).astype(np.float32),
            np.concatenate([part.tail_lse for part in parts]),
            np.concatenate([part.entropy for part in parts]),
        )


def of_topk(topk: TopK, vocabulary: int) -> TeacherRows:
    """From what a store keeps. Entropy: see the module's text."""
    tail = np.where(topk.kept < vocabulary, topk.tail_lse[:, -1], -np.inf).astype(np.float32)
    return TeacherRows(topk.ids, topk.logits, tail, entropy_of_topk(topk, vocabulary))


def of_full(logits_RV: Float32, k: int = 64) -> TeacherRows:
    """From the whole vocabulary: the k likeliest, the rest's exact sum, the exact entropy."""
    k = min(k, logits_RV.shape[1] - 1)
    near_RK = np.argpartition(-logits_RV, k - 1, axis=1)[:, :k]
    order_RK = np.argsort(-np.take_along_axis(logits_RV, near_RK, 1), axis=1, kind="stable")
    ids_RK = np.take_along_axis(near_RK, order_RK, 1)
    kept_RK = np.take_along_axis(logits_RV, ids_RK, 1)
    top_R1 = kept_RK[:, :1].astype(np.float64)
    gap_RV = logits_RV - top_R1
    weight_RV = np.exp(gap_RV)
    total_R = weight_RV.sum(1)
    entropy_R = np.log(total_R) - (weight_RV * gap_RV).sum(1) / total_R
    np.put_along_axis(weight_RV, ids_RK, 0.0, axis=1)
    with np.errstate(divide="ignore"):
        tail_R = (np.log(weight_RV.sum(1)) + top_R1[:, 0]).astype(np.float32)
    return TeacherRows(ids_RK.astype(np.int32), kept_RK.astype(np.float32), tail_R, entropy_R)


def of_draws(sampled: Sampled) -> TeacherRows:
    """From draws alone: shares of the draws as probabilities, and nothing beside them. Their entropy is too low, as ids
    that were not drawn have none."""
    counts_RU = np.where(sampled.ids >= 0, sampled.counts, 0)
    order_RU = np.argsort(-counts_RU, axis=1, kind="stable")
    counts_RU = np.take_along_axis(counts_RU, order_RU, 1)
    share_RU = counts_RU / np.maximum(counts_RU.sum(1, keepdims=True), 1)
    with np.errstate(divide="ignore"):
        log_RU = np.log(share_RU)
    entropy_R = -(share_RU * np.where(share_RU > 0, log_RU, 0.0)).sum(1)
    ids_RU = np.where(counts_RU > 0, np.take_along_axis(sampled.ids, order_RU, 1), -1)
    tail_R = np.full(len(ids_RU), -np.inf, np.float32)
    return TeacherRows(ids_RU.astype(np.int32), log_RU.astype(np.float32), tail_R, entropy_R)


def entropy_of_topk(topk: TopK, vocabulary: int) -> Float64:
    """Nats [R], of the whole distribution at T = 1; see the module's text."""
    kept_RK = topk.logits.astype(np.float64)
    top_R1 = kept_RK[:, :1]
    used_RK = np.isfinite(kept_RK)
    gap_RK = np.where(used_RK, kept_RK - top_R1, 0.0)  # relative to the top: no digits are lost to large logits
    weight_RK = np.where(used_RK, np.exp(gap_RK), 0.0)
    curve_RG = topk.tail_lse.astype(np.float64) - top_R1 * GRID[1:]
    left_R = np.maximum(vocabulary - topk.kept, 1)
    points_RG = np.concatenate([np.log(left_R)[:, None], curve_RG], axis=1)[:, -_SLOPE_POINTS:]
    tail_R = np.where(topk.kept < vocabulary, np.exp(curve_RG[:, -1]), 0.0)
    total_R = weight_RK.sum(1) + tail_R
    mean_R = ((weight_RK * gap_RK).sum(1) + tail_R * (points_RG @ _slope_weights())) / total_R
    return np.asarray(np.maximum(np.log(total_R) - mean_R, 0.0))


def _slope_weights() -> Float64:
    """w with f'(1) ≈ w · f(the last grid points)."""
    powers = np.vander(GRID[-_SLOPE_POINTS:] - 1.0, increasing=True)
    return np.asarray(np.linalg.inv(powers)[1])


def mass_by_k(topk: TopK, vocabulary: int, *, ks: Seq[int], temperatures: Seq[float]) -> Float64:
    """Probability that the k likeliest ids hold, [temperature, k], mean over rows. A row that keeps fewer than k gives
    what it keeps. Exact up to the rounding of the stored logits: the tail's sum is stored for every temperature."""
    found = np.zeros((len(temperatures), len(ks)))
    for row, temperature in enumerate(temperatures):
        scaled_RK = topk.logits.astype(np.float64) / temperature
        tail_R = tail_lse_at(topk.tail_lse, 1 / temperature, np.maximum(vocabulary - topk.kept, 1))
        share_RK = np.exp(scaled_RK - _log_total(scaled_RK, tail_R)[:, None])
        mean_K = np.cumsum(share_RK.mean(0))
        found[row] = mean_K[np.minimum(np.array(ks), len(mean_K)) - 1]
    return found


def ks_up_to(k: int) -> list[int]:
    """1, 2, 4 … and k itself."""
    return sorted({*(2**n for n in range(k.bit_length())), k})


def _log_total(logits_RK: NDArray[np.floating], tail_R: NDArray[np.floating]) -> Float64:
    kept_RK = logits_RK.astype(np.float64)
    top_R = np.maximum(kept_RK.max(1), tail_R)
    with np.errstate(divide="ignore"):
        return np.asarray(top_R + np.log(np.exp(kept_RK - top_R[:, None]).sum(1) + np.exp(tail_R - top_R)))
