"""The distillation loss on what a store keeps: K ids and one bucket for all others, at any temperature in 1 … 10.

Enters: the student's logits [N, V] and the teacher's K logits and tail. Leaves: sums over positions in float32
(float64 for float64 logits); the caller divides by the trained weight of the whole optimizer step. Costs: about
four [rows, V] buffers for one slice of positions; larger inputs go slice by slice, recomputed in the backward pass.

N positions, V vocabulary, K kept ids.

With p, q the teacher's and student's softmax at temperature T (Hinton et al. 2015),

    T² · [ Σ_{i kept} p_i log(p_i / q_i) + p_tail log(p_tail / q_tail) ],   p_tail = Σ_{i not kept} p_i

is KL on the partition {kept ids, the rest}: at most the full KL, zero only if all buckets agree, and equal to it
for K = V. Nothing is renormalised. Both tails are log-sums over the ids not kept, never 1 − Σ kept: at T = 4 the
kept ids hold 2 % of the mass, at T = 1 sometimes 1 − 1e-7, and one of the two would always cancel.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

#: Logits per slice of positions: 256 MiB per float32 buffer, 1,365 positions at V = 49,152.
SLICE_ELEMENTS = 2**26


@dataclass(frozen=True)
class Targets:
    """What N positions are trained on.

    labels: int64 [N], the next token. weights: float32 [N].
    ids: int64 [N, K], distinct in each row; logits: float32 [N, K], raw, in nats; tail_lse: float32 [N],
    log Σ_{i not kept} exp(z_i / T) at the temperature of the loss, −inf where nothing is left out. Where a row keeps
    fewer than K, its unused slots hold id −1 and logit −inf.
    drawn_ids: int64 [N, U], drawn_counts: int64 [N, U]: distinct drawn ids of each row, −1 and 0 in unused slots.
    hidden: float32 [N, D], the teacher's final hidden state.
    A part that the store does not keep is None; all are for a corpus without signal.
    """

    labels: Tensor
    weights: Tensor
    ids: Tensor | None = None
    logits: Tensor | None = None
    tail_lse: Tensor | None = None
    drawn_ids: Tensor | None = None
    drawn_counts: Tensor | None = None
    hidden: Tensor | None = None

    def to(self, device: torch.device) -> "Targets":
        return Targets(*(None if t is None else t.to(device) for t in self._tensors()))  # type: ignore[arg-type]

    def split(self, rows: int) -> list["Targets"]:
        """Consecutive slices of `rows` positions."""
        count = -(-len(self.labels) // rows)
        columns = [[None] * count if t is None else slices(t, rows) for t in self._tensors()]
        return [Targets(*column) for column in zip(*columns, strict=True)]

    def _tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class LossSums:
    """Sums of weight · loss over positions, scalars. A part whose coefficient is zero is not computed: None."""

    total: Tensor
    kd: Tensor | None
    ce: Tensor | None


def slices(tensor: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Consecutive slices of the first axis."""
    return torch.split(tensor, rows)


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _safe_logsumexp(x_NV: Tensor) -> Tensor:
    """log Σ exp over the last axis; a row of −inf gives −inf with a zero gradient (torch.logsumexp's is NaN)."""
    top_N1 = x_NV.detach().amax(-1, keepdim=True)
    top_N1 = torch.where(torch.isneginf(top_N1), torch.zeros_like(top_N1), top_N1)
    sum_N = (x_NV - top_N1).exp().sum(-1)
    empty_N = sum_N == 0
    log_N = torch.where(empty_N, torch.ones_like(sum_N), sum_N).log() + top_N1.squeeze(-1)
    return torch.where(empty_N, torch.full_like(log_N, -torch.inf), log_N)


def _times_log_ratio(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p · (log p − log q), and 0 with a zero gradient where p = 0, whatever the logs are."""
    some = p > 0
    zero = torch.zeros((), dtype=p.dtype, device=p.device)
    return torch.where(some, p, zero) * (torch.where(some, log_p, zero) - torch.where(some, log_q, zero))


def bucket_kl(
    student_logits_NV: Tensor, ids_NK: Tensor, logits_NK: Tensor, tail_lse_N: Tensor, *, temperature: float
) -> Tensor:
    """KL(teacher ‖ student) at the temperature, over the K ids and the tail bucket, without T². [N], nats.

    Gradients flow to the student's logits only. A teacher logit of −inf is a probability of zero, and an id of −1 an
    unused slot.
    """
    student_NV = _precise(student_logits_NV) / temperature
    teacher_NK = logits_NK.detach().to(student_NV.dtype) / temperature
    teacher_tail_N = tail_lse_N.detach().to(student_NV.dtype)
    teacher_all_N = torch.logaddexp(torch.logsumexp(teacher_NK, -1), teacher_tail_N)

    # An unused slot takes its row's first id, which leaves the tail as it is, and no mass of its own.
    unused_NK = ids_NK < 0
    ids_NK = torch.where(unused_NK, ids_NK[:, :1], ids_NK)
    kept_NK = student_NV.gather(-1, ids_NK).masked_fill(unused_NK, -torch.inf)
    tail_N = _safe_logsumexp(student_NV.scatter(-1, ids_NK, -torch.inf))
    all_N = torch.logaddexp(_safe_logsumexp(kept_NK), tail_N)

    log_p_NK = teacher_NK - teacher_all_N.unsqueeze(-1)
    log_p_tail_N = teacher_tail_N - teacher_all_N
    kept_N = _times_log_ratio(log_p_NK.exp(), log_p_NK, kept_NK - all_N.unsqueeze(-1)).sum(-1)
    return kept_N + _times_log_ratio(log_p_tail_N.exp(), log_p_tail_N, tail_N - all_N)


def forward_kl(
    student_logits_NV: Tensor,
    ids_NK: Tensor,
    logits_NK: Tensor,
    tail_lse_N: Tensor,
    *,
    temperature: float,
    weights_N: Tensor,
) -> Tensor:
    """Σ_n w_n · T² · KL_n, a scalar. T² keeps the gradient's size as T grows (Hinton et al. 2015, §2)."""
    kl_N = bucket_kl(student_logits_NV, ids_NK, logits_NK, tail_lse_N, temperature=temperature)
    return temperature**2 * (kl_N * weights_N.to(kl_N.dtype)).sum()


def cross_entropy(student_logits_NV: Tensor, labels_N: Tensor, *, weights_N: Tensor) -> Tensor:
    """Σ_n w_n · −log q_n(label_n) at temperature 1, a scalar."""
    nll_N = torch.nn.functional.cross_entropy(_precise(student_logits_NV), labels_N, reduction="none")
    return (nll_N * weights_N.to(nll_N.dtype)).sum()


def combine(kd: Tensor | None, ce: Tensor | None, *, alpha: float) -> Tensor:
    """alpha · kd + (1 − alpha) · ce, where a part may be missing only if its coefficient is zero."""
    if kd is None or ce is None:
        present = ce if kd is None else kd
        assert present is not None
        assert alpha == (0.0 if kd is None else 1.0), alpha
        return present
    return alpha * kd + (1.0 - alpha) * ce
