"""The student's output head and the loss together, in slices of positions: the logits of a batch never exist at once.

Enters: hidden states [N, D] as the head is given them, the head, targets. Leaves: the sums, with gradients to the
hidden states, the head's weight and its bias. Costs: one slice of logits (two where T ≠ 1 is mixed with text, one more
with a soft cap), the gradient of the weight in its dtype, and no second forward: gradients are made with the values,
the backward pass only scales them, so that it can be asked for once.

N positions, D channels, V vocabulary, P positions of a slice.

    z = softcap(scale · (h @ Wᵀ + b)),    ∂L/∂h = G @ W,    ∂L/∂W = Gᵀ @ h,    G = ∂L/∂(h @ Wᵀ + b)

The eager form (`teaching.distillation_loss` on the model's own logits) is the reference, and is equal to it but for
rounding. The idea of leaving out the logits is that of Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009) and of
Liger (Hsu et al. 2024, arXiv 2410.10989); both are for cross-entropy over V, where here K ids and a tail are what
counts.

Under autocast the three products are made in its dtype, as the model's own head makes them, and everything between them
in float32; the weight's gradient is summed up in float32. float16's range is narrow: what enters its products is scaled
by a power of two, so that their sums do not overflow and no more of a softmax's tail is lost than has to be; gradients
to float16 hidden states wait in float32 for the factor of the backward pass, where the scale of the loss comes in.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.pipeline.student.losses.objective import Objective
from stillroom.pipeline.student.losses.targets import LossSums, Targets, combine

#: Logits per slice: 64 MiB in float32, 341 positions at V = 49,152.
FUSED_ELEMENTS = 2**24

#: On a CPU the passes between the products go over so many logits at a time, which its caches hold.
BLOCK_ELEMENTS = 2**20

#: (logits, their targets, objective, whether a gradient is wanted, spare buffers) → (kd, ce), gradient in the logits.
SliceLoss = Callable[[Tensor, Targets, Objective, bool, Iterator[Tensor]], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True, eq=False)
class StudentHead:
    """logits = softcap(scale · (h @ Wᵀ + b)), softcap(z) = cap · tanh(z / cap). weight [V + padding, D]: the parameter
    itself, which may also be the embedding."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V + padding], by the plain formula."""
        logits_NV = torch.nn.functional.linear(hidden_ND, self.weight, self.bias) * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


def fused_loss(
    hidden_ND: Tensor,
    head: StudentHead,
    targets: Targets,
    *,
    objective: Objective,
    vocabulary: int,
    slice_loss: SliceLoss,
    slice_elements: int = FUSED_ELEMENTS,
    block_elements: int | None = BLOCK_ELEMENTS,
    again: bool = False,
) -> LossSums:
    """The loss of N positions, as sums; only `total` has a gradient.

    vocabulary: rows of the head from there on are padding; they get no gradient. block_elements: what slice_loss is
    given at a time on a CPU; None: a slice. again: whether the backward pass may be asked for more than once
    (`gradcheck`); it then keeps the gradients and copies them.
    """
    device = hidden_ND.device.type
    dtype = hidden_ND.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    plan = _Plan(
        head, targets, objective, vocabulary, slice_loss, max(1, slice_elements // vocabulary),
        max(1, block_elements // vocabulary) if block_elements and device == "cpu" else None, dtype,
        torch.is_grad_enabled(), again,
    )  # fmt: skip
    total, kd, ce = _Fused.apply(hidden_ND, head.weight, head.bias, plan)  # type: ignore[no-untyped-call]
    return LossSums(total, kd if objective.distils else None, ce if objective.reads_text else None)


@dataclass(frozen=True, eq=False)
class _Plan:
    head: StudentHead
    targets: Targets
    objective: Objective
    vocabulary: int
    slice_loss: SliceLoss
    rows: int
    block: int | None
    dtype: torch.dtype
    grad: bool
    again: bool


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [plan.grad and need for need in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            run = _Run(plan, hidden_ND, weight, bias, wanted)
            kd, ce = run.sums()
        ctx.grads, ctx.again = run.grads, plan.again
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_ND, weight, bias)]
        objective = plan.objective
        total = combine(kd if objective.distils else None, ce if objective.reads_text else None, alpha=objective.alpha)
        total = total.clone()
        ctx.mark_non_differentiable(kd, ce)
        return total, kd, ce

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "the gradient of fused_loss can be asked for once"
        made = ctx.grads
        if ctx.again:
            return (*(None if grad is None else grad * grads[0] for grad in made), None)
        ctx.grads = None
        scaled = [None if grad is None else grad.mul_(grads[0]) for grad in made]
        return (*(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)), None)


class _Run:
    """One pass over all slices. grads: with respect to hidden states, weight, bias; None where not wanted."""

    def __init__(self, plan: _Plan, hidden_ND: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> None:
        self._plan, self._hidden_ND, self._bias = plan, hidden_ND, bias
        self._weight_VD = weight[: plan.vocabulary].to(plan.dtype)
        self._wanted = any(wanted)
        self._precise = torch.promote_types(plan.dtype, torch.float32)
        sizes = (hidden_ND, weight, bias)
        make = torch.empty_like if len(hidden_ND) else torch.zeros_like
        self.grads = [
            make(t, dtype=_waits_in(t.dtype)) if want and t is not None else None
            for want, t in zip(wanted, sizes, strict=True)
        ]
        self._sum_VD, self._sum_V = self._accumulator(1), self._accumulator(2)
        rows = min(plan.rows, len(hidden_ND))
        self._buffers = [hidden_ND.new_empty(rows, plan.vocabulary, dtype=self._precise)]

    def _accumulator(self, index: int) -> Tensor | None:
        """Where the gradient is summed up: in place if its dtype is precise enough."""
        grad = self.grads[index]
        if grad is None:
            return None
        real = grad[: self._plan.vocabulary]
        grad[self._plan.vocabulary :] = 0.0
        return real if grad.dtype == self._precise else torch.empty_like(real, dtype=self._precise)

    def sums(self) -> tuple[Tensor, Tensor]:
        """(kd, ce), zero where they do not count."""
        rows, zero = self._plan.rows, self._hidden_ND.new_zeros((), dtype=self._precise)
        found: list[tuple[Tensor | None, Tensor | None]] = []
        for number, part in enumerate(self._plan.targets.split(rows) if len(self._hidden_ND) else []):
            found += self._slice(number * rows, part)
        for index, total in ((1, self._sum_VD), (2, self._sum_V)):
            grad = self.grads[index]
            if grad is not None and total is not None and total.dtype != grad.dtype:
                grad[: self._plan.vocabulary] = total
        kd, ce = (torch.stack([zero, *(s for pair in found if (s := pair[i]) is not None)]).sum() for i in (0, 1))
        return kd, ce

    def _slice(self, start: int, targets: Targets) -> list[tuple[Tensor | None, Tensor | None]]:
        plan, count = self._plan, len(targets.labels)
        hidden_PD = self._hidden_ND[start : start + count].to(plan.dtype)
        z_PV = self._buffer(0)[:count]
        self._logits(hidden_PD, z_PV)
        # On a CPU, block by block, so that what one pass leaves in the cache is there for the next.
        found, done = [], 0
        for part in targets.split(plan.block or count):
            rows = slice(done, done + len(part.labels))
            found.append(self._loss(z_PV[rows], part))
            done = rows.stop
        if self._wanted:
            self._accumulate(start, hidden_PD, z_PV)
        return found

    def _logits(self, hidden_PD: Tensor, z_PV: Tensor) -> None:
        if z_PV.dtype == self._plan.dtype:
            torch.mm(hidden_PD, self._weight_VD.T, out=z_PV)
        else:
            z_PV.copy_(hidden_PD @ self._weight_VD.T)
        if self._bias is not None:
            z_PV.add_(self._bias[: self._plan.vocabulary].to(z_PV.dtype))

    def _loss(self, z_PV: Tensor, targets: Targets) -> tuple[Tensor | None, Tensor | None]:
        """The loss of some rows, and in them its gradient with respect to what the product gave."""
        plan, head = self._plan, self._plan.head
        slope_PV = None
        if head.scale != 1.0:
            z_PV.mul_(head.scale)
        if head.softcap is not None:
            z_PV.div_(head.softcap).tanh_()
            slope_PV = z_PV.square().neg_().add_(1.0) if self._wanted else None
            z_PV.mul_(head.softcap)
        found = plan.slice_loss(z_PV, targets, plan.objective, self._wanted, self._spare(len(z_PV)))
        if self._wanted:
            if slope_PV is not None:
                z_PV.mul_(slope_PV)
            if head.scale != 1.0:
                z_PV.mul_(head.scale)
        return found

    def _accumulate(self, start: int, hidden_PD: Tensor, grad_PV: Tensor) -> None:
        dtype, grads = self._plan.dtype, self.grads
        if self._sum_V is not None:
            _add(self._sum_V, grad_PV.sum(0), first=start == 0)
        shrink: Tensor | float = 1.0
        if dtype == torch.float16:
            shrink = self._shrink(hidden_PD, grad_PV)
            grad_PV.div_(shrink)
        made_PV = grad_PV.to(dtype)
        if grads[0] is not None:
            part_PD = grads[0][start : start + len(grad_PV)]
            if part_PD.dtype == dtype == self._precise:
                torch.mm(made_PV, self._weight_VD, out=part_PD)
            else:
                part_PD.copy_((made_PV @ self._weight_VD).to(self._precise) * shrink)
        if self._sum_VD is None:
            return
        if dtype == self._precise:
            torch.addmm(self._sum_VD, made_PV.T, hidden_PD, beta=0.0 if start == 0 else 1.0, out=self._sum_VD)
        else:
            _add(self._sum_VD, (made_PV.T @ hidden_PD).to(self._precise).mul_(shrink), first=start == 0)

    def _shrink(self, hidden_PD: Tensor, grad_PV: Tensor) -> Tensor:
        """The power of two by which a gradient is divided before its products in float16.

        Most of a softmax lies below float16's smallest number, so the largest is lifted to 2^9; to less where a sum of
        either product could reach 2^15, half of its range: |Σ_v g w| ≤ max |w| · Σ_v |g|, and so for positions.
        """
        size_PV = grad_PV.abs()
        bounds = [size_PV.amax() * 2.0**6]
        if self.grads[0] is not None:
            bounds.append(size_PV.sum(1).amax() * self._weight_VD.abs().amax())
        if self._sum_VD is not None:
            bounds.append(size_PV.sum(0).amax() * hidden_PD.abs().amax())
        largest = torch.stack([bound.to(self._precise) for bound in bounds]).amax().clamp(2.0**-100, 2.0**100)
        return torch.exp2(torch.floor(torch.log2(largest)) - 14)

    def _buffer(self, index: int) -> Tensor:
        while len(self._buffers) <= index:
            self._buffers.append(torch.empty_like(self._buffers[0]))
        return self._buffers[index]

    def _spare(self, rows: int) -> Iterator[Tensor]:
        index = 1
        while True:
            yield self._buffer(index)[:rows]
            index += 1


def _waits_in(dtype: torch.dtype) -> torch.dtype:
    """What a gradient is kept in until it is scaled."""
    return torch.float32 if dtype == torch.float16 else dtype


def _add(total: Tensor, part: Tensor, *, first: bool) -> None:
    """Into `total`, which holds nothing yet where this is the first."""
    if first:
        total.copy_(part)
    else:
        total.add_(part)
