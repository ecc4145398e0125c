"""Relation knowledge: how similar the tokens of a sequence are to each other, in both models.

Enters: hidden states of M trained positions of both models, and how many of them belong to each sequence. Leaves: a sum
over positions in float32 (float64 as it is). Costs: m² · (D + D') for a sequence of m trained positions.

With G the Gram matrix of a sequence's states, each at length 1 (so G_ij is the cosine of tokens i and j),

    L = Σ_i w_i · (1 / m) Σ_j (G_ij of the student − G_ij of the teacher)²

(the chapter's relation level, §1.3; similarity-preserving distillation, Tung & Mori 2019, with tokens in place of
images). Widths may differ and nothing is projected. Similarities across the border of a sequence are never looked at.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from stillroom.pipeline.student.features.hidden import directions
from stillroom.pipeline.student.losses.targets import precise


def relation_loss(student_MD: Tensor, teacher_ME: Tensor, *, runs: Seq[int], weights_M: Tensor) -> Tensor:
    """Σ_i w_i · L_i, a scalar. runs: trained positions of each sequence, in order, M in all; none may be empty. Only
    the student gets a gradient."""
    student_MD = precise(student_MD)
    teacher_ME = teacher_ME.detach().to(student_MD.dtype)
    weights_M = weights_M.to(student_MD.dtype)
    parts = []
    for student_mD, teacher_mE, weights_m in zip(
        torch.split(directions(student_MD), list(runs)), torch.split(directions(teacher_ME), list(runs)),
        torch.split(weights_M, list(runs)), strict=True,
    ):  # fmt: skip
        difference_mm = student_mD @ student_mD.T - teacher_mE @ teacher_mE.T
        parts.append((difference_mm.square().mean(-1) * weights_m).sum())
    return torch.stack(parts).sum()
