"""The fused head and loss over everything a recipe can ask of them: parts, losses, vocabularies, dtypes, odd signals.

No NaN and nothing infinite, wherever the numbers fit the dtype; and the plain form in float64 where rounding allows.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.pipeline.student.full_logits import Kept, TeacherHead, full_logits
from stillroom.pipeline.student.losses import LossSums, Objective, StudentHead, Targets
from stillroom.pipeline.student.losses.buckets import Buckets
from stillroom.pipeline.student.teaching import Teaching, distillation_loss, distillation_loss_fused
from tests.student.test_losses_fused import ALL, FORMS, Case, require_close

D = 8
#: float16's largest number is 65,504; a product may round, and a sum of six positions is in float32.
FITS = {torch.float16: 6e4, torch.bfloat16: 3e38, torch.float32: 3e38}
#: (dtype of the weights, dtype of autocast).
WAYS: list[tuple[torch.dtype, torch.dtype | None]] = [
    (torch.float32, None), (torch.bfloat16, None), (torch.float16, None),
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Odd:
    """A student, and all parts of one teacher's signal. teacher: logits float64 [N, V]; rounded to whole numbers they
    have ties; −inf where an id can never be said. full: whether all slots are used, so that k = V is the vocabulary."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher: Tensor
    head: TeacherHead
    states: Tensor
    targets: Targets
    temperature: float
    full: bool

    @property
    def vocabulary(self) -> int:
        return self.teacher.shape[1]


@st.composite
def odd(draw: st.DrawFn) -> Odd:
    v, n, padded = draw(st.integers(2, 130)), draw(st.integers(1, 6)), draw(st.integers(0, 4))
    k = draw(st.one_of(st.just(1), st.just(v), st.integers(1, v)))
    temperature = draw(st.sampled_from([1.0, 1.7, 10.0]))
    student_size = draw(st.sampled_from([0.0, 1.0, 30.0, 3e3]))
    teacher_size = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states, weight = teacher_size * normal(n, D), normal(v, D)
    bias = torch.zeros(v, dtype=torch.float64)
    if draw(st.booleans()):  # ids that cannot be said: all but the first two at most
        bias[2:].masked_fill_(torch.rand(v - 2, generator=generator) < draw(st.sampled_from([0.3, 1.0])), -torch.inf)
    if draw(st.booleans()):  # ties, also at the edge of what is kept
        states, weight = states.round(), weight.round()
    teacher = states @ weight.T + bias
    top = teacher.topk(k, -1)
    ids, kept = top.indices, top.values
    ragged = k > 1 and draw(st.booleans())
    if ragged:
        ids[0, 1:], kept[0, 1:] = -1, -torch.inf
    rest = teacher.clone()
    for row in range(n):
        rest[row, ids[row][ids[row] >= 0]] = -torch.inf
    drawn = torch.distributions.Categorical(logits=teacher)
    targets = Targets(
        torch.randint(0, v, (n,), generator=generator),
        torch.rand(n, generator=generator) * (torch.arange(n) % 4 != draw(st.integers(0, 4))),
        ids, kept.float(), torch.logsumexp(rest / temperature, -1).float(),
        *_draws(drawn.probs, draw(st.integers(1, 5)), generator),
        states.float(),
    )  # fmt: skip
    return Odd(
        hidden=student_size * normal(n, D), weight=normal(v + padded, D), bias=normal(v + padded), teacher=teacher,
        head=TeacherHead(weight.float(), bias.float(), 1.0, None), states=states, targets=targets,
        temperature=temperature, full=k == v and not ragged,
    )  # fmt: skip


def _draws(p_NV: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids, counts), −1 and 0 in unused slots."""
    found = torch.multinomial(p_NV, count, replacement=True, generator=generator)
    ids, counts = torch.full_like(found, -1), torch.zeros_like(found)
    for row, drawn in enumerate(found):
        distinct, times = drawn.unique(return_counts=True)
        ids[row, : len(distinct)], counts[row, : len(distinct)] = distinct, times
    return ids, counts


def run(
    case: Odd, objective: Objective, teaching: Teaching, form: tuple[float, float | None, bool], *,
    way: tuple[torch.dtype, torch.dtype | None] | None, rows: int,
) -> tuple[LossSums, list[Tensor]]:  # fmt: skip
    """(sums, gradients) of the fused form; without a way those of the plain form in float64."""
    scale, softcap, biased = form
    dtype, cast = way or (torch.float64, None)
    leaves = [
        t.to(dtype).detach().requires_grad_() for t in (case.hidden, case.weight, *([case.bias] if biased else []))
    ]
    head = StudentHead(leaves[1], leaves[2] if biased else None, scale, softcap)
    given: dict[str, Any] = {"objective": objective, "vocabulary": case.vocabulary, "teaching": teaching}
    around: AbstractContextManager[Any] = torch.autocast("cpu", dtype=cast) if cast else nullcontext()
    with around:
        if way is None:
            sums = distillation_loss(head.logits(leaves[0]), case.targets, **given)
        else:
            sums = distillation_loss_fused(
                leaves[0], head, case.targets, slice_elements=rows * case.vocabulary, **given
            )
    return sums, list(torch.autograd.grad(3.0 * sums.total, leaves))


@given(data=st.data(), case=odd(), part=st.sampled_from(["topk", "sampled", "topk+sampled", "hidden"]),
       alpha=st.sampled_from([0.0, 0.5, 1.0]), smoothing=st.sampled_from([0.0, 0.1]), form=st.sampled_from(FORMS),
       way=st.sampled_from(WAYS), rows=st.integers(1, 7))  # fmt: skip
@settings(max_examples=600, deadline=None)
def test_nothing_is_ever_nan_whatever_is_asked(
    data: st.DataObject, case: Odd, part: str, alpha: float, smoothing: float,
    form: tuple[float, float | None, bool], way: tuple[torch.dtype, torch.dtype | None], rows: int,
) -> None:  # fmt: skip
    whole = part == "hidden" or (part == "topk" and case.full)
    names, temperature = [*ALL, *(["cosine"] if whole else [])], case.temperature
    if "sampled" in part:
        names, temperature = ["forward_kl"], 1.0
        case = replace(case, targets=_at_one(case))
    name = data.draw(st.sampled_from(names))
    if part == "hidden" and data.draw(st.booleans()):  # no top-k beside
        case = replace(case, targets=replace(case.targets, ids=None, logits=None, tail_lse=None))
    objective = Objective(alpha, temperature, {name: 1.0}, 0.3, smoothing)
    teaching = Teaching(part, case.head if part == "hidden" else None)

    plain = run(case, objective, teaching, form, way=None, rows=rows)
    narrow = way[1] or way[0]
    logits_size = float((case.hidden.abs() @ case.weight.abs().T).max()) + float(case.bias.abs().max())
    assume(max(logits_size, float(case.hidden.abs().max())) < FITS[narrow])
    assume(all(float(gradient.abs().max()) < FITS[way[0]] / 4 for gradient in plain[1]))

    fused = run(case, objective, teaching, form, way=way, rows=rows)
    for sums in (plain[0], fused[0]):
        assert all(torch.isfinite(found) for found in (sums.total, sums.kd, sums.ce) if found is not None)
    for gradients in (plain[1], fused[1]):
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not fused[1][1][case.vocabulary :].any(), "padding of the head"
    tame = max(float(case.hidden.abs().max()), float(case.states.abs().max())) < 5
    if way == (torch.float32, None) and tame and name != "tv":  # whose gradient where p = q hangs on a rounding
        require_close(plain, fused, 1e-4)


def _at_one(case: Odd) -> Targets:
    """The tail at temperature 1."""
    assert case.targets.ids is not None
    rest = case.teacher.clone()
    for row, ids in enumerate(case.targets.ids):
        rest[row, ids[ids >= 0]] = -torch.inf
    return replace(case.targets, tail_lse=torch.logsumexp(rest, -1).float())


def gaps(teaching: Teaching, z_NV: Tensor, targets: Targets, temperature: float) -> Tensor:
    """|p − q| of each outcome. z_NV: the student's logits."""
    assert targets.ids is not None
    assert targets.logits is not None
    assert targets.tail_lse is not None
    if teaching.head is None:
        found = Buckets.of(z_NV, targets.ids, targets.logits, targets.tail_lse, temperature=temperature)
        used = ~torch.isneginf(found.log_q)
        return (found.log_p.exp() - found.log_q.exp()).abs()[used]
    assert targets.hidden is not None
    kept = Kept(targets.ids, targets.logits, targets.tail_lse, None)
    teacher_NV = full_logits(teaching.head, targets.hidden, kept, temperature=temperature)
    return ((teacher_NV.double() / temperature).softmax(-1) - (z_NV / temperature).softmax(-1)).abs()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("part", "k", "weights"),
    [
        ("hidden", 3, {"forward_kl": 0.7, "reverse_kl": 0.4, "js": 1.0, "mse": 2.0, "cosine": 0.5}),
        ("hidden", 1, {"forward_kl": 1.0}), ("hidden", 3, {"tv": 1.0}), ("topk", 3, {"tv": 1.0}),
        ("topk", 1, {"tv": 1.0}), ("topk", 1, {"forward_kl": 1.0}),
    ],
)  # fmt: skip
def test_gradients_are_those_of_the_value(
    part: str, k: int, weights: dict[str, float], form: tuple[float, float | None, bool]
) -> None:
    """By differences, the student's head in float64: what test_losses_fused.py leaves out; tv away from its corners."""
    scale, softcap, biased = form
    case, temperature = Case(seed=4, n=4, k=k, temperature=2.0, v=12, d=3), 2.0
    dtype = torch.float32 if part == "hidden" else torch.float64  # the rebuilt teacher is of float32
    targets = replace(case.targets(dtype), hidden=case.teacher_hidden)
    teaching = case.teaching(part)

    def head(weight: Tensor, *bias: Tensor) -> StudentHead:
        return StudentHead(weight, bias[0] if bias else None, scale, softcap)

    def loss(hidden: Tensor, *given: Tensor) -> Tensor:
        return distillation_loss_fused(
            hidden, head(*given), targets, objective=Objective(0.6, temperature, weights, 0.3, 0.05), vocabulary=12,
            teaching=teaching, slice_elements=3 * 12, again=True,
        ).total  # fmt: skip

    leaves = case.leaves(torch.float64, biased=biased)
    z_NV = head(*leaves[1:]).logits(leaves[0]).detach()[:, :12]
    assert gaps(teaching, z_NV, targets, temperature).min() > 1e-4
    assert torch.autograd.gradcheck(loss, leaves)
