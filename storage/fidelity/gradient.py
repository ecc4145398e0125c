"""One position at one temperature: what each tier's loss makes of the student's gradient, against full KD.

Enters: the teacher's full logits z, the reference student's s = z + ε, and what a store decodes. Leaves: mass kept,
its −log, KL added, the angle between the two gradients and their norms' ratio. Costs: two exponentials of [V] and
about ten passes over [V] in float64 for each tier.

V vocabulary, K kept ids. With p, q = softmax of z/T, s/T the gradient of full KD (Hinton et al. 2015) with respect to
s is (q − p)/T. What a tier's loss gives instead, without the common factor 1/T:

    topk      kept i: q_i − p̂_i     others j: q_j − p̂_tail · q_j / q_tail     (KL on {kept ids, the rest})
    sampled   q − counts/N          T = 1 only; unbiased, so single positions are noisy and their sum is not
    topk+sampled   T = 1 only: topk's, and for the others j besides Σ_tail counts/N · q_j / q_tail − counts_j/N
    hidden    q − softmax(ẑ/T)      ẑ = hidden state × output head, with the kept logits in place where there are any
"""

from dataclasses import dataclass
from math import atan2, degrees, inf, log1p, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.codecs.tail import interpolation_weights
from stillroom.storage.records import Float32, Int32, digest128

Float64 = NDArray[np.float64]

#: A position: the sequence's digest, and t in it.
Key = tuple[str, int]


def reference_noise(key: Key, vocabulary: int) -> Float64:
    """ε ~ N(0, 1) [V] of the reference student at a position: a function of the key alone.

    Through RandomState, whose stream numpy has frozen (NEP 19); that of `Generator.standard_normal` may change.
    """
    sequence, position = key
    seed = digest128(b"stillroom.reference-student.1", sequence.encode(), int(position).to_bytes(8, "little"))
    return np.random.RandomState(np.random.Philox(key=int(seed, 16))).standard_normal(vocabulary)


@dataclass(frozen=True)
class Numbers:
    """What `storage.fidelity.Measured` is the mean of. kl_added is nan for draws, norm_ratio where full KD is 0."""

    mass: float
    truncation_loss: float
    kl_added: float
    angle_deg: float
    norm_ratio: float


@dataclass(frozen=True, eq=False)
class Point:
    """Teacher and reference student at one position and temperature, float64 [V] each.

    scaled: z/T. log_z: its log-partition. p, q: softmax of teacher and student. top: the teacher's likeliest id.
    full: full KD's gradient.
    """

    temperature: float
    scaled: Float64
    log_z: float
    p: Float64
    q: Float64
    top: int
    full: Float64

    @staticmethod
    def of(logits_V: NDArray[Any], noise_V: Float64, temperature: float) -> "Point":
        scaled = np.divide(logits_V, temperature, dtype=np.float64)
        p, log_z = _softmax(scaled)
        student = noise_V / temperature
        student += scaled
        q, _ = _softmax(student)
        top = int(np.argmax(scaled))
        return Point(temperature, scaled, log_z, p, q, top, _sums_to_zero(q - p, top))

    def topk(
        self, ids_K: Int32, logits_K: Float32, tail_lse_G: Float32, draws: tuple[Int32, Int32] | None = None
    ) -> Numbers:
        """Of kept ids and a tail's curve, as `TopK` holds them for one row (used slots only). draws: ids and counts as
        in `sampled`, which then say how the tail shares its mass."""
        weights = interpolation_weights(1.0 / self.temperature)
        at_zero = float(np.log(len(self.p) - len(ids_K)))
        log_tail = float(weights[0] * at_zero + weights[1:] @ tail_lse_G.astype(np.float64))
        log_kept = logits_K.astype(np.float64) / self.temperature
        log_all = float(np.logaddexp(np.logaddexp.reduce(log_kept), log_tail))
        log_kept -= log_all
        log_tail -= log_all

        mass, p_tail, loss = _mass(self.p, ids_K)
        kl = float(self.p[ids_K] @ (self.scaled[ids_K] - self.log_z - log_kept))
        kl += p_tail * (float(np.log(p_tail)) - log_tail) if p_tail > 0 else 0.0

        gradient = self.q.copy()
        gradient[ids_K] = 0.0
        q_tail = float(gradient.sum())
        outside = None if draws is None else ~np.isin(draws[0], ids_K)
        drawn = 0.0 if draws is None else float(draws[1][outside].sum() / draws[1].sum())
        gradient *= 1.0 + (drawn - np.exp(log_tail)) / q_tail if q_tail > 0 else 0.0
        gradient[ids_K] = self.q[ids_K] - np.exp(log_kept)
        if draws is not None:
            gradient[draws[0][outside]] -= draws[1][outside] / draws[1].sum()
        return Numbers(mass, loss, max(kl, 0.0), *self._against_full(gradient))

    def sampled(self, ids_U: Int32, counts_U: Int32) -> Numbers:
        """Of draws, as `Sampled` holds them for one row (used slots only)."""
        mass, _, loss = _mass(self.p, ids_U)
        gradient = self.q.copy()
        gradient[ids_U] -= counts_U / counts_U.sum()
        return Numbers(mass, loss, nan, *self._against_full(gradient))

    def hidden(self, rebuilt_V: NDArray[Any]) -> Numbers:
        """Of logits for every id, rebuilt from the hidden state."""
        scaled = np.divide(rebuilt_V, self.temperature, dtype=np.float64)
        decoded, log_z = _softmax(scaled)
        np.subtract(self.scaled, scaled, out=scaled)
        kl = float(self.p @ scaled) - (self.log_z - log_z)
        np.subtract(self.q, decoded, out=decoded)
        return Numbers(1.0, 0.0, max(kl, 0.0), *self._against_full(decoded))

    def _against_full(self, gradient_V: Float64) -> tuple[float, float]:
        return angle_and_ratio(self.full, _sums_to_zero(gradient_V, self.top))


def angle_and_ratio(full_V: Float64, other_V: Float64) -> tuple[float, float]:
    """(angle in degrees, |other| / |full|); by atan2, since arccos has no digits left near 0.

    Where full KD gives no gradient at all the ratio is nan, or 1 if the other gives none either.
    """
    full, other = sqrt(full_V @ full_V), sqrt(other_V @ other_V)
    if full == 0.0 or other == 0.0:
        return (0.0, 1.0) if full == other else (90.0, 0.0 if full else nan)
    unit = full_V / full
    along = float(unit @ other_V)
    unit *= along
    across = np.subtract(other_V, unit, out=unit)
    return degrees(atan2(sqrt(across @ across), along)), other / full


def _sums_to_zero(gradient_V: Float64, top: int) -> Float64:
    """The gradient with the likeliest id's entry set by its sum being zero, in place.

    Where p is 1 − 1e-20 that entry of q − p is lost in rounding, and it is half of the norm; the others are not.
    """
    gradient_V[top] = 0.0
    gradient_V[top] = -gradient_V.sum()
    return gradient_V


def _softmax(scaled_V: Float64) -> tuple[Float64, float]:
    """Probabilities and log-partition. In place, here and above: a new [V] buffer costs what three passes do."""
    top = float(scaled_V.max())
    probabilities = scaled_V - top
    np.exp(probabilities, out=probabilities)
    total = float(probabilities.sum())
    probabilities /= total
    return probabilities, top + float(np.log(total))


def _mass(p_V: Float64, ids: Int32) -> tuple[float, float, float]:
    """(mass of the ids, mass of the rest, −log of the first), each summed by itself: 1 − Σ would cancel."""
    rest = p_V.copy()
    rest[ids] = 0.0
    kept, tail = float(p_V[ids].sum()), float(rest.sum())
    if tail < 0.5:
        return min(kept, 1.0), tail, -log1p(-tail)
    return kept, tail, -float(np.log(kept)) if kept > 0 else inf
