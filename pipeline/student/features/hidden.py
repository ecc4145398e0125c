"""The loss between hidden states, and the learned matrices between widths.

Enters: states of M trained positions of both models. Leaves: a sum over positions in float32 (float64 as it is). Costs:
two passes over [M, D], and a product [M, D'] · [D', D] where the states are projected.

    L = Σ_m w_m · ‖W h_m − t_m‖² / D        mse, as the chapter's code has it (§4.4): the mean over channels
    L = Σ_m w_m · (1 − cos(W h_m, t_m))     cosine

summed over the layers of the map (§4.1). A position counts where it trains: the same weights as the output's loss, as a
masked token's state is not what the student is to learn, and the stream hands over no signal for it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stillroom.pipeline.student.losses.targets import precise

#: Vectors shorter than this have no direction.
EPSILON = 1e-12


def state_loss(student_MD: Tensor, teacher_MD: Tensor, *, loss: str, weights_M: Tensor) -> Tensor:
    """Σ_m w_m · L_m, a scalar. loss: "mse" or "cosine". Only the student gets a gradient.

    A state of zeros has a cosine of 0 with anything, and a gradient of zero.
    """
    student_MD = precise(student_MD)
    teacher_MD = teacher_MD.detach().to(student_MD.dtype)
    if loss == "mse":
        loss_M = (student_MD - teacher_MD).square().mean(-1)
    else:
        loss_M = 1 - (directions(student_MD) * directions(teacher_MD)).sum(-1)
    return (loss_M * weights_M.to(loss_M.dtype)).sum()


def directions(states_MD: Tensor) -> Tensor:
    """Each row at length 1; a row of zeros stays."""
    # Not `normalize`: the gradient of the norm at zero is NaN in float64.
    squares_M1 = states_MD.square().sum(-1, keepdim=True)
    there_M1 = squares_M1 > EPSILON**2
    length_M1 = torch.where(there_M1, squares_M1, torch.ones_like(squares_M1)).sqrt()
    return torch.where(there_M1, states_MD / length_M1, torch.zeros_like(states_MD))


def projections(keys: Iterable[str], *, student: int, teacher: int, seed: int, device: torch.device) -> nn.ModuleDict:
    """A matrix from the student's width to the teacher's for each key, without bias (the chapter's W, §4.1).

    Values are normal with variance 1 / width, which keeps a state's size; each follows from the seed and its place
    among the keys, and the process's generators are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    found = nn.ModuleDict()
    for key in sorted(keys):
        matrix = nn.Linear(student, teacher, bias=False, device="meta")
        values_DD = torch.randn(teacher, student, generator=generator) / student**0.5
        matrix.weight = nn.Parameter(values_DD.to(device))
        found[key] = matrix
    return found
