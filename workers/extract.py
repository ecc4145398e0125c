"""From logits to the signal that is kept: the k largest, and the rest of the vocabulary as one curve.

Enters: logits of S positions, [S, V or wider], any float dtype. Leaves: a `TopK` of S rows on the CPU.
Costs: two scratch buffers of `chunk_bytes`, and about 280 µs per position on one AVX2 core at V = 49,152 and
k = 64 (75 top-k, 60 exp, 80 powers); the output head of a 135M model takes 850 there.

The tail at temperature T = 1/β is lse_tail(β) = log Σ_{i not kept} exp(β z_i). With m the largest tail logit
(number k + 1) and e_i = exp(β₁ (z_i − m)), β₁ = 0.1, the grid's ten sums are Σ e_i, Σ e_i² … Σ e_i¹⁰: one exp for
all of them. The largest tail logit contributes 1 to each, so no sum underflows whatever the logits.

Nothing here waits for a GPU before the end: sizes depend on no value, and checks are made once the copies have landed
on the host. It has not run on one; the tests run it on torch's `meta` device, which has no values to wait for.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stillroom.storage.errors import BadLogits
from stillroom.storage.records import BETAS, TopK
from stillroom.workers.transfer import to_device, to_host

#: The top k are searched in columns of this many neighbours (fewer where the vocabulary is small), whose maxima name
#: the few worth ranking. With the keys below 125 µs in float32 and 110 in bfloat16 (V = 49,152, k = 64), where a search
#: by logits that settles ties afterwards took 135 and 150 to 400: as many columns as share a maximum were candidates.
FOLD = 64

#: One scratch buffer on a CPU: 3 MiB is 16 rows at V = 49,152. 1 row and 64 rows both take 1.5 times as long.
CPU_CHUNK_BYTES = 3 << 20


def extract(
    logits_SV: Tensor,
    *,
    k: int,
    vocabulary: int,
    chunk_bytes: int = CPU_CHUNK_BYTES,
    name_row: Callable[[int], str] = "row {}".format,
) -> TopK:
    """The k largest logits of each row by falling logit, and the tail's log-partition at β = BETAS.

    logits_SV: [S, ≥ V], nats. Columns from `vocabulary` on are the head's padding and are cut before anything else.
    k: 1 ≤ k < V. Equal logits are ranked by id, the smaller first, also where they straddle the border to the
        tail: a row's signal is a function of its logits, not of a sort's internals.
    chunk_bytes: rows are taken in chunks of this many bytes of float32 [·, V]; it changes speed, not results.
    name_row: what an error message calls a row.

    Accuracy: tail_lse within 1e-4 nats of float64, or half a float32 ulp where that is more (|lse| > 1,000).
    A tail of −inf logits alone has tail_lse = −inf.

    Raises BadLogits for a NaN or +inf anywhere in the V columns, or a kept logit of −inf.
    """
    return begin_extract(logits_SV, k=k, vocabulary=vocabulary, chunk_bytes=chunk_bytes, name_row=name_row)()


def begin_extract(
    logits_SV: Tensor, *, k: int, vocabulary: int, chunk_bytes: int, name_row: Callable[[int], str]
) -> Callable[[], TopK]:
    """As `extract`, but what is returned waits for the result, and raises."""
    assert 1 <= k < vocabulary <= logits_SV.shape[-1], (k, vocabulary, tuple(logits_SV.shape))
    assert len(logits_SV)
    ids, kept, tail = map(to_host, _rows(logits_SV, k, vocabulary, chunk_bytes))

    def end() -> TopK:
        kept_SK = kept.wait().numpy()
        # NaN ranks above all numbers in top-k, so one that is anywhere in the row is among the kept.
        bad = np.flatnonzero(~np.isfinite(kept_SK).all(axis=1))
        if len(bad):
            raise BadLogits(
                f"NaN or infinite logits at {len(bad)} of {len(kept_SK)} positions, the first is "
                f"{name_row(int(bad[0]))}"
            )
        return TopK(ids.wait().numpy(), kept_SK, tail.wait().numpy())

    return end


def _rows(logits_SV: Tensor, k: int, vocabulary: int, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [S, K] int32, kept logits [S, K] and the tail's grid [S, G], on the device of the logits."""
    rows = max(2, min(len(logits_SV), chunk_bytes // (4 * vocabulary)))
    # Two buffers for the whole call: fresh memory for each chunk made the tail three times as slow (page faults).
    scratch = torch.empty(2, rows, vocabulary, dtype=torch.float32, device=logits_SV.device)
    ids, kept, tail = [], [], []
    for chunk_CV in torch.split(logits_SV[:, :vocabulary], rows):
        if len(chunk_CV) == 1:
            # torch splits the sum of a lone row between threads, and its last bit would depend on their number.
            chunk_CV = chunk_CV.expand(2, -1)
        z_CV, spare_CV = scratch[0, : len(chunk_CV)].copy_(chunk_CV), scratch[1, : len(chunk_CV)]
        ids_CK, kept_CK, border_C = _largest(z_CV, k)
        ids.append(ids_CK)
        kept.append(kept_CK)
        tail.append(_tail_lse_(z_CV, spare_CV, ids_CK, border_C))
    size = len(logits_SV)
    return torch.cat(ids)[:size].int(), torch.cat(kept)[:size], torch.cat(tail)[:size]


def _largest(z_CV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [C, k] int64, logits [C, k], and logit number k + 1 [C], the tail's largest.

    By keys that no two ids share, so that there are no ties to settle: in bfloat16 most rows have one at the border (a
    step is 1/8 nat at logits of 16 to 32). How many operations and how large their results is the same for all values.
    """
    near_CM, near_ids_CM = _candidates(z_CV, k + 1)
    where_CN = _keys(near_CM, near_ids_CM).topk(k + 1, dim=-1).indices
    values_CN = near_CM.gather(-1, where_CN)
    return near_ids_CM.gather(-1, where_CN[:, :k]), values_CN[:, :k], values_CN[:, k]


def _candidates(z_CV: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Logits [C, M] and ids [C, M] among which are the n with the largest keys.

    The row is cut into `width` columns of `fold` neighbours. Of columns with equal maxima the one further left has the
    smaller ids: each of the n columns with the largest (maximum, −column) has an id whose key exceeds all those in
    columns beyond them, which so cannot be among the n largest.
    """
    fold = FOLD
    while fold > 1 and z_CV.shape[1] // fold < 4 * n:
        fold //= 2
    all_ids_V = torch.arange(z_CV.shape[1], device=z_CV.device)
    all_ids_CV = all_ids_V.expand(len(z_CV), -1)
    if fold == 1:
        return z_CV, all_ids_CV
    width = z_CV.shape[1] // fold
    maxima_CW = z_CV[:, : fold * width].view(len(z_CV), width, fold).amax(-1)
    columns_CN = _keys(maxima_CW, all_ids_V[:width]).topk(n, dim=-1, sorted=False).indices
    folded_CM = (fold * columns_CN[:, :, None] + all_ids_V[:fold]).flatten(1)
    near_ids_CM = torch.cat([folded_CM, all_ids_CV[:, fold * width :]], -1)
    return z_CV.gather(-1, near_ids_CM), near_ids_CM


def _keys(z: Tensor, ids: Tensor) -> Tensor:
    """int64 that rise with z, NaN above all, and among equal z with falling id. z: float32. ids: below 2^31."""
    bits = (z + 0.0).view(torch.int32)  # −0.0 becomes 0.0, which it equals
    # The bits of a float rise with its magnitude: turned round for the negative ones, they rise with the number.
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).masked_fill_(z.isnan(), torch.iinfo(torch.int32).max)
    return bits.long().bitwise_left_shift_(32).sub_(ids)


def _tail_lse_(z_CV: Tensor, spare_CV: Tensor, ids_CK: Tensor, border_C: Tensor) -> Tensor:
    """lse_tail [C, G] float32 at BETAS, multiples of the first; sums in float32, logarithms in float64.

    Overwrites z_CV and spare_CV.
    """
    # Subtract first and scale then: at |z| = 1e4 the other way round costs 1e-3 nats. exp2 would take half the time
    # of exp, but torch's is not bit-equal across thread counts (its scalar remainder differs from its vector code).
    # All ten sums as dot products of five powers took 1.3 times as long, as their Gram matrix 1.1 times.
    e_CV = z_CV.sub_(border_C[:, None]).mul_(BETAS[0]).scatter_(1, ids_CK, -torch.inf).exp_()
    power_CV = torch.mul(e_CV, e_CV, out=spare_CV)
    sums = [e_CV.sum(-1), power_CV.sum(-1)]
    for _ in BETAS[2:]:
        sums.append(power_CV.mul_(e_CV).sum(-1))
    betas_G = to_device(torch.tensor(BETAS, dtype=torch.float64), z_CV.device)
    tail_CG = border_C.double()[:, None] * betas_G + torch.stack(sums, -1).double().log()
    return torch.where(border_C[:, None] == -torch.inf, -torch.inf, tail_CG).float()
