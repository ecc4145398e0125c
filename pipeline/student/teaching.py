"""Which part of a store teaches, and its loss.

Enters: the part, and what its loss needs beside the positions: the teacher's output head, the step of the gaps. Leaves:
the loss of a step's positions, distillation and text together. Costs: those of the losses.

    topk      KL over the kept ids and one bucket for the rest, any temperature          losses.forward_kl
    sampled   cross-entropy with the draws' shares, temperature 1                        sampled_loss
    hidden    KL over the whole vocabulary, rebuilt from hidden states, any temperature  full_logits.hidden_kl
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stillroom.pipeline.student.config import teaching_part
from stillroom.pipeline.student.full_logits import Kept, TeacherHead, full_logits, hidden_kl, load_head
from stillroom.pipeline.student.losses import (
    SLICE_ELEMENTS,
    LossSums,
    Targets,
    combine,
    cross_entropy,
    forward_kl,
    slices,
)
from stillroom.pipeline.student.sampled_loss import sampled_cross_entropy
from stillroom.storage.files import open_files
from stillroom.storage.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Teaching:
    """part: "topk", "sampled" or "hidden". head: for hidden. gap_step: of the top-k beside the hidden states."""

    part: str
    head: TeacherHead | None = None
    gap_step: float | None = None

    @staticmethod
    def of(asked: str, snapshot: Snapshot, device: torch.device) -> "Teaching":
        """For `losses.signal` = asked. Raises UnsupportedSignal if the store does not hold the part, StoreError or
        CorruptShard if its output head cannot be read."""
        spec = snapshot.identity.signal
        part = teaching_part(asked, spec)
        head = load_head(open_files(snapshot.uri), device) if part == "hidden" else None
        return Teaching(part, head, spec.topk.gap_step if spec.topk else None)

    @property
    def reads(self) -> frozenset[str]:
        """The parts that a student reads: the one that teaches, and the top-k against which it is evaluated."""
        return frozenset({self.part, "topk"})

    def loss(self, logits_NV: Tensor, targets: Targets, *, temperature: float) -> Tensor:
        """Σ_n w_n · loss_n, a scalar; with T² where it is a KL. logits_NV: of the real vocabulary."""
        if self.part == "hidden":
            assert self.head is not None
            assert targets.hidden is not None
            return hidden_kl(
                logits_NV, self.head, targets.hidden, self._kept(targets), temperature=temperature,
                weights_N=targets.weights,
            )  # fmt: skip
        if self.part == "sampled":
            assert targets.drawn_ids is not None
            assert targets.drawn_counts is not None
            return sampled_cross_entropy(
                logits_NV, targets.drawn_ids, targets.drawn_counts, temperature=temperature, weights_N=targets.weights
            )
        assert targets.ids is not None
        assert targets.logits is not None
        assert targets.tail_lse is not None
        return forward_kl(
            logits_NV, targets.ids, targets.logits, targets.tail_lse, temperature=temperature,
            weights_N=targets.weights,
        )  # fmt: skip

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


def distillation_loss(
    logits_NV: Tensor,
    targets: Targets,
    *,
    alpha: float,
    temperature: float,
    vocabulary: int,
    teaching: Teaching = TOPK,
    slice_elements: int = SLICE_ELEMENTS,
) -> LossSums:
    """The loss of N positions, as sums: alpha · distillation + (1 − alpha) · cross-entropy on the text.

    logits_NV: as the student returns them; columns from `vocabulary` on are padding of its head and are cut off
    before any softmax. The logits themselves exist once, in their own dtype; the float32 work goes in slices of
    at most `slice_elements` numbers, recomputed in the backward pass (hidden states: made once, in the forward pass).
    """
    rows = max(1, slice_elements // vocabulary)
    real_NV = logits_NV[:, :vocabulary]
    whole = teaching.part == "hidden"

    def kd_of(part_NV: Tensor, part: Targets) -> Tensor | None:
        return teaching.loss(part_NV, part, temperature=temperature) if alpha > 0 else None

    def one(part_NV: Tensor, part: Targets) -> tuple[Tensor | None, Tensor | None]:
        ce = cross_entropy(part_NV, part.labels, weights_N=part.weights) if alpha < 1 else None
        return None if whole else kd_of(part_NV, part), ce

    if len(real_NV) <= rows:
        kd, ce = one(real_NV, targets)
    elif whole and alpha == 1:
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
    return LossSums(combine(kd, ce, alpha=alpha), kd, ce)
