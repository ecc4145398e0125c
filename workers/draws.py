"""From logits to N draws at T = 1: which ids came up, and how often.

Enters: logits of S positions [S, V], any float dtype, and a 64-bit key for each. Leaves: a `Sampled` of S rows on the
CPU. Costs: scratch of 1.5 times `chunk_bytes`, and about 150 µs per position on one AVX2 core at V = 49,152 and
N = 50, half of what `extract` takes; half of it is the cumulative sum.

Sparse Logit Sampling (arXiv 2503.16870) keeps N independent draws from p; the share of an id among them, p̂ = count / N,
has p as its mean. Here the N draws share one random number u (systematic sampling, Madow 1949): they lie at
(u + i) / N, i = 0 … N − 1, on the cumulative distribution. E p̂ = p as before, and every count is N·p rounded down or
up, so that the variance of p̂_i is f(1 − f)/N² with f the fraction of N·p_i, never more than the p_i(1 − p_i)/N of
independent draws. SmolLM2-135M on CPython's documentation: ids and bytes a position over 40,960, and over 1,024 of them
the gradient q − p̂ against q − p (the student q: logits + N(0, 1)):

                        ids    bytes  angle  angle of a batch of 64  E |p̂ − p|²
    independent, N = 50  16.3   32.7   33.8°  24.0°                   1.3e-2
    systematic,  N = 40  15.6   29.9   26.3°  16.5°                   5.9e-3
    systematic,  N = 50  18.3   34.5   24.2°  14.5°                   4.4e-3

The order of ids along the distribution is that of their numbers. It cannot matter for the variance above, which holds
id by id, and u is drawn anew at every position; ranking by logit changed the angle by 0.4° ± 0.3° (512 positions × 4).
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillroom.storage.codecs.sampled import MOST_DRAWS
from stillroom.storage.errors import BadLogits
from stillroom.storage.records import Int32, Sampled
from stillroom.workers.extract import CPU_CHUNK_BYTES
from stillroom.workers.transfer import to_device, to_host

#: Bits of a key that make u. With N < 2^15 every u + i is exact in float64, and (u + i) / N stays below 1 by more
#: than its rounding, so that the last draw cannot fall behind the last id.
KEY_BITS = 36


def draw(
    logits_SV: Tensor,
    keys_S: NDArray[np.uint64],
    *,
    draws: int,
    chunk_bytes: int = CPU_CHUNK_BYTES,
    name_row: Callable[[int], str] = "row {}".format,
) -> Sampled:
    """N systematic draws from softmax(logits) at each position.

    logits_SV: nats, V real columns only: padding of the head must be cut off by the caller.
    keys_S: uint64, see `position_keys`. A row's draws are a function of its logits and its key alone.
    draws: N, 1 … 32,767.
    chunk_bytes: rows are taken in chunks of this many bytes of float64 [·, V]; it changes speed, not results.
    name_row: what an error message calls a row.

    Each id's probability is softmax's to within 2e-6 of itself plus 2^(⌈log2 V⌉ − 54) of the top one's: 4e-12 at
    V = 49,152, 2e-11 at 151,936. What lies below that is never drawn, nor is a logit of −inf.

    Raises BadLogits for a NaN or +inf anywhere, or a row of −inf alone.
    """
    return begin_draw(logits_SV, keys_S, draws=draws, chunk_bytes=chunk_bytes, name_row=name_row)()


def begin_draw(
    logits_SV: Tensor,
    keys_S: NDArray[np.uint64],
    *,
    draws: int,
    chunk_bytes: int,
    name_row: Callable[[int], str],
) -> Callable[[], Sampled]:
    """As `draw`, but what is returned waits for the result, and raises."""
    assert 1 <= draws <= MOST_DRAWS, draws
    assert len(logits_SV) == len(keys_S) > 0, (len(logits_SV), len(keys_S))
    ids, top = map(to_host, _rows(logits_SV, keys_S, draws, chunk_bytes))

    def end() -> Sampled:
        top_S = top.wait().numpy()
        bad = np.flatnonzero(~np.isfinite(top_S))
        if len(bad):
            raise BadLogits(
                f"NaN, +inf or nothing but −inf logits at {len(bad)} of {len(top_S)} positions, the first is "
                f"{name_row(int(bad[0]))}"
            )
        return _counted(ids.wait().numpy())

    return end


def _rows(logits_SV: Tensor, keys_S: NDArray[np.uint64], draws: int, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """Rising ids [S, N] int32 and the top logits [S], on the device of the logits."""
    size, vocabulary = logits_SV.shape
    device = logits_SV.device
    u_S = to_device(torch.from_numpy((keys_S >> np.uint64(64 - KEY_BITS)).astype(np.float64) * 2.0**-KEY_BITS), device)
    points_SN = (u_S[:, None] + torch.arange(draws, dtype=torch.float64, device=device)) / draws
    rows = max(1, min(size, chunk_bytes // (8 * vocabulary)))
    weights = torch.empty(rows, vocabulary, dtype=torch.float32, device=device)
    sums = torch.empty(rows, vocabulary, dtype=torch.float64, device=device)
    ids, top = [], []
    for chunk_CV, points_CN in zip(torch.split(logits_SV, rows), torch.split(points_SN, rows), strict=True):
        weights_CV, sums_CV = weights[: len(chunk_CV)].copy_(chunk_CV), sums[: len(chunk_CV)]
        top.append(_cumulate_(weights_CV, sums_CV))
        # The first id whose cumulative weight exceeds the point: one without weight of its own never is.
        ids.append(torch.searchsorted(sums_CV, points_CN * sums_CV[:, -1:], right=True))
    return torch.cat(ids).int(), torch.cat(top)


def _cumulate_(z_CV: Tensor, sums_CV: Tensor) -> Tensor:
    """Fills sums_CV with cumulative weights in proportion to exp(z), and returns the top logits [C].

    Weights are integers of at most 2^53 / V, so every partial sum is exact in float64: the sums do not depend on
    who adds them in which order (threads; the parallel scan of a GPU), and they never fall. Overwrites z_CV.
    """
    top_C = z_CV.amax(-1)  # NaN if any is
    scale = 2.0 ** (53 - (z_CV.shape[1] - 1).bit_length())
    # exp, not exp2: see workers/extract.py. A power of two scales exactly, and a float32 beyond 2^24 is whole.
    torch.cumsum(z_CV.sub_(top_C[:, None]).exp_().mul_(scale).round_(), -1, dtype=torch.float64, out=sums_CV)
    return top_C


def _counted(ids_SN: Int32) -> Sampled:
    """Distinct ids and counts of rows of rising ids."""
    new_SN = np.ones(ids_SN.shape, dtype=bool)
    new_SN[:, 1:] = ids_SN[:, 1:] != ids_SN[:, :-1]
    slot_SN = np.cumsum(new_SN, axis=1) - 1
    size, width = len(ids_SN), int(slot_SN[:, -1].max()) + 1
    row_SN = np.broadcast_to(np.arange(size)[:, None], ids_SN.shape)
    ids_SU = np.full((size, width), -1, dtype=np.int32)
    ids_SU[row_SN[new_SN], slot_SN[new_SN]] = ids_SN[new_SN]
    counts = np.bincount((row_SN * width + slot_SN).ravel(), minlength=size * width)
    return Sampled(ids_SU, counts.reshape(size, width).astype(np.int32))
