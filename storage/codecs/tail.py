"""The tail's log-partition as a curve in β = 1/T: interpolation and integer codes.

Enters: lse_tail [R, G] = log Σ_{i not kept} exp(β z_i) at the ten β of `BETAS`. Leaves: int32 codes [R, G] and
back, or the value at any β in 0.1 … 1. Costs: 10 multiply-adds a position to interpolate; the codes take
8–10 bytes a position after zstd.

Why a curve: p^(1/T) over a truncated top-k says nothing about what T lifts out of the tail (at T = 4 the top 64
of 49,152 ids hold 1.7 % of the mass). lse_tail is convex and smooth in β and known for free at β = 0, where it is
log(V − K), so a cubic spline through eleven points is exact to 2e-4 nats (real teacher, k = 64).

Codes. c_g = round((lse_tail(β_g) − β_g · top_logit) / STEP) are integers; c_0 = round(log(V − K) / STEP) is known.
Stored are, for each position, the first difference c_1 − c_0 and then second differences: small, because the
curve is smooth, and exact, because they are differences of integers. Decoding is two cumulative sums.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.records import BETAS, Float32, Int32

#: Nats. Half of it, 2.4e-4, is the rounding error at a grid point.
STEP = 2.0**-11

#: Nats between tail and top logit that the codes can hold: a second difference is at most four such values, and
#: 4 · LARGEST / STEP is 2^31.
LARGEST = 2.0**18

#: V − K, of all positions alike or of each: int [R].
TailSize = int | Int32

#: With β = 0 in front: the points that the spline runs through.
GRID = np.array((0.0, *BETAS))


@lru_cache(maxsize=256)
def interpolation_weights(beta: float) -> NDArray[np.float64]:
    """Weights w [G + 1] with lse_tail(β) ≈ w[0] · log(V − K) + w[1:] · lse_tail(BETAS).

    A not-a-knot cubic spline is linear in its values, so at a fixed β it is one dot product. At a grid
    point the weights are a unit vector, and the value is exact.

    Raises ValueError for β outside [0.1, 1]: temperatures below 1 or above 10 are not held.
    """
    if not BETAS[0] - 1e-9 <= beta <= BETAS[-1] + 1e-9:
        temperature = 1 / beta if beta else np.inf
        raise ValueError(f"temperature {temperature:g} is outside 1 … 10, the range that the tail grid covers")
    weights = _spline_matrix(beta)
    nearest = int(np.argmin(np.abs(GRID - beta)))
    if abs(GRID[nearest] - beta) < 1e-9:
        weights = np.zeros(len(GRID))
        weights[nearest] = 1.0
    weights.setflags(write=False)
    return weights


def _spline_matrix(beta: float) -> NDArray[np.float64]:
    """Row of the not-a-knot cubic spline operator at `beta`: value = row · y for y on the uniform GRID.

    With h the spacing and M the second derivatives, M[i−1] + 4 M[i] + M[i+1] = 6 (y[i−1] − 2 y[i] + y[i+1]) / h²,
    and the third derivative is continuous at the second and the last but one point (de Boor 1978, ch. IV).
    """
    n, h = len(GRID), GRID[1] - GRID[0]
    left, right = np.zeros((n, n)), np.zeros((n, n))
    for i in range(1, n - 1):
        left[i, i - 1 : i + 2] = 1.0, 4.0, 1.0
        right[i, i - 1 : i + 2] = 6 / h**2, -12 / h**2, 6 / h**2
    left[0, :3] = left[-1, -3:] = 1.0, -2.0, 1.0
    curvature = np.linalg.solve(left, right)
    i = min(int(beta / h), n - 2)
    b = (beta - GRID[i]) / h
    a = 1.0 - b
    identity = np.eye(n)
    bend = ((a**3 - a) * curvature[i] + (b**3 - b) * curvature[i + 1]) * h**2 / 6
    return np.asarray(a * identity[i] + b * identity[i + 1] + bend)


def tail_lse_at(tail_lse_RG: Float32, beta: float, tail_size: TailSize) -> Float32:
    """lse_tail(β) [R] in nats from the grid; `tail_size` is V − K."""
    weights = interpolation_weights(beta)
    at_zero = (weights[0] * np.log(tail_size)).astype(np.float32)
    return np.asarray(tail_lse_RG @ weights[1:].astype(np.float32) + at_zero, np.float32)


def _code_at_zero(tail_size: TailSize) -> NDArray[np.int64]:
    return np.asarray(np.rint(np.log(tail_size) / STEP), np.int64)


def encode_tail(tail_lse_RG: Float32, top_logit_R: Float32, tail_size: TailSize) -> Int32:
    """Codes [R, G], see the module's text. Raises ValueError where a value is not finite or has no code."""
    relative = tail_lse_RG.astype(np.float64) - np.outer(top_logit_R.astype(np.float64), BETAS)
    held = (np.abs(relative) < LARGEST).all(axis=1)
    if not held.all():
        row = int(np.argmin(held))
        raise ValueError(
            f"tail log-partition is not finite at row {row}, or {LARGEST:,.0f} nats and more from the top logit: "
            f"{tail_lse_RG[row].tolist()} under a top logit of {top_logit_R[row]}"
        )
    points = np.empty((len(relative), len(GRID)), dtype=np.int64)
    points[:, 0] = _code_at_zero(tail_size)
    np.rint(relative / STEP, out=points[:, 1:], casting="unsafe")
    first = np.diff(points, axis=1)
    codes = first.copy()
    codes[:, 1:] = np.diff(first, axis=1)
    assert np.abs(codes).max(initial=0) < 2**31
    return codes.astype(np.int32)


def decode_tail(codes_RG: Int32, top_logit_R: Float32, tail_size: TailSize) -> Float32:
    """lse_tail [R, G] in nats, to within STEP/2 of what was encoded."""
    points = np.cumsum(codes_RG, axis=1, dtype=np.int64)
    np.cumsum(points, axis=1, out=points)
    points += np.atleast_1d(_code_at_zero(tail_size))[:, None]
    relative = points.astype(np.float32) * np.float32(STEP)
    return relative + np.outer(top_logit_R, np.array(BETAS, dtype=np.float32))
