"""`losses.signal: topk+truth`: value and gradient against a dense oracle, the fused form against the plain one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.pipeline.student.config import LossConfig, StudentConfig, require_determined, teaching_part
from stillroom.pipeline.student.losses import Objective, StudentHead
from stillroom.pipeline.student.sampled_loss import shared_tail_cross_entropy
from stillroom.pipeline.student.teaching import Teaching, distillation_loss, distillation_loss_fused
from stillroom.storage.errors import UnsupportedSignal
from stillroom.storage.fidelity.bound import Bound, supports
from stillroom.storage.records import SampledSpec, SignalSpec, TopKSpec
from tests.student.test_losses_fused import FORMS, Case, V, require_close


def shares(v: int = V, seed: int = 9) -> Tensor:
    return (2 * torch.randn(v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(0)


def teaching(v: int = V) -> Teaching:
    return Teaching("topk+truth", shares=shares(v))


def filled_in(case: Case, shares_V: Tensor) -> Tensor:
    """The teacher that the loss stands for, float64 [N, V]: what is kept, and the tail's mass by the shares."""
    p_NV = torch.zeros(len(case.ids), V, dtype=torch.float64)
    for row, (ids, logits) in enumerate(zip(case.ids, case.kept, strict=True)):
        kept = ids[ids >= 0]
        total = torch.logsumexp(torch.cat([logits[ids >= 0], case.tail[row : row + 1]]), 0)
        left_V = shares_V.clone()
        left_V[kept] = 0
        p_NV[row] = (case.tail[row] - total).exp() * left_V / left_V.sum()
        p_NV[row, kept] = (logits[ids >= 0] - total).exp()
    return p_NV


@pytest.mark.parametrize("k", [1, 6, V - 1])
def test_the_gradient_is_that_of_the_kl_to_the_teacher_with_its_tail_filled_in(k: int) -> None:
    """q − p̂ over the whole vocabulary, float64; and the value but for the entropy of what was filled in."""
    case = Case(k=k)
    p_NV = filled_in(case, shares())
    torch.testing.assert_close(p_NV.sum(-1), torch.ones(len(p_NV), dtype=torch.float64))
    student_NV = (case.hidden @ case.weight[:V].T).requires_grad_()
    found = teaching().loss(student_NV, case.targets(torch.float64), objective=Objective(1.0, 1.0))
    weights_N = case.weights.double()
    oracle = (torch.special.xlogy(p_NV, p_NV).sum(-1) - (p_NV * student_NV.log_softmax(-1)).sum(-1)) @ weights_N
    tail_N = (p_NV.scatter(-1, case.ids.clamp_min(0), 0.0)).masked_fill(~torch.isfinite(p_NV), 0.0)
    if k == 6:  # row 0 keeps one id: its unused slots have hidden id 0, not its own
        tail_N = torch.stack([p.clone().index_fill(0, i[i >= 0], 0.0) for p, i in zip(p_NV, case.ids, strict=True)])
    mass_N1 = tail_N.sum(-1, keepdim=True)
    entropy = -(torch.special.xlogy(tail_N, tail_N / mass_N1).sum(-1)) @ weights_N
    if k != V - 1:
        torch.testing.assert_close(found, oracle + entropy, rtol=1e-9, atol=1e-9)
    (gradient_NV,) = torch.autograd.grad(found, student_NV)
    expected_NV = weights_N[:, None] * (student_NV.softmax(-1) - p_NV)
    torch.testing.assert_close(gradient_NV, expected_NV.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.6, 1.0])
@pytest.mark.parametrize("k", [1, 6, V - 1, V])
def test_the_fused_form_is_the_plain_one(
    k: int, alpha: float, smoothing: float, form: tuple[float, float | None, bool]
) -> None:
    case, objective = Case(k=k), Objective(alpha, 1.0, {"forward_kl": 0.7}, 0.3, smoothing)
    scale, softcap, biased = form

    def run(fused: bool, dtype: torch.dtype) -> Any:
        hidden, weight, *bias = leaves = case.leaves(dtype, biased=biased)
        head = StudentHead(weight, bias[0] if bias else None, scale, softcap)
        stated: dict[str, Any] = {"objective": objective, "vocabulary": V, "teaching": teaching()}
        targets = case.targets(dtype)
        if fused:
            sums = distillation_loss_fused(hidden, head, targets, slice_elements=3 * V, **stated)
        else:
            sums = distillation_loss(head.logits(hidden), targets, slice_elements=4 * (V + 4), **stated)
        return sums, list(torch.autograd.grad(3.0 * sums.total, leaves))

    require_close(run(False, torch.float64), run(True, torch.float32), 2e-5)
    require_close(run(False, torch.float64), run(True, torch.float64), 1e-9)


def test_where_nothing_is_left_it_is_the_loss_of_topk() -> None:
    """k = V (but in the first row, which keeps one id), and a tail of ids that have no share."""
    case = Case(k=V)
    _, *rows = case.targets(torch.float64).split(1)
    student_NV, targets = (case.hidden @ case.weight[:V].T)[5:6], rows[4]
    objective = Objective(1.0, 1.0)
    plain = Teaching("topk").loss(student_NV, targets, objective=objective)
    assert teaching().loss(student_NV, targets, objective=objective) == plain
    one_V = torch.zeros(V, dtype=torch.float64)
    one_V[5] = 1.0
    kept = torch.full((len(case.ids), 1), 5)
    found = shared_tail_cross_entropy(
        case.hidden @ case.weight[:V].T, kept, torch.zeros_like(kept, dtype=torch.float64), torch.zeros(len(kept)),
        one_V, temperature=1.0, weights_N=torch.ones(len(kept)),
    )  # fmt: skip
    assert found == 0


@given(
    n=st.integers(1, 4),
    v=st.integers(2, 40),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    impossible=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_nothing_is_ever_nan(
    n: int, v: int, scale: float, impossible: bool, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Ties, extreme logits, k = 1 … V, unused slots, a kept id that both exclude; both forms, finite gradients."""
    k = data.draw(st.integers(1, v))
    case = Case(n=n, k=k, v=v, size=scale)
    targets = case.targets(torch.float32)
    student_NV = (scale * torch.randn(n, v, generator=torch.Generator().manual_seed(1))).to(dtype)
    if impossible and case.ids[n - 1, 0] >= 0:
        assert targets.logits is not None
        targets.logits[n - 1, 0] = -torch.inf  # as the teacher does, or the loss is infinite
        student_NV[n - 1, case.ids[n - 1, 0]] = -torch.inf
        if k == 1 and n > 1 and v == 1:
            return
    student_NV = student_NV.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max) if not impossible else student_NV
    student_NV.requires_grad_()
    taught = Teaching("topk+truth", shares=shares(v).float())
    loss = taught.loss(student_NV, targets, objective=Objective(1.0, 1.0))
    (gradient_NV,) = torch.autograd.grad(loss, student_NV)
    assert not torch.isnan(loss)
    assert torch.isfinite(gradient_NV).all()
    z_NV = student_NV.detach().float()
    kd, _ = taught.slice_loss(z_NV, targets, Objective(1.0, 1.0), True, iter(()))
    assert kd is not None
    assert not torch.isnan(kd)
    assert torch.isfinite(z_NV).all()


def test_positions_do_not_know_each_other() -> None:
    case = Case()
    student_NV = case.hidden @ case.weight[:V].T
    targets, objective = case.targets(torch.float64), Objective(1.0, 1.0)
    alone = [
        float(teaching().loss(student_NV[n : n + 1], part, objective=objective))
        for n, part in enumerate(targets.split(1))
    ]
    assert sum(alone) == pytest.approx(float(teaching().loss(student_NV, targets, objective=objective)))
    masked = replace(targets, weights=torch.zeros_like(targets.weights))
    assert teaching().loss(student_NV, masked, objective=objective) == 0


class TestRefusals:
    def test_what_the_shares_do_not_determine(self) -> None:
        spec = SignalSpec(TopKSpec(8))
        assert teaching_part("topk+truth", spec) == "topk+truth"
        assert teaching().reads == {"topk"}
        with pytest.raises(UnsupportedSignal, match=r"topk\+truth, .*: set it to sampled, or teach with signal.topk"):
            teaching_part("topk+truth", SignalSpec(sampled=SampledSpec(20)))
        losses = LossConfig.model_validate({"output": {"forward_kl": 1, "tv": 1}, "signal": "topk+truth"})
        with pytest.raises(UnsupportedSignal, match=r"losses.output.tv with losses.signal topk\+truth"):
            require_determined(losses, "topk+truth")

    def test_another_temperature(self) -> None:
        case = Case(temperature=2.0)
        z_NV, targets, objective = (
            (case.hidden @ case.weight[:V].T).float(),
            case.targets(torch.float32),
            Objective(1, 2),
        )
        with pytest.raises(UnsupportedSignal, match=r"topk\+truth at temperature 2"):
            teaching().loss(z_NV, targets, objective=objective)
        with pytest.raises(UnsupportedSignal, match=r"topk\+truth at temperature 2"):
            teaching().slice_loss(z_NV, targets, objective, True, iter(()))
        with pytest.raises(UnsupportedSignal, match="T = 2 was asked for"):
            supports(None, "topk+truth", 2.0, Bound(), where="here")
        supports(None, "topk+truth", 1.0, Bound(), where="here")

    def test_it_is_part_of_what_a_student_is(self) -> None:
        def digest(signal: str) -> str:
            stated = {"name": "a", "model": {"from": "x"}, "losses": {"temperature": 1, "signal": signal}}
            return StudentConfig.model_validate(stated).digest

        assert digest("topk") != digest("topk+truth")
