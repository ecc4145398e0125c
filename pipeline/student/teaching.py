"""Which part of a store teaches, and its loss.

Enters: the part, and what its loss needs beside the positions: the teacher's output head, the step of the gaps. Leaves:
the loss of a step's positions, distillation and text together. Costs: those of the losses.

    topk      over the kept ids and one bucket for the rest, any temperature                losses.buckets
    sampled   cross-entropy with the draws' shares (forward KL), temperature 1              sampled_loss
    topk+sampled   the KL of topk, and the tail's own shares from the draws, temperature 1  sampled_loss
    hidden    over the whole vocabulary, rebuilt from hidden states, any temperature        full_logits.hidden_loss

`distillation_loss` is the plain form, on the student's logits; `distillation_loss_fused` has the student's head in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stillroom.pipeline.student.config import teaching_part
from stillroom.pipeline.student.full_logits import Kept, TeacherHead, full_logits, full_loss, hidden_loss, load_head
from stillroom.pipeline.student.losses import (
    SLICE_ELEMENTS,
    LossSums,
    Objective,
    StudentHead,
    Targets,
    combine,
    cross_entropy,
    fused_loss,
    slices,
    sparse_loss,
)
from stillroom.pipeline.student.losses.fused import BLOCK_ELEMENTS, FUSED_ELEMENTS
from stillroom.pipeline.student.losses.sparse import sparse_slice
from stillroom.pipeline.student.sampled_loss import sampled_cross_entropy, tail_cross_entropy
from stillroom.storage.files import open_files
from stillroom.storage.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Teaching:
    """part: "topk", "sampled", "topk+sampled" or "hidden". head: for hidden. gap_step: of the top-k beside it."""

    part: str
    head: TeacherHead | None = None
    gap_step: float | None = None

    @staticmethod
    def of(asked: str, snapshot: Snapshot, device: torch.device) -> "Teaching":
        """For `losses.signal` = asked.

        Raises UnsupportedSignal if the store does not hold the part, StoreError or CorruptShard if its output head
        cannot be read."""
        spec = snapshot.identity.signal
        part = teaching_part(asked, spec)
        head = load_head(open_files(snapshot.uri), device) if part == "hidden" else None
        return Teaching(part, head, spec.topk.gap_step if spec.topk else None)

    @property
    def reads(self) -> frozenset[str]:
        """The parts that a student reads: what teaches, and the top-k against which it is evaluated."""
        return frozenset({*self.part.split("+"), "topk"})

    def loss(self, logits_NV: Tensor, targets: Targets, *, objective: Objective) -> Tensor:
        """Σ_n w_n · (the objective's output losses)_n, a scalar. logits_NV: of the real vocabulary."""
        if self.part == "hidden":
            assert self.head is not None
            assert targets.hidden is not None
            return hidden_loss(
                logits_NV, self.head, targets.hidden, self._kept(targets), objective=objective,
                weights_N=targets.weights,
            )  # fmt: skip
        if self.part == "sampled":
            assert targets.drawn_ids is not None
            assert targets.drawn_counts is not None
            assert objective.weights.keys() == {"forward_kl"}
            return objective.weights["forward_kl"] * sampled_cross_entropy(
                logits_NV, targets.drawn_ids, targets.drawn_counts, temperature=objective.temperature,
                weights_N=targets.weights,
            )  # fmt: skip
        loss = sparse_loss(logits_NV, targets, objective=objective)
        if self.part == "topk+sampled":
            assert targets.ids is not None
            assert targets.drawn_ids is not None
            assert targets.drawn_counts is not None
            assert objective.weights.keys() == {"forward_kl"}
            loss = loss + objective.weights["forward_kl"] * tail_cross_entropy(
                logits_NV, targets.ids, targets.drawn_ids, targets.drawn_counts, temperature=objective.temperature,
                weights_N=targets.weights,
            )  # fmt: skip
        return loss

    def slice_loss(
        self, z_PV: Tensor, targets: Targets, objective: Objective, wanted: bool, spare: Iterator[Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(kd, ce) of a slice of logits, and with `wanted` their gradient in place of them: what `fused_loss` calls."""
        if self.part != "hidden" or not objective.distils:
            return sparse_slice(z_PV, targets, objective, self.part, wanted, spare)
        assert self.head is not None
        assert targets.hidden is not None
        teacher_PV = full_logits(self.head, targets.hidden, self._kept(targets), temperature=objective.temperature)
        with torch.set_grad_enabled(wanted):
            leaf_PV = z_PV.detach().requires_grad_(wanted)
            kd = full_loss(leaf_PV, teacher_PV, objective=objective, weights_N=targets.weights)
            ce = _text(leaf_PV, targets, objective)
            total = combine(kd, ce, alpha=objective.alpha)
        if wanted:
            z_PV.copy_(torch.autograd.grad(total, leaf_PV)[0])
        return kd.detach(), None if ce is None else ce.detach()

    def rebuilt(self, targets: Targets) -> Tensor | None:
        """The teacher's logits at temperature 1, float32 [N, V], where hidden states are read; else None."""
        if self.head is None or targets.hidden is None:
            return None
        return full_logits(self.head, targets.hidden, self._kept(targets), temperature=1.0)

    def _kept(self, targets: Targets) -> Kept | None:
        if targets.ids is None:
            return None
        assert targets.logits is not None
        assert targets.tail_lse is not None
        return Kept(targets.ids, targets.logits, targets.tail_lse, self.gap_step)


#: Of a store with the top-k part alone.
TOPK = Teaching("topk")


def _text(logits_NV: Tensor, targets: Targets, objective: Objective) -> Tensor | None:
    if not objective.reads_text:
        return None
    return cross_entropy(
        logits_NV, targets.labels, weights_N=targets.weights, label_smoothing=objective.label_smoothing
    )


def distillation_loss(
    logits_NV: Tensor,
    targets: Targets,
    *,
    objective: Objective,
    vocabulary: int,
    teaching: Teaching = TOPK,
    slice_elements: int = SLICE_ELEMENTS,
) -> LossSums:
    """The loss of N positions, as sums: alpha · distillation + (1 − alpha) · cross-entropy on the text. The plain form.

    logits_NV: as the student returns them; columns from `vocabulary` on are padding of its head and are cut off
    before any softmax. The logits themselves exist once, in their own dtype; the float32 work goes in slices of
    at most `slice_elements` numbers, recomputed in the backward pass (hidden states: made once, in the forward pass).
    """
    rows = max(1, slice_elements // vocabulary)
    real_NV = logits_NV[:, :vocabulary]
    whole = teaching.part == "hidden"

    def kd_of(part_NV: Tensor, part: Targets) -> Tensor | None:
        return teaching.loss(part_NV, part, objective=objective) if objective.distils else None

    def one(part_NV: Tensor, part: Targets) -> tuple[Tensor | None, Tensor | None]:
        return None if whole else kd_of(part_NV, part), _text(part_NV, part, objective)

    if len(real_NV) <= rows:
        kd, ce = one(real_NV, targets)
    elif whole and not objective.reads_text:
        kd = ce = None
    else:
        # split, not indexing: its backward joins the slices once, indexing would add up a full-size zero tensor each.
        sums = [
            checkpoint(one, part_NV, part, use_reentrant=False, preserve_rng_state=False)
            for part_NV, part in zip(slices(real_NV, rows), targets.split(rows), strict=True)
        ]
        kd, ce = (None if sums[0][i] is None else torch.stack([s[i] for s in sums]).sum() for i in (0, 1))
    if whole:
        kd = kd_of(real_NV, targets)
    return LossSums(combine(kd, ce, alpha=objective.alpha), kd, ce)


def distillation_loss_fused(
    hidden_ND: Tensor,
    head: StudentHead,
    targets: Targets,
    *,
    objective: Objective,
    vocabulary: int,
    teaching: Teaching = TOPK,
    slice_elements: int = FUSED_ELEMENTS,
    again: bool = False,
) -> LossSums:
    """`distillation_loss` of `head.logits(hidden_ND)`, which exist for one slice of positions only; see
    `fused_loss`."""
    return fused_loss(
        hidden_ND, head, targets, objective=objective, vocabulary=vocabulary, slice_loss=teaching.slice_loss,
        slice_elements=slice_elements, block_elements=None if teaching.part == "hidden" else BLOCK_ELEMENTS,
        again=again,
    )  # fmt: skip
