"""The loss on draws from the teacher: cross-entropy with their shares, at temperature 1.

Enters: the student's logits [N, V] and the distinct ids and counts of each position's draws. Leaves: a sum over
positions in float32 (float64 for float64 logits). Costs: one [N, V] buffer forward and one backward.

N positions, V vocabulary, U distinct drawn ids (the widest position's; others are padded).

With p̂ = counts / draws and q the student's softmax (Sparse Logit Sampling, arXiv 2503.16870),

    −Σ_i p̂_i log q_i = logsumexp(z) − Σ_i p̂_i z_i,      gradient q − p̂

The loss is linear in p̂ and p̂ is unbiased, so value and gradient have the mean of the full cross-entropy −Σ p log q over
the whole vocabulary. It is not a KL: its least value is the teacher's entropy, not zero. The entropy of p̂ is not
subtracted, as it is no unbiased estimate of that of p.
"""

import torch
from torch import Tensor

from stillroom.storage.errors import UnsupportedSignal


def require_unit_temperature(temperature: float) -> None:
    """Raises UnsupportedSignal unless the loss's temperature is 1.

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
