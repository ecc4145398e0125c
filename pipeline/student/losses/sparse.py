"""Value and gradient of one slice of positions where no teacher logits of the whole vocabulary are needed.

Enters: a slice of the student's logits [P, V], its targets and an objective. Leaves: the sums, and the gradient in
place of the logits. Costs: no other [P, V] buffer (one, where distillation at T ≠ 1 and text are mixed), and few
passes.

P positions, V vocabulary, K kept ids, B = K + 1 buckets.

All that a loss sees of the student are the K logits and the tail's log-sum ℓ at the temperature, and at 1 for the text.
So its gradient is made by autograd on these K + 1 numbers, with the very functions of the eager form, and spread by
hand:

    ∂L/∂z_i = g_i / T  (i kept),    ∂L/∂z_m = g_ℓ / T · softmax_tail(z / T)_m  (m in the tail)

For the forward KL this is q_i − p_i, and (q_tail − p_tail) · softmax_tail in the tail, times T. One exp of each logit
serves the log-sum, the spread and, at T = 1, the text.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from stillroom.pipeline.student.losses.buckets import Buckets, used_slots
from stillroom.pipeline.student.losses.objective import Objective
from stillroom.pipeline.student.losses.targets import Targets
from stillroom.pipeline.student.sampled_loss import are_kept


class Tail:
    """Σ over what is left in z [P, V] (the kept ids are −inf there), by temperature."""

    def __init__(self, exp_PV: Tensor, top_P1: Tensor, temperature: float) -> None:
        """exp_PV: exp((z − top) / T)."""
        self.exp_PV = exp_PV
        self.sum_P1 = exp_PV.sum(-1, keepdim=True)
        self._top_P1 = top_P1 / temperature

    @property
    def lse_P1(self) -> Tensor:
        """log Σ exp(z / T); −inf where nothing is left."""
        return self.sum_P1.log() + self._top_P1

    def share_P1(self, of_lse_P1: Tensor) -> Tensor:
        """exp_PV · share = exp(z / T − lse)."""
        return torch.exp(self._top_P1 - of_lse_P1)


def sparse_slice(
    z_PV: Tensor,
    targets: Targets,
    objective: Objective,
    part: str,
    wanted: bool,
    spare: Iterator[Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """(kd, ce), sums of weight · loss; and with `wanted` the gradient of alpha · kd + (1 − alpha) · ce in z_PV, which
    is overwritten in any case.

    part: "topk", "sampled" or "topk+sampled", what teaches. spare: gives a buffer like z_PV where one is needed.
    """
    alpha, temperature = objective.alpha, objective.temperature
    weights_P1 = targets.weights.to(z_PV.dtype)[:, None]
    labels_P1 = targets.labels[:, None]
    label_P1 = z_PV.gather(1, labels_P1)
    smoothing = objective.label_smoothing if objective.reads_text else 0.0
    mean_P1 = z_PV.mean(1, keepdim=True) if smoothing else None
    kept = _Kept(z_PV, targets) if objective.distils and "topk" in part else None
    drawn = _Drawn(z_PV, targets, outside_kept=kept is not None) if objective.distils and "sampled" in part else None
    if kept is not None:
        z_PV.scatter_(1, kept.ids_PK, -torch.inf)
    soft, text = _tails(z_PV, objective, spare)

    kd = ce = None
    z_scale_P1 = torch.zeros_like(weights_P1)  # gradient in the tail = exp_PV · scale
    text_scale_P1 = torch.zeros_like(weights_P1)
    kept_grad_PK = None
    if kept is not None:
        kd, grad_PB = kept.loss(soft.lse_P1, targets, objective, z_PV.shape[1])
        if drawn is not None:
            weight = objective.weights["forward_kl"]
            kd = kd + weight * (drawn.cross_entropy_P1(soft.lse_P1) * weights_P1).sum()
            grad_PB[:, -1:] += weight * weights_P1 * drawn.share_P1
        grad_PB = grad_PB * (alpha / temperature)
        kept_grad_PK = grad_PB[:, :-1]
        z_scale_P1 = grad_PB[:, -1:] / soft.sum_P1.clamp_min(torch.finfo(z_PV.dtype).tiny)
    elif drawn is not None:
        weight = objective.weights["forward_kl"]
        kd = weight * (drawn.cross_entropy_P1(soft.lse_P1) * weights_P1).sum()
        z_scale_P1 = alpha * weight * weights_P1 * soft.share_P1(soft.lse_P1)
    if text is not None:
        lse_P1 = text.lse_P1 if kept is None else torch.logsumexp(torch.cat([kept.masked_PK, text.lse_P1], 1), 1, True)
        aim_P1 = label_P1 if mean_P1 is None else (1 - smoothing) * label_P1 + smoothing * mean_P1
        ce = ((lse_P1 - aim_P1) * weights_P1).sum()
        text_weights_P1 = (1 - alpha) * weights_P1
        text_scale_P1 = text_weights_P1 * text.share_P1(lse_P1)
        if kept is not None and kept_grad_PK is not None:
            kept_grad_PK = kept_grad_PK + text_weights_P1 * torch.exp(kept.masked_PK - lse_P1)
    if not wanted:
        return kd, ce

    if text is None or text is soft:
        z_PV.mul_(z_scale_P1 + text_scale_P1)
    else:
        z_PV.mul_(z_scale_P1).addcmul_(text.exp_PV, text_scale_P1)
    if kept is not None and kept_grad_PK is not None:
        z_PV.scatter_(1, kept.ids_PK, torch.where(kept.used_PK, kept_grad_PK, kept_grad_PK[:, :1]))
    if drawn is not None:
        z_PV.scatter_add_(1, drawn.ids_PU, drawn.shares_PU * (-alpha * objective.weights["forward_kl"] * weights_P1))
    if text is not None:
        z_PV.scatter_add_(1, labels_P1, -(1 - smoothing) * text_weights_P1)
        if smoothing:
            z_PV.sub_(text_weights_P1 * (smoothing / z_PV.shape[1]))
    return kd, ce


def _tails(z_PV: Tensor, objective: Objective, spare: Iterator[Tensor]) -> tuple[Tail, Tail | None]:
    """Of what is left in z: at the temperature, whose exps then lie in z, and for the text, where it is read; one and
    the same where that can be."""
    temperature = objective.temperature
    top_P1 = z_PV.amax(1, keepdim=True)
    top_P1.masked_fill_(torch.isneginf(top_P1), 0.0)
    z_PV.sub_(top_P1)
    if objective.reads_text and (temperature == 1.0 or not objective.distils):
        both = Tail(z_PV.exp_(), top_P1, 1.0)
        return both, both
    text = Tail(torch.exp(z_PV, out=next(spare)), top_P1, 1.0) if objective.reads_text else None
    if temperature != 1.0:
        z_PV.mul_(1.0 / temperature)
    return Tail(z_PV.exp_(), top_P1, temperature), text


class _Kept:
    """The student's logits of the kept ids; an unused slot repeats its row's first id."""

    def __init__(self, z_PV: Tensor, targets: Targets) -> None:
        assert targets.ids is not None
        self.used_PK, self.ids_PK = used_slots(targets.ids)
        self.masked_PK = z_PV.gather(1, self.ids_PK).masked_fill_(~self.used_PK, -torch.inf)

    def loss(self, tail_P1: Tensor, targets: Targets, objective: Objective, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Σ weight · loss, and its gradient with respect to the buckets' logits at the temperature [P, B]."""
        assert targets.logits is not None
        assert targets.tail_lse is not None
        temperature = objective.temperature
        with torch.enable_grad():
            leaf_PB = torch.cat([self.masked_PK / temperature, tail_P1], 1).requires_grad_()
            found = Buckets.join(
                leaf_PB, self.used_PK, targets.logits, targets.tail_lse, temperature=temperature, vocabulary=vocabulary
            )
            total = (objective.buckets(found) * targets.weights.to(leaf_PB.dtype)).sum()
        (grad_PB,) = torch.autograd.grad(total, leaf_PB)
        return total.detach(), grad_PB


class _Drawn:
    """The shares of all draws, or of those that are not kept, and the sum of the student's logits under them."""

    def __init__(self, z_PV: Tensor, targets: Targets, *, outside_kept: bool) -> None:
        assert targets.drawn_ids is not None
        assert targets.drawn_counts is not None
        counts_PU = targets.drawn_counts.to(z_PV.dtype)
        self.shares_PU = counts_PU / counts_PU.sum(-1, keepdim=True)
        self.ids_PU = targets.drawn_ids.clamp_min(0)
        if outside_kept:
            assert targets.ids is not None
            self.shares_PU.masked_fill_(are_kept(self.ids_PU, targets.ids), 0.0)
        self.share_P1 = self.shares_PU.sum(-1, keepdim=True)
        # An unused slot reads id 0, whose logit may be −inf, and 0 · −inf is NaN.
        drawn_PU = torch.where(self.shares_PU > 0, z_PV.gather(1, self.ids_PU), 0.0)
        self._sum_P1 = (self.shares_PU * drawn_PU).sum(-1, keepdim=True)

    def cross_entropy_P1(self, lse_P1: Tensor) -> Tensor:
        """Σ share · (lse − z), lse over the ids that may have been drawn; 0 where none was."""
        return torch.where(self.share_P1 > 0, self.share_P1 * lse_P1 - self._sum_P1, 0.0)
