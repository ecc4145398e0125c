"""The loss between attention maps: KL of what each position looks at.

Enters: the student's maps [B, H, T, T], and the teacher's weights at the M trained positions. Leaves: a sum over
positions in float32 (float64 as it is). Costs: what is looked at, Σ (t + 1) numbers a head, gathered out of the maps.

    L = Σ_m w_m Σ_h KL(A_h,m of the teacher ‖ A_h,m of the student)

summed over the layers of the map (the chapter, §4.3), or of both averages over heads. A position looks at the tokens of
its own sequence up to itself, so a packed row's sequences stay apart: nothing else of the maps is read.

The student's weights are what its softmax gave: there are no scores to take the logarithm of, as the chapter's losses
on logits have. A weight below `LEAST` counts as `LEAST` and gets no gradient: it adds at most 69 nats times the
teacher's weight there, where log 0 would be infinite.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.pipeline.student.losses.targets import precise

LEAST = 1e-30


@dataclass(frozen=True)
class MapTargets:
    """The teacher's maps at M positions, N = Σ (t + 1) numbers a head.

    weights: float32 [n, H, N], of n layers; each position's sum to 1, or all are 0. at: int64 [N], where they lie in
    the student's maps, flat over [B, T, T]. position: int64 [N], to which of the M positions they belong.
    """

    weights: Tensor
    at: Tensor
    position: Tensor

    def to(self, device: torch.device) -> "MapTargets":
        return MapTargets(self.weights.to(device), self.at.to(device), self.position.to(device))


def attention_loss(maps_BHTT: Tensor, targets: MapTargets, layer: int, *, weights_M: Tensor) -> Tensor:
    """Σ_m w_m Σ_h KL_m,h, a scalar. layer: place among the targets' n. Where the targets have one head and the student
    more, its maps are averaged. Only the student gets a gradient; a position of zeros adds nothing."""
    teacher_HN = targets.weights[layer].detach()
    student_HN = precise(maps_BHTT.transpose(0, 1).flatten(1)[:, targets.at])
    if len(teacher_HN) == 1:
        student_HN = student_HN.mean(0, keepdim=True)
    teacher_HN = teacher_HN.to(student_HN.dtype)
    # xlogy: 0 log 0 is 0.
    kl_HN = torch.xlogy(teacher_HN, teacher_HN) - teacher_HN * student_HN.clamp_min(LEAST).log()
    return (kl_HN * weights_M.to(kl_HN.dtype)[targets.position]).sum()
