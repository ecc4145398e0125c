"""The losses on estimates of the teacher at temperature 1: cross-entropy with the shares of its draws, over all ids or
over what a top-k leaves.

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


def are_kept(ids_NU: Tensor, kept_NK: Tensor) -> Tensor:
    """Which of the drawn ids are among the kept ones. bool [N, U]."""
    return (ids_NU[:, :, None] == kept_NK[:, None, :]).any(-1)
