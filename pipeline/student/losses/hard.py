"""Cross-entropy on the text's own next tokens, at temperature 1.

Enters: the student's logits [N, V] and labels. Leaves: a sum over positions. Costs: one [N, V] buffer in float32, one
more backward. No signal is needed, and none biases it.
"""

import torch
from torch import Tensor

from stillroom.pipeline.student.losses.targets import precise


def cross_entropy(
    student_logits_NV: Tensor, labels_N: Tensor, *, weights_N: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Σ_n w_n · −Σ_i t_ni log q_ni, a scalar, nats.

    t = (1 − ε) · [i = label] + ε / V, ε = label_smoothing (Szegedy et al. 2016, arXiv 1512.00567, §7). Gradient: q − t.
    With ε > 0 an impossible id (a student's logit of −inf) makes it infinite.
    """
    nll_N = torch.nn.functional.cross_entropy(
        precise(student_logits_NV), labels_N, reduction="none", label_smoothing=label_smoothing
    )
    return (nll_N * weights_N.to(nll_N.dtype)).sum()
