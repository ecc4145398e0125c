"""How far a student's distribution is from its teacher's: one formula each, on log-probabilities.

Enters: log p (teacher) and log q (student) [N, B] over B outcomes, of which each row's probabilities add up to one.
Leaves: a divergence per position [N], nats where it is a relative entropy. Costs: some [N, B] buffers.

The outcomes are the V ids where the teacher's whole vocabulary is known (the `hidden` tier, or K = V), else B = K + 1
buckets: the K kept ids and one for all others. What the tail bucket does, for each:

  forward_kl, reverse_kl, jensen_shannon, total_variation are f-divergences, and merging outcomes never raises one (data
  processing; Csiszár 1967). So on buckets each is a lower bound of its value over V, zero exactly where the buckets
  agree, and blind to how the student spreads the tail's mass. Nothing is renormalised over the kept ids: that would
  teach that the tail is empty.
  squared_error on buckets is the squared length of p − q projected onto what is constant inside each bucket: also a
  lower bound, see there.
  cosine needs single logits of all V ids: no tail bucket stands for them.

The gradient's size as T grows (u = z / T, p − q → (z_teacher − z_student) / (V · T) for zero-mean logits, and
∂/∂z = 1/T · ∂/∂u; Hinton et al. 2015, §2) gives each its factor, which `Objective` multiplies in:

  forward_kl, reverse_kl, jensen_shannon    quadratic in p − q near p = q: gradient ~ 1/T²    T²
  squared_error                             quadratic in p − q            : gradient ~ 1/T²    T²
  total_variation                           linear in p − q               : gradient ~ 1/T     T
  cosine                                    of z itself, T cancels                             1
"""

import math

import torch
from torch import Tensor

#: What a teacher probability of zero (a logit of −inf) counts as where the loss divides by it: 2⁻¹²⁶, float32's
#: smallest normal number.
LOG_IMPOSSIBLE = -126 * math.log(2)


def forward_kl(log_p_NB: Tensor, log_q_NB: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q). [N], nats.

    Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), §2; the chapter's §2.2. Mean-seeking: the student must cover all that
    the teacher says. Gradient with respect to u: q − p.
    With a top-k cache: a lower bound; the mass missing is Σ_{tail} p log(p/q) beyond the tail's own bucket, small at
    T = 1 where the kept ids hold the mass, and most of the loss at T = 4, where 64 ids of 49,152 hold 2 %. Prefer
    `sampled` where the gradient must be unbiased over V at T = 1, `hidden` for T > 2.
    """
    return times_log_ratio(log_p_NB.exp(), log_p_NB, log_q_NB).sum(-1)


def reverse_kl(log_p_NB: Tensor, log_q_NB: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ q (log q − log p). [N], nats.

    Gu et al. 2024 (MiniLLM, arXiv 2306.08543), eq. 1, here token by token on the stored positions, not on the student's
    own samples. Mode-seeking: the student is punished for what the teacher finds unlikely, and may leave modes out.
    With a top-k cache: a lower bound; the student's mass in the tail is held to the teacher's in sum only, so it may
    sit on any id of the tail, which is just what the reverse KL is asked to forbid: prefer `hidden`. From draws it is
    not
    determined: log p of what the student says is not known.
    Where p = 0 the value would be infinite; log p is then taken as −87.3 (`LOG_IMPOSSIBLE`), which is finite and steep.
    """
    log_p_NB = torch.where(torch.isneginf(log_p_NB), LOG_IMPOSSIBLE, log_p_NB)
    return times_log_ratio(log_q_NB.exp(), log_q_NB, log_p_NB).sum(-1)


def jensen_shannon(log_p_NB: Tensor, log_q_NB: Tensor, *, mixing: float) -> Tensor:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q. [N], nats, at most log 2.

    mixing: β in (0, 1); 1/2 is the chapter's §2.4, symmetric. Agarwal et al. 2024 (GKD, arXiv 2306.13649), eq. 1:
    divided by β it goes to the forward KL as β → 0, divided by 1 − β to the reverse KL as β → 1. Bounded, and finite
    for any p and q. Near p = q it is β (1 − β) times their KL, so its gradient is a quarter of the forward KL's at β =
    1/2. With a top-k cache: a lower bound as those are; prefer `hidden` above T = 2."""
    log_m_NB = _log_add(log_p_NB + math.log(mixing), log_q_NB + math.log1p(-mixing))
    of_p_N = times_log_ratio(log_p_NB.exp(), log_p_NB, log_m_NB).sum(-1)
    of_q_N = times_log_ratio(log_q_NB.exp(), log_q_NB, log_m_NB).sum(-1)
    return mixing * of_p_N + (1.0 - mixing) * of_q_N


def total_variation(log_p_NB: Tensor, log_q_NB: Tensor) -> Tensor:
    """½ Σ |p − q|. [N], in 0 … 1.

    Wen et al. 2023 (f-distill, arXiv 2307.15190), §3: symmetric, and bounded, so that no single outcome rules. Its
    gradient with respect to u is ½ q (s − Σ q s), s = sign(q − p): that of probabilities, not of their logs, so that it
    all but leaves rare ids alone; at p = q its size does not go to zero, the sign decides.
    With a top-k cache: a lower bound, off by at most the smaller of the two tail masses; at T = 1 the kept ids decide.
    """
    return 0.5 * (log_p_NB.exp() - log_q_NB.exp()).abs().sum(-1)


def squared_error(log_p_NB: Tensor, log_q_NB: Tensor, sizes_NB: Tensor | None = None) -> Tensor:
    """Σ (p − q)² / size, a sum over outcomes, not a mean. [N].

    The chapter's §2.4, ‖p − q‖² (of softened probabilities; the Brier score against a soft target, Brier 1950).
    sizes_NB: ids in each outcome; None: one each. A tail of n ids adds (p_tail − q_tail)² / n, as Σ_{tail} (p − q)² is
    at least that (Cauchy, Schwarz), with equality where the difference is spread evenly: a lower bound over V, exact
    for K = V. For all but tiny n the tail adds nothing, and its mass is held only through the kept ids: with a top-k
    cache at T = 4, where these hold 2 %, nearly nothing is taught. Prefer `hidden`. Its gradient in the limit of high T
    is 2 / V of the forward KL's: its weight must be far larger."""
    squares_NB = (log_p_NB.exp() - log_q_NB.exp()).square()
    return (squares_NB if sizes_NB is None else squares_NB / sizes_NB).sum(-1)


def cosine(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """1 − z_teacher · z_student / (‖z_teacher‖ ‖z_student‖). [N], in 0 … 2.

    The chapter's §2.4, on raw logits of all V ids. The scale of either does not count, so no temperature does; a
    constant added to all logits, which no softmax sees, does count: the teacher's own zero is taught with it. K logits
    and a log-sum give neither the product nor the length over V: refused unless K = V. Use `hidden`. A teacher logit of
    −inf, an id it can never say, is left out on both sides."""
    some_NV = ~torch.isneginf(teacher_NV)
    teacher_NV, student_NV = torch.where(some_NV, teacher_NV, 0.0), torch.where(some_NV, student_NV, 0.0)
    # Unit vectors first: the product of two lengths, or a square, leaves float32 sooner.
    return 1.0 - (_unit(teacher_NV) * _unit(student_NV)).sum(-1)


def _unit(x_NV: Tensor) -> Tensor:
    """x over its length, and over 1e-8 where that is less, as torch's cosine_similarity does."""
    size_N1 = x_NV.detach().abs().amax(-1, keepdim=True).clamp_min(1e-8)
    scaled_NV = x_NV / size_N1
    # The clamp acts on a row of zeros only, and keeps the root's slope finite there.
    lengths_N1: Tensor = scaled_NV.square().sum(-1, keepdim=True).clamp_min(1e-16).sqrt()
    return scaled_NV / lengths_N1


def times_log_ratio(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p · (log p − log q), and 0 with a zero gradient where p = 0, whatever the logs are."""
    some = p > 0
    zero = torch.zeros((), dtype=p.dtype, device=p.device)
    return torch.where(some, p, zero) * (torch.where(some, log_p, zero) - torch.where(some, log_q, zero))


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b); −inf with a zero gradient where both are (torch.logaddexp's is NaN)."""
    none = torch.isneginf(a) & torch.isneginf(b)
    zero = torch.zeros((), dtype=a.dtype, device=a.device)
    sum_ = torch.logaddexp(torch.where(none, zero, a), torch.where(none, zero, b))
    return torch.where(none, torch.full_like(sum_, -torch.inf), sum_)
