"""What positions are trained on, and the sums that come out.

Enters: the labels, weights and stored signal of N positions. Leaves: `Targets`, in slices where wanted. Costs: views.

N positions, V vocabulary, K kept ids, U distinct drawn ids, D channels.
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


def precise(logits: Tensor) -> Tensor:
    """In float32, or float64 as it is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def combine(kd: Tensor | None, ce: Tensor | None, *, alpha: float) -> Tensor:
    """alpha · kd + (1 − alpha) · ce, where a part may be missing only if its coefficient is zero."""
    if kd is None or ce is None:
        present = ce if kd is None else kd
        assert present is not None
        assert alpha == (0.0 if kd is None else 1.0), alpha
        return present
    return alpha * kd + (1.0 - alpha) * ce
