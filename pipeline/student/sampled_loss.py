"""The losses on estimates of the teacher at temperature 1: cross-entropy with the shares of its draws, over all ids or
over what a top-k leaves; and over what a top-k leaves with shares that are the same at every position.

Enters: the student's logits [N, V] and the distinct ids and counts of each position's draws. Leaves: a sum over
positions in float32 (float64 for float64 logits). Costs: one [N, V] buffer forward and one backward.

N positions, V vocabulary, K kept ids, U distinct drawn ids (the widest position's; others are padded).

With p̂ = counts / draws and q the student's softmax (Sparse Logit Sampling, arXiv 2503.16870),

    −Σ_i p̂_i log q_i = logsumexp(z) − Σ_i p̂_i z_i,      gradient q − p̂

The loss is linear in p̂ and p̂ is unbiased, so value and gradient have the mean of the full cross-entropy −Σ p log q over
the whole vocabulary. It is not a KL: its least value is the teacher's entropy, not zero. The entropy of p̂ is not
subtracted, as it is no unbiased estimate of that of p.

Beside a top-k most of this is known without drawing. The KL over V is the one over K + 1 buckets and what these do not
see, how the tail shares its mass (chain rule of relative entropy):

    KL(p ‖ q) = KL over buckets + p_tail · KL(p(·|tail) ‖ q(·|tail))

The second part, but for a constant, is Σ_{i in tail} p_i · −log q(i|tail), and p̂ is unbiased for it:

    Σ_{i drawn, not kept} p̂_i · (logsumexp_tail(z) − z_i),      gradient p̂_tail · q(·|tail) − p̂ on the tail

So the mean of bucket KL and this is the full KL's, value (but for the constant) and gradient, and noise is left in the
tail alone: at k = 64 and T = 1 some 0.07 of the mass.

Without draws, p(·|tail) may be taken to be the same everywhere: shares π over the vocabulary, as a store's fidelity
sample has them on average (storage/fidelity/shares.py). With π_tail = Σ_{i not kept} π_i

    p_tail · Σ_{i not kept} π_i / π_tail · (logsumexp_tail(z) − z_i),      gradient p_tail · (q(·|tail) − π / π_tail)

This has no noise, and a bias at each position, which is small on average over positions: with a student that knows how
frequent ids are and no more, the mean gradient of 1,024 positions is 0.013 of itself off, where the bucket alone is
0.15 off; with one that is near the teacher, 0.047 against 0.027 (SmolLM2-135M, k = 64, shares of 256 positions). Above
T = 1 it is worse than the bucket near the teacher (at T = 2 0.88 against 0.23), and so refused.
"""

import torch
from torch import Tensor

from stillroom.pipeline.student.losses.buckets import safe_logsumexp, used_slots
from stillroom.pipeline.student.losses.targets import precise
from stillroom.storage.errors import UnsupportedSignal


def require_unit_temperature(temperature: float) -> None:
    """Raises UnsupportedSignal unless the temperature of a loss on draws is 1.

    50 draws tempered after the fact give a gradient 79° off full-vocabulary KD's at T = 2 and 89° at T = 4,
    against 24° at T = 1: what T lifts out of the vocabulary was not drawn.
    """
    if temperature != 1.0:
        raise UnsupportedSignal(
            f"a loss at temperature {temperature:g} on draws from the teacher, which describe it at temperature 1 only "
            "(at T = 2 the gradient of 50 draws was measured to be 79° off); set the temperature to 1, or use a store "
            "with hidden states or top-k logits"
        )


def sampled_cross_entropy(
    student_logits_NV: Tensor, ids_NU: Tensor, counts_NU: Tensor, *, temperature: float, weights_N: Tensor
) -> Tensor:
    """Σ_n w_n · −Σ_i p̂_ni log q_ni, a scalar, nats.

    ids_NU: int64, distinct in a row, −1 on unused slots. counts_NU: integers, 0 on unused slots; at least one draw a
    row, else the loss is NaN. weights_N: float32. Gradients flow to the student's logits only.
    Raises UnsupportedSignal for a temperature other than 1.
    """
    require_unit_temperature(temperature)
    loss_N = _cross_entropy(student_logits_NV, ids_NU, counts_NU)
    return (loss_N * weights_N.to(loss_N.dtype)).sum()


def _cross_entropy(student_logits_NV: Tensor, ids_NU: Tensor, counts_NU: Tensor) -> Tensor:
    student_NV = student_logits_NV if student_logits_NV.dtype == torch.float64 else student_logits_NV.float()
    shares_NU = counts_NU.to(student_NV.dtype)
    shares_NU = shares_NU / shares_NU.sum(-1, keepdim=True)
    drawn_NU = student_NV.gather(-1, ids_NU.clamp_min(0))
    # An unused slot reads id 0, whose logit may be −inf, and 0 · −inf is NaN.
    drawn_NU = torch.where(counts_NU > 0, drawn_NU, torch.zeros((), dtype=drawn_NU.dtype, device=drawn_NU.device))
    return torch.logsumexp(student_NV, -1) - (shares_NU * drawn_NU).sum(-1)


def tail_cross_entropy(
    student_logits_NV: Tensor,
    ids_NK: Tensor,
    ids_NU: Tensor,
    counts_NU: Tensor,
    *,
    temperature: float,
    weights_N: Tensor,
) -> Tensor:
    """Σ_n w_n · Σ_{i not kept} p̂_ni · −log q_n(i | not kept), a scalar, nats: what the bucket KL does not see.

    ids_NK: the kept ids, −1 on unused slots. The draws as in `sampled_cross_entropy`; a position none of whose draws
    lies outside adds 0. Gradients flow to the student's logits only.
    Raises UnsupportedSignal for a temperature other than 1.
    """
    require_unit_temperature(temperature)
    student_NV = precise(student_logits_NV)
    _, kept_NK = used_slots(ids_NK)
    shares_NU = counts_NU.to(student_NV.dtype)
    shares_NU = (shares_NU / shares_NU.sum(-1, keepdim=True)).masked_fill(are_kept(ids_NU, ids_NK), 0.0)
    zero = torch.zeros((), dtype=student_NV.dtype, device=student_NV.device)
    drawn_NU = torch.where(shares_NU > 0, student_NV.gather(-1, ids_NU.clamp_min(0)), zero)
    tail_N = safe_logsumexp(student_NV.scatter(-1, kept_NK, -torch.inf))
    share_N = shares_NU.sum(-1)
    # No tail has a log-sum of −inf, and 0 · −inf is NaN.
    loss_N = share_N * torch.where(share_N > 0, tail_N, zero) - (shares_NU * drawn_NU).sum(-1)
    return (loss_N * weights_N.to(loss_N.dtype)).sum()


def shared_tail_cross_entropy(
    student_logits_NV: Tensor,
    ids_NK: Tensor,
    logits_NK: Tensor,
    tail_lse_N: Tensor,
    shares_V: Tensor,
    *,
    temperature: float,
    weights_N: Tensor,
) -> Tensor:
    """Σ_n w_n · p_tail,n · Σ_{i not kept} π_i / π_tail · −log q_n(i | not kept), a scalar, nats.

    ids_NK, logits_NK, tail_lse_N: as in `Targets`, at temperature 1. shares_V: π, float32 [V]. A position without a
    tail adds 0. Gradients flow to the student's logits only. Raises UnsupportedSignal for a temperature other than 1.
    """
    require_shared_tail(temperature)
    student_NV = precise(student_logits_NV)
    used_NK, kept_NK = used_slots(ids_NK)
    mass_N1, left_N1 = tail_of(used_NK, kept_NK, logits_NK, tail_lse_N, shares_V, dtype=student_NV.dtype)
    zero = torch.zeros((), dtype=student_NV.dtype, device=student_NV.device)
    tail_N1 = safe_logsumexp(student_NV.scatter(-1, kept_NK, -torch.inf)).unsqueeze(-1)
    # The kept ids count for nothing, −inf among them too, which times a share of 0 would be NaN.
    mean_N1 = (student_NV.scatter(-1, kept_NK, 0.0) @ shares_V.to(student_NV.dtype)).unsqueeze(-1) / left_N1
    loss_N1 = torch.where(mass_N1 > 0, mass_N1 * (torch.where(mass_N1 > 0, tail_N1, zero) - mean_N1), zero)
    return (loss_N1.squeeze(-1) * weights_N.to(loss_N1.dtype)).sum()


def require_shared_tail(temperature: float) -> None:
    """Raises UnsupportedSignal unless the temperature is 1: see the module's text."""
    if temperature != 1.0:
        raise UnsupportedSignal(
            f"losses.signal topk+truth at temperature {temperature:g}: the tail's mean shares point the right way at "
            "temperature 1 only; set the temperature to 1, or losses.signal to topk, or use a store with hidden states"
        )


def tail_of(
    used_NK: Tensor, kept_NK: Tensor, logits_NK: Tensor, tail_lse_N: Tensor, shares_V: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(p_tail, π_tail), [N, 1] each: the teacher's mass and the shares' on the ids not kept. Where nothing of either is
    left the mass is 0."""
    logits_NK = logits_NK.to(dtype).masked_fill(~used_NK, -torch.inf)
    tail_N1 = tail_lse_N.to(dtype).unsqueeze(-1)
    mass_N1 = torch.exp(tail_N1 - torch.logsumexp(torch.cat([logits_NK, tail_N1], -1), -1, keepdim=True))
    kept_shares_NK = shares_V.to(dtype)[kept_NK].masked_fill(~used_NK, 0.0)
    left_N1 = 1.0 - kept_shares_NK.sum(-1, keepdim=True)
    nothing_N1 = left_N1 <= 1e-6
    return mass_N1.masked_fill(nothing_N1, 0.0), left_N1.masked_fill(nothing_N1, 1.0)


def are_kept(ids_NU: Tensor, kept_NK: Tensor) -> Tensor:
    """Which of the drawn ids are among the kept ones. bool [N, U]."""
    return (ids_NU[:, :, None] == kept_NK[:, None, :]).any(-1)
