"""Teacher and student on what a store keeps: K ids and one bucket for all others, at any temperature in 1 … 10.

Enters: the student's logits [N, V] and the teacher's K logits and tail. Leaves: log-probabilities of K + 1 buckets, in
float32 (float64 for float64 logits). Costs: about four [N, V] buffers.

N positions, V vocabulary, K kept ids.

Nothing is renormalised. Both tails are log-sums over the ids not kept, never 1 − Σ kept: at T = 4 the kept ids hold 2 %
of the mass, at T = 1 sometimes 1 − 1e-7, and one of the two would always cancel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.pipeline.student.losses.divergences import forward_kl as kl
from stillroom.pipeline.student.losses.targets import precise


@dataclass(frozen=True)
class Buckets:
    """log_p, log_q: [N, K + 1], the tail last; −inf in unused slots of both. sizes: ids in each, at least 1.

    teacher, student: [N, K], the logits of the kept ids, divided by the temperature; −inf in unused slots.
    """

    log_p: Tensor
    log_q: Tensor
    sizes: Tensor
    teacher: Tensor
    student: Tensor

    @staticmethod
    def join(
        student_NB: Tensor, used_NK: Tensor, logits_NK: Tensor, tail_lse_N: Tensor, *, temperature: float,
        vocabulary: int,
    ) -> "Buckets":  # fmt: skip
        """From the student's K logits and its tail's log-sum, all at the temperature.

        student_NB: [N, K + 1], −inf in unused slots. The teacher's as in `Targets`.
        """
        teacher_NK = logits_NK.detach().to(student_NB.dtype) / temperature
        teacher_NB = torch.cat([teacher_NK, tail_lse_N.detach().to(student_NB.dtype)[:, None]], -1)
        sizes_NB = torch.ones_like(student_NB, requires_grad=False)
        sizes_NB[:, -1] = (vocabulary - used_NK.sum(-1)).clamp_min(1)
        return Buckets(
            teacher_NB - torch.logsumexp(teacher_NB, -1, keepdim=True),
            student_NB - safe_logsumexp(student_NB).unsqueeze(-1),
            sizes_NB,
            teacher_NK,
            student_NB[:, :-1],
        )

    @staticmethod
    def of(
        student_logits_NV: Tensor, ids_NK: Tensor, logits_NK: Tensor, tail_lse_N: Tensor, *, temperature: float
    ) -> "Buckets":
        """From all of the student's logits. Gradients flow to these only.

        A teacher logit of −inf is a probability of zero, and an id of −1 an unused slot.
        """
        student_NV = precise(student_logits_NV) / temperature
        used_NK, ids_NK = used_slots(ids_NK)
        kept_NK = student_NV.gather(-1, ids_NK).masked_fill(~used_NK, -torch.inf)
        tail_N = safe_logsumexp(student_NV.scatter(-1, ids_NK, -torch.inf))
        student_NB = torch.cat([kept_NK, tail_N[:, None]], -1)
        vocabulary = student_NV.shape[-1]
        return Buckets.join(student_NB, used_NK, logits_NK, tail_lse_N, temperature=temperature, vocabulary=vocabulary)


def used_slots(ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(used, ids): an unused slot takes its row's first id, which leaves the tail as it is."""
    used_NK = ids_NK >= 0
    return used_NK, torch.where(used_NK, ids_NK, ids_NK[:, :1])


def safe_logsumexp(x_NV: Tensor) -> Tensor:
    """log Σ exp over the last axis; a row of −inf gives −inf with a zero gradient (torch.logsumexp's is NaN)."""
    top_N1 = x_NV.detach().amax(-1, keepdim=True)
    top_N1 = torch.where(torch.isneginf(top_N1), torch.zeros_like(top_N1), top_N1)
    sum_N = (x_NV - top_N1).exp().sum(-1)
    empty_N = sum_N == 0
    log_N = torch.where(empty_N, torch.ones_like(sum_N), sum_N).log() + top_N1.squeeze(-1)
    return torch.where(empty_N, torch.full_like(log_N, -torch.inf), log_N)


def bucket_kl(
    student_logits_NV: Tensor, ids_NK: Tensor, logits_NK: Tensor, tail_lse_N: Tensor, *, temperature: float
) -> Tensor:
    """KL(teacher ‖ student) at the temperature, over the K ids and the tail bucket, without T². [N], nats."""
    found = Buckets.of(student_logits_NV, ids_NK, logits_NK, tail_lse_N, temperature=temperature)
    return kl(found.log_p, found.log_q)
