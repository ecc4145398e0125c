"""From logits to the signal that is kept: the k largest, and the rest of the vocabulary as one curve.

Enters: logits of S positions, [S, V or wider], any float dtype. Leaves: a `TopK` of S rows on the CPU.
Costs: two scratch buffers of `chunk_bytes`, and about 280 µs per position on one AVX2 core at V = 49,152 and
k = 64 (75 top-k, 60 exp, 80 powers); the output head of a 135M model takes 850 there.

The tail at temperature T = 1/β is lse_tail(β) = log Σ_{i not kept} exp(β z_i). With m the largest tail logit
(number k + 1) and e_i = exp(β₁ (z_i − m)), β₁ = 0.1, the grid's ten sums are Σ e_i, Σ e_i² … Σ e_i¹⁰: one exp for
all of them. The largest tail logit contributes 1 to each, so no sum underflows whatever the logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stillroom.storage.errors import BadLogits
from stillroom.storage.records import BETAS, TopK

#: Columns are searched for the top k in this many interleaved rows, whose maxima name the few columns worth
#: ranking: 45 µs against torch.topk's 95 (V = 49,152, k = 64). 32 takes as long, 128 twice.
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
    assert 1 <= k < vocabulary <= logits_SV.shape[-1], (k, vocabulary, tuple(logits_SV.shape))
    assert len(logits_SV)
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
    ids_SK, kept_SK, tail_SG = torch.cat(ids)[:size], torch.cat(kept)[:size], torch.cat(tail)[:size]
    # NaN ranks above all numbers in top-k, so one that is anywhere in the row is among the kept.
    bad = (~kept_SK.isfinite()).any(-1).nonzero().flatten().tolist()
    if bad:
        raise BadLogits(f"NaN or infinite logits at {len(bad)} of {size} positions, the first is {name_row(bad[0])}")
    return TopK(ids_SK.int().cpu().numpy(), kept_SK.cpu().numpy(), tail_SG.cpu().numpy())


def _largest(z_CV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [C, k] int64, logits [C, k], and logit number k + 1 [C], the tail's largest."""
    near_CM, near_ids_CM = _candidates(z_CV, k + 1)
    values_C1, where_C1 = near_CM.topk(k + 1, dim=-1)
    kept_CK, border_C1 = values_C1[:, :k], values_C1[:, k:]
    ids_CK = near_ids_CM.gather(-1, where_C1[:, :k])
    tied_C = (kept_CK[:, -1:] == border_C1).flatten().nonzero().flatten()
    if len(tied_C):
        ids_CK[tied_C] = _settle_border(near_CM[tied_C], near_ids_CM[tied_C], ids_CK[tied_C], kept_CK[tied_C])
    # Rank equal logits by id: sort by id, then stably by logit.
    ids_CK, order_CK = ids_CK.sort(dim=-1)
    kept_CK, rank_CK = kept_CK.gather(-1, order_CK).sort(dim=-1, descending=True, stable=True)
    return ids_CK.gather(-1, rank_CK), kept_CK, border_C1[:, 0]


def _candidates(z_CV: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Logits [C, M] and ids [C, M] among which are all that equal or exceed the row's n-th largest.

    The row is folded into FOLD × width. Let c be the n-th largest of the width column maxima: n logits are at least
    c, so the n-th largest logit is too, and all that reach it lie in columns whose maximum is at least c.
    """
    width = z_CV.shape[1] // FOLD
    all_ids_V = torch.arange(z_CV.shape[1], device=z_CV.device)
    if width < 4 * n:
        return z_CV, all_ids_V.expand(len(z_CV), -1)
    folded_CFW = z_CV[:, : FOLD * width].view(len(z_CV), FOLD, width)
    maxima_CW = folded_CFW.amax(1)
    nth_C1 = maxima_CW.topk(n, dim=-1).values[:, -1:]
    reaching = int((maxima_CW >= nth_C1).sum(-1).max())  # n, or a few more where maxima are equal
    columns_CN = maxima_CW.topk(max(n, reaching), dim=-1, sorted=False).indices
    near = folded_CFW.gather(2, columns_CN[:, None].expand(-1, FOLD, -1)).flatten(1)
    near_ids = (columns_CN[:, None] + all_ids_V[: FOLD * width : width, None]).flatten(1)
    over, over_ids = z_CV[:, FOLD * width :], all_ids_V[FOLD * width :].expand(len(z_CV), -1)
    return torch.cat([near, over], -1), torch.cat([near_ids, over_ids], -1)


def _settle_border(near_CM: Tensor, near_ids_CM: Tensor, ids_CK: Tensor, kept_CK: Tensor) -> Tensor:
    """The kept ids where logits number k and k + 1 are equal: of the ids with that logit, the smallest stay.

    In bfloat16 most rows have such a tie (a step is 1/8 nat at logits of 16 to 32), in float32 hardly any.
    """
    open_CK = kept_CK == kept_CK[:, -1:]
    equal_ids_CM = near_ids_CM.masked_fill(near_CM != kept_CK[:, -1:], torch.iinfo(torch.int64).max)
    smallest_CK = equal_ids_CM.topk(kept_CK.shape[1], dim=-1, largest=False).values
    # Kept logits fall, so the open places are the last ones of a row.
    place_CK = open_CK.cumsum(-1) - 1
    return torch.where(open_CK, smallest_CK.gather(-1, place_CK.clamp_min(0)), ids_CK)


def _tail_lse_(z_CV: Tensor, spare_CV: Tensor, ids_CK: Tensor, border_C: Tensor) -> Tensor:
    """lse_tail [C, G] float32 at BETAS, multiples of the first; sums in float32, logarithms in float64.

    Overwrites z_CV and spare_CV.
    """
    # Subtract first and scale then: at |z| = 1e4 the other way round costs 1e-3 nats. exp2 would take half the time
    # of exp, but torch's is not bit-equal across thread counts (its scalar remainder differs from its vector code).
    e_CV = z_CV.sub_(border_C[:, None]).mul_(BETAS[0]).scatter_(1, ids_CK, -torch.inf).exp_()
    sums = [e_CV.sum(-1)]
    power_CV = spare_CV.copy_(e_CV)
    for _ in BETAS[1:]:
        sums.append(power_CV.mul_(e_CV).sum(-1))
    betas_G = torch.tensor(BETAS, dtype=torch.float64, device=z_CV.device)
    tail_CG = border_C.double()[:, None] * betas_G + torch.stack(sums, -1).double().log()
    return torch.where(border_C[:, None] == -torch.inf, -torch.inf, tail_CG).float()
