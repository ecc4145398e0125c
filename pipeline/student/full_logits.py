"""All V logits of the teacher, from its stored hidden states and its output head alone; and the loss on them.

Enters: hidden states [M, D] and, beside them, the kept top-k. Leaves: logits [M, V], or the full-vocabulary KL. Costs:
the head's weights in their stored dtype on the device, and per slice of positions about eight [rows, V] buffers in
float32; in time 2 · V · D operations a position, once: nothing is computed again in the backward pass.

M, N positions, D channels, V vocabulary, K kept ids.

What is known of the kept ids is worked into their rebuilt logits, and the others are moved by one constant per row to
the stored mass of the tail at the temperature. Angle between the gradient so had and that of the full-vocabulary KD
(degrees, mean over 1,024 positions; SmolLM2-135M, k = 64, student = teacher + N(0, 1)):

                                                   T = 1    2      4      8
    int16 hidden states alone                       1.15   1.24   1.20   1.15
    with gaps in 1/8                                0.71   0.80   1.08   1.14
    with float32 gaps                               0.04   0.35   0.99   1.12
    int8 hidden states alone                        1.52   1.86   1.72   1.51
    with gaps in 1/8                                0.82   0.94   1.39   1.45

Each step pays (int8, gaps in 1/8, 256 positions): stored gaps put in place 1.47, 2.25, 1.99, 1.51, worse than without;
and the tail moved 1.41, 1.54, 1.57, 1.45; and the kept ids averaged with the rebuilt ones 0.68, 0.90, 1.36, 1.42.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from stillroom.pipeline.student.losses import SLICE_ELEMENTS, Objective, slices
from stillroom.storage.calibration import HEAD_FORMAT, find_head, head_digest
from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.errors import CorruptShard, FormatMismatch, StudentError
from stillroom.storage.files import Files, sha256_hex
from stillroom.storage.records import TopK

#: Rows of a 16-bit head that are widened to float32 at a time: 64 MiB at D = 2,048.
WIDENED_ROWS = 8192


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """logits = softcap(scale · (h @ Wᵀ + b)). weight [V, D], bias [V] or None, in the dtype of the file."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @property
    def size_bytes(self) -> int:
        """What it takes on its device."""
        return sum(t.numel() * t.element_size() for t in (self.weight, self.bias) if t is not None)

    @property
    def vocabulary(self) -> int:
        return len(self.weight)

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    @torch.no_grad()
    def logits(self, hidden_MD: Tensor) -> Tensor:
        """[M, V] float32. The products are made in float32 whatever the head's dtype: in bfloat16 a step of the logits
        would be 1/8 nat at 16 to 32. Raises StudentError where the hidden states have another width."""
        if hidden_MD.shape[-1] != self.width:
            raise StudentError(
                f"hidden states have {hidden_MD.shape[-1]:,} channels, the teacher's output head {self.width:,}; "
                "the head in the store is another teacher's"
            )
        hidden_MD = hidden_MD.float()
        if self.weight.dtype == torch.float32:
            logits_MV = hidden_MD @ self.weight.T
        else:
            logits_MV = hidden_MD.new_empty(len(hidden_MD), self.vocabulary)
            for start in range(0, self.vocabulary, WIDENED_ROWS):
                part = slice(start, start + WIDENED_ROWS)
                logits_MV[:, part] = hidden_MD @ self.weight[part].float().T
        if self.bias is not None:
            logits_MV += self.bias.float()
        logits_MV *= self.scale
        return logits_MV if self.softcap is None else logits_MV.div_(self.softcap).tanh_().mul_(self.softcap)


def load_head(files: Files, device: torch.device, *, path: str | None = None) -> TeacherHead:
    """The output head of a store, checked against the digest in its name. Peak: its bytes twice on the host.

    path: of one that is known; None looks for the only one there is.
    Raises StoreError if there is none, CorruptShard naming the file if it is not what was written.
    """
    path = find_head(files) if path is None else path
    expected = head_digest(path)
    where = f"{files.uri}/{path}"
    data = files.read(path)
    found = sha256_hex(data)
    if found != expected:
        raise CorruptShard(
            f"{where} has sha256 {found[:16]}…, its name states {expected[:16]}…: the file was damaged or replaced; "
            "put back a copy of it"
        )
    return read_head(data, device, where=where)


def read_head(data: bytes, device: torch.device, *, where: str) -> TeacherHead:
    """The head in these bytes. Raises CorruptShard, or FormatMismatch, naming `where`."""
    try:
        # The file begins with the length of its JSON header, uint64; `load` has no way to the metadata.
        length = int.from_bytes(data[:8], "little")
        described: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["stillroom"])
        version = described["format"]
        if version != HEAD_FORMAT:
            raise FormatMismatch(f"{where} is a head of format {version}, this release reads {HEAD_FORMAT}")
        tensors = load(data)
        head = TeacherHead(tensors["weight"], tensors.get("bias"), described["scale"], described["softcap"])
        _check(head, described)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptShard(f"{where} is no output head: {type(error).__name__} {error}") from error
    bias = None if head.bias is None else head.bias.to(device)
    return TeacherHead(head.weight.to(device), bias, float(head.scale), head.softcap)


def _check(head: TeacherHead, described: dict[str, Any]) -> None:
    """Raises ValueError where tensors and metadata do not make a head."""
    expected = described["vocabulary"], described["width"]
    if tuple(head.weight.shape) != expected or not head.weight.is_floating_point():
        raise ValueError(f"weight is {head.weight.dtype} {list(head.weight.shape)}, expected floats {list(expected)}")
    if head.bias is not None and (tuple(head.bias.shape) != expected[:1] or not head.bias.is_floating_point()):
        raise ValueError(f"bias is {head.bias.dtype} {list(head.bias.shape)}, expected floats [{expected[0]}]")
    if not np.isfinite(head.scale) or (head.softcap is not None and not (0 < head.softcap < np.inf)):
        raise ValueError(f"scale is {head.scale}, soft cap {head.softcap}")


@dataclass(frozen=True)
class Kept:
    """What is known of M positions beside their hidden states.

    ids: int64 [M, K], distinct in each row; where a row keeps fewer, its unused slots hold −1.
    logits: float32 [M, K], raw, in nats; −inf in unused slots.
    tail_lse: float32 [M], log Σ_{i not kept} exp(z_i / T) at the temperature T of the loss; −inf where none is left.
    gap_step: each logit is within half of this of the exact one, the row's first is exact; None if all are.
    """

    ids: Tensor
    logits: Tensor
    tail_lse: Tensor
    gap_step: float | None

    @staticmethod
    def of(topk: TopK, *, vocabulary: int, temperature: float, gap_step: float | None) -> "Kept":
        """From a store's block. Raises ValueError for a temperature outside 1 … 10."""
        counts: Any = topk.ids.shape[1] if topk.counts is None else topk.counts
        tail = tail_lse_at(topk.tail_lse, 1.0 / temperature, np.maximum(vocabulary - counts, 1))
        return Kept(
            torch.from_numpy(topk.ids.astype(np.int64)),
            torch.from_numpy(topk.logits),
            torch.from_numpy(np.where(vocabulary > counts, tail, np.float32(-np.inf)).astype(np.float32)),
            gap_step,
        )

    def to(self, device: torch.device) -> "Kept":
        return Kept(self.ids.to(device), self.logits.to(device), self.tail_lse.to(device), self.gap_step)

    def split(self, rows: int) -> list["Kept"]:
        """Consecutive slices of `rows` positions."""
        columns = (slices(t, rows) for t in (self.ids, self.logits, self.tail_lse))
        return [Kept(ids, logits, tail, self.gap_step) for ids, logits, tail in zip(*columns, strict=True)]


@torch.no_grad()
def full_logits(head: TeacherHead, hidden_MD: Tensor, kept: Kept | None, *, temperature: float) -> Tensor:
    """The teacher's logits [M, V], float32, for a softmax at this temperature.

    Kept ids: with a gap step, the rebuilt logits are moved by their mean difference to the stored ones (an error in the
    direction of the mean output vector moves all alike, and is the largest part of it), averaged with them, and cut to
    the interval that the stored code proves: each stays within gap_step of the exact one. Without a step the stored
    logits are taken as they are.
    Others: moved by one constant per row, so that log Σ exp(z / T) over them is `tail_lse`.
    """
    logits_MV = head.logits(hidden_MD)
    if kept is None:
        return logits_MV
    # An unused slot writes what the first one writes.
    used_MK = kept.ids >= 0
    ids_MK = torch.where(used_MK, kept.ids, kept.ids[:, :1])
    known_MK = torch.where(used_MK, kept.logits, kept.logits[:, :1])
    if kept.gap_step is not None:
        known_MK = _fuse(logits_MV.gather(1, ids_MK), known_MK, used_MK, kept.gap_step)
    logits_MV.scatter_(1, ids_MK, -torch.inf)
    rebuilt_M = torch.logsumexp(logits_MV / temperature, -1)
    # −inf on both sides: no id is left, and nothing to move.
    shift_M = torch.where(rebuilt_M == -torch.inf, torch.zeros_like(rebuilt_M), kept.tail_lse - rebuilt_M)
    logits_MV += temperature * shift_M[:, None]
    return logits_MV.scatter_(1, ids_MK, known_MK)


def _fuse(rebuilt_MK: Tensor, stored_MK: Tensor, used_MK: Tensor, gap_step: float) -> Tensor:
    """Of two estimates of the kept logits the better mean, inside the stored intervals; the first as it is stored.

    Stored ones are off by what rounding makes, gap_step² / 12 in variance; how far the rebuilt ones are apart from them
    shows the sum of both variances. With these as weights the mean has the least error, if the two err independently.
    """
    count_M1 = used_MK.sum(1, keepdim=True)
    apart_MK = torch.where(used_MK, rebuilt_MK - stored_MK, 0.0)
    apart_MK = torch.where(used_MK, apart_MK - apart_MK.sum(1, keepdim=True) / count_M1, 0.0)
    variance_M1 = apart_MK.square().sum(1, keepdim=True) / count_M1
    trust_M1 = (gap_step**2 / 12 / variance_M1.clamp_min(1e-30)).clamp_max(1.0)
    moved_MK = (trust_M1 * apart_MK).clamp(-gap_step / 2, gap_step / 2)
    moved_MK[:, 0] = 0.0
    return stored_MK + moved_MK


def full_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float, weights_N: Tensor) -> Tensor:
    """Σ_n w_n · T² · KL(teacher ‖ student) over the whole vocabulary, a scalar (Hinton et al. 2015, §2)."""
    return full_loss(student_logits_NV, teacher_logits_NV, objective=Objective(1.0, temperature), weights_N=weights_N)


def full_loss(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, objective: Objective, weights_N: Tensor
) -> Tensor:
    """Σ_n w_n · (the objective's output losses)_n over the whole vocabulary, a scalar.

    In float32, or float64 if the student's logits are. Gradients flow to the student's logits only. A teacher logit of
    −inf is a probability of zero, and adds nothing to a forward KL whatever the student says there.
    """
    precise = torch.promote_types(student_logits_NV.dtype, torch.float32)
    student_NV = student_logits_NV.to(precise) / objective.temperature
    teacher_NV = teacher_logits_NV.detach().to(precise) / objective.temperature
    loss_N = objective.whole_vocabulary(
        torch.log_softmax(teacher_NV, -1), torch.log_softmax(student_NV, -1), teacher_NV, student_NV
    )
    return (loss_N * weights_N.to(precise)).sum()


def hidden_loss(
    student_logits_NV: Tensor,
    head: TeacherHead,
    hidden_ND: Tensor,
    kept: Kept | None,
    *,
    objective: Objective,
    weights_N: Tensor,
    slice_elements: int = SLICE_ELEMENTS // 2,
) -> Tensor:
    """`full_loss` against the rebuilt teacher, slice by slice: its logits exist for one slice only.

    student_logits_NV: as the student returns them; columns beyond the head's vocabulary are padding and are cut off
    before the softmax. The gradient is made in the forward pass, in their dtype, so that the teacher's logits are
    rebuilt once; it can be asked for once.
    """
    rows = max(1, slice_elements // head.vocabulary)
    real_NV = student_logits_NV[:, : head.vocabulary]
    if real_NV.shape[1] < head.vocabulary:
        raise StudentError(
            f"the student has {real_NV.shape[1]:,} output columns, the teacher's head {head.vocabulary:,}; "
            "give a student with the teacher's tokenizer"
        )
    total: Tensor = _HiddenLoss.apply(  # type: ignore[no-untyped-call]
        real_NV, head, hidden_ND, kept, objective, weights_N, rows
    )
    return total


class _HiddenLoss(torch.autograd.Function):
    """Sum and gradient of all slices in one pass."""

    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, head: TeacherHead, hidden_ND: Tensor, kept: Kept | None, objective: Objective,
        weights_N: Tensor, rows: int,
    ) -> Tensor:  # fmt: skip
        wanted = ctx.needs_input_grad[0]
        ctx.grad_NV = torch.empty_like(student_NV) if wanted else None
        sums = []
        kept_parts = [None] * max(1, -(-len(student_NV) // rows)) if kept is None else kept.split(rows)
        parts = zip(*(slices(t, rows) for t in (student_NV, hidden_ND, weights_N)), kept_parts, strict=True)
        for number, (part_NV, hidden_PD, weights_P, kept_part) in enumerate(parts):
            teacher_PV = full_logits(head, hidden_PD, kept_part, temperature=objective.temperature)
            with torch.set_grad_enabled(wanted):
                leaf_PV = part_NV.detach().requires_grad_(wanted)
                part = full_loss(leaf_PV, teacher_PV, objective=objective, weights_N=weights_P)
            if wanted:
                start = number * rows
                ctx.grad_NV[start : start + rows] = torch.autograd.grad(part, leaf_PV)[0]
            sums.append(part.detach())
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_NV, ctx.grad_NV = ctx.grad_NV, None
        assert grad_NV is not None, "the gradient of hidden_loss can be asked for once"
        return (grad_NV.mul_(grads[0]), None, None, None, None, None, None)
