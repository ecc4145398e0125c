"""The sparse loss against dense float64 oracles, and where floating point ends."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.pipeline.student.collate import _targets
from stillroom.pipeline.student.losses import (
    Objective,
    Targets,
    bucket_kl,
    combine,
    cross_entropy,
    sparse_loss,
)
from stillroom.pipeline.student.teaching import distillation_loss
from stillroom.storage.records import Sequence
from tests.student.world import pack_of, topk_of

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


def forward_kl(
    student_NV: Tensor, ids_NK: Tensor, logits_NK: Tensor, tail_N: Tensor, *, temperature: float, weights_N: Tensor
) -> Tensor:
    """The default objective's loss."""
    labels = torch.zeros(len(ids_NK), dtype=torch.long)
    targets = Targets(labels, weights_N, ids_NK, logits_NK, tail_N)
    return sparse_loss(student_NV, targets, objective=Objective(1.0, temperature))


def logits(seed: int, n: int = 12, v: int = 97, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keep(teacher_NV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, logits, exact tail at 1/temperature) of dense float64 teacher logits."""
    top = teacher_NV.topk(k, dim=-1)
    tail_N = torch.logsumexp(teacher_NV.scatter(-1, top.indices, -torch.inf) / temperature, -1)
    return top.indices, top.values, tail_N


def dense_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """KL over the full vocabulary, by the textbook. [N]"""
    log_p = (teacher_NV / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - (student_NV / temperature).log_softmax(-1))).sum(-1)


def bucketed(probabilities_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """K kept probabilities and the sum of the rest, [N, K + 1]."""
    rest_N1 = probabilities_NV.scatter(-1, ids_NK, 0.0).sum(-1, keepdim=True)
    return torch.cat([probabilities_NV.gather(-1, ids_NK), rest_N1], -1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_with_all_ids_kept_it_is_the_dense_loss(temperature: float) -> None:
    teacher_NV, weights_N = logits(1), torch.rand(12, generator=torch.Generator().manual_seed(3))
    ids, kept, tail = keep(teacher_NV, 97, temperature)
    assert torch.isneginf(tail).all()
    exact = logits(2).requires_grad_()
    expected = temperature**2 * (dense_kl(exact, teacher_NV, temperature) * weights_N).sum()
    expected.backward()
    student = exact.detach().float().requires_grad_()
    loss = forward_kl(student, ids, kept.float(), tail.float(), temperature=temperature, weights_N=weights_N)
    loss.backward()
    assert student.grad is not None
    assert exact.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (student.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 8, 96])
def test_below_all_ids_it_is_the_kl_of_k_plus_one_buckets(k: int, temperature: float) -> None:
    teacher_NV = logits(1)
    ids, kept, tail = keep(teacher_NV, k, temperature)
    exact = logits(2).requires_grad_()
    p = bucketed((teacher_NV / temperature).softmax(-1), ids)
    q = bucketed((exact / temperature).softmax(-1), ids)
    expected_N = (p * (p.log() - q.log())).sum(-1)
    expected_N.sum().backward()
    student = exact.detach().float().requires_grad_()
    got_N = bucket_kl(student, ids, kept.float(), tail.float(), temperature=temperature)
    got_N.sum().backward()
    assert student.grad is not None
    assert exact.grad is not None
    # Logits of up to 9 nats rounded to float32 are 5e-7 off each.
    assert (got_N - expected_N).abs().max() < 1e-5
    assert (student.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()
    assert (got_N <= dense_kl(exact, teacher_NV, temperature) + 1e-5).all()


def test_the_stored_tail_grid_serves_temperatures_between_its_points() -> None:
    teacher_NV, student_NV = logits(1, v=200), logits(2, v=200)
    topk = topk_of(teacher_NV, 16)
    sequence = Sequence(np.arange(13, dtype=np.int32))
    padded = topk_of(torch.cat([teacher_NV, teacher_NV[:1]]), 16)
    targets = _targets([pack_of([sequence], [padded], window=13)], temperature=3.3, vocabulary=200)
    assert targets.tail_lse is not None
    ids, kept, tail = keep(teacher_NV, 16, 3.3)
    assert torch.equal(ids, torch.from_numpy(topk.ids).long())
    got_N = bucket_kl(student_NV, ids, kept, targets.tail_lse, temperature=3.3)
    assert (got_N - bucket_kl(student_NV, ids, kept, tail, temperature=3.3)).abs().max() < 1e-3


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_rows_that_keep_different_numbers_of_ids(temperature: float) -> None:
    """A nucleus: each row's loss and gradient are those of the row alone with a k of its own, to float64's rounding."""
    teacher_NV, student = logits(1, n=4), logits(2, n=4).requires_grad_()
    ids_NK = torch.full((4, 9), -1)
    kept_NK, tails = torch.full((4, 9), -torch.inf, dtype=torch.float64), []
    for row, count in enumerate((3, 1, 9, 5)):
        ids, kept, tail = keep(teacher_NV[row : row + 1], count, temperature)
        ids_NK[row, :count], kept_NK[row, :count] = ids[0], kept[0]
        tails.append(tail)
    got_N = bucket_kl(student, ids_NK, kept_NK, torch.cat(tails), temperature=temperature)
    (gradient,) = torch.autograd.grad(got_N.sum(), student)
    for row, count in enumerate((3, 1, 9, 5)):
        alone = student.detach()[row : row + 1].requires_grad_()
        wanted = bucket_kl(alone, *keep(teacher_NV[row : row + 1], count, temperature), temperature=temperature)
        wanted.sum().backward()
        assert alone.grad is not None
        assert got_N[row].item() == pytest.approx(wanted.item(), abs=1e-12)
        assert (gradient[row] - alone.grad[0]).abs().max() < 1e-12


@pytest.mark.parametrize("k", [1, 5, 11])
def test_gradients_are_those_of_the_value(k: int) -> None:
    ids, kept, tail = keep(logits(1, n=3, v=11), k, 2.0)
    student = logits(2, n=3, v=11).requires_grad_()
    weights_N = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: forward_kl(z, ids, kept, tail, temperature=2.0, weights_N=weights_N), (student,)
    )


def test_equal_models_have_no_loss_and_no_gradient() -> None:
    teacher_NV = logits(1)
    for temperature in TEMPERATURES:
        ids, kept, tail = keep(teacher_NV, 8, temperature)
        student = teacher_NV.float().requires_grad_()
        loss = forward_kl(student, ids, kept.float(), tail.float(), temperature=temperature, weights_N=torch.ones(12))
        loss.backward()
        assert student.grad is not None
        assert abs(loss.item()) < 1e-4
        assert student.grad.abs().max() < 1e-5


def test_it_does_not_renormalise_over_the_kept_ids() -> None:
    """A student right on the ratios of the kept ids and wrong on their mass must have a loss."""
    teacher_NV = logits(1)
    ids, kept, tail = keep(teacher_NV, 8, 1.0)
    student_NV = teacher_NV.scatter_add(-1, ids, torch.full((12, 8), -2.0, dtype=torch.float64))
    assert (bucket_kl(student_NV, ids, kept, tail, temperature=1.0) > 0.1).all()


@pytest.mark.parametrize("peak", [40.0, 300.0, 3e4])
def test_a_peaked_pair_keeps_its_tail_gradient(peak: float) -> None:
    """1 − Σ kept would be zero here; the tail's own log-sum still says where its mass should go."""
    teacher_NV, student_NV = logits(1), logits(2).float()
    teacher_NV[:, 0] += peak
    student_NV[:, 0] += peak
    ids, kept, tail = keep(teacher_NV, 4, 1.0)
    student = student_NV.requires_grad_()
    loss = bucket_kl(student, ids, kept.float(), tail.float(), temperature=1.0).sum()
    loss.backward()
    assert student.grad is not None
    assert math.isfinite(loss.item())
    assert loss.item() > -1e-5
    assert torch.isfinite(student.grad).all()


@given(
    n=st.integers(1, 4),
    v=st.integers(2, 40),
    data=st.data(),
    temperature=st.floats(1.0, 10.0),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_nothing_is_ever_nan(n: int, v: int, data: st.DataObject, temperature: float, scale: float, seed: int) -> None:
    """Any shape, all ties (scale 0), extreme logits, impossible ids of the teacher and of the student's tail."""
    k = data.draw(st.integers(1, v))
    teacher_NV, student_NV = scale * logits(seed, n, v, 1.0), scale * logits(seed + 1, n, v, 1.0)
    ids, kept, tail = keep(teacher_NV, k, temperature)
    impossible = data.draw(st.integers(0, k - 1))
    if impossible:
        kept[:, k - impossible :] = -torch.inf
    if data.draw(st.booleans()):
        tail = torch.full_like(tail, -torch.inf)
        student_NV = torch.where(torch.zeros(n, v, dtype=torch.bool).scatter(-1, ids, True), student_NV, -torch.inf)
    student = student_NV.float().requires_grad_()
    loss_N = bucket_kl(student, ids, kept.float(), tail.float(), temperature=temperature)
    loss_N.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(loss_N).all()
    assert torch.isfinite(student.grad).all()
    assert (loss_N >= -1e-4).all()


def whole(alpha: float, slice_elements: int) -> tuple[float, Tensor]:
    """Loss and gradient of one bf16-free case with a padded head, in slices of that size."""
    teacher_NV = logits(1)
    ids, kept, tail = keep(teacher_NV, 8, 2.0)
    targets = Targets(torch.arange(12) % 97, torch.linspace(0.5, 2.0, 12), ids, kept.float(), tail.float())
    student = torch.cat([logits(2).float(), torch.full((12, 6), 50.0)], -1).requires_grad_()
    sums = distillation_loss(
        student, targets, objective=Objective(alpha, 2.0), vocabulary=97, slice_elements=slice_elements
    )
    sums.total.backward()
    assert student.grad is not None
    return sums.total.item(), student.grad


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_slices_change_rounding_only(alpha: float) -> None:
    loss, gradient = whole(alpha, 2**26)
    for rows in (1, 5, 12):
        sliced, sliced_gradient = whole(alpha, 97 * rows)
        assert sliced == pytest.approx(loss, rel=1e-6)
        assert torch.allclose(sliced_gradient, gradient, rtol=1e-5, atol=1e-6)


def test_padded_columns_of_the_head_do_not_count() -> None:
    """They hold 50 in `whole`, which would swallow all the mass."""
    loss, gradient = whole(0.7, 2**26)
    assert loss / 12 < 30
    assert (gradient[:, 97:] == 0).all()
    assert (gradient[:, :97] != 0).any()


def test_parts_mix_by_alpha_and_weights() -> None:
    student_NV, teacher_NV = logits(2), logits(1)
    ids, kept, tail = keep(teacher_NV, 97, 2.0)
    labels, weights_N = torch.arange(12), torch.linspace(0.0, 2.0, 12, dtype=torch.float64)
    sums = distillation_loss(
        student_NV, Targets(labels, weights_N, ids, kept, tail), objective=Objective(0.25, 2.0), vocabulary=97
    )
    ce = -(student_NV.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1) * weights_N).sum()
    kd = 4.0 * (dense_kl(student_NV, teacher_NV, 2.0) * weights_N).sum()
    assert sums.total.item() == pytest.approx((0.25 * kd + 0.75 * ce).item(), rel=1e-9)
    assert cross_entropy(student_NV, labels, weights_N=weights_N).item() == pytest.approx(ce.item(), rel=1e-9)


def test_a_missing_part_is_an_error_unless_its_coefficient_is_zero() -> None:
    one = torch.tensor(1.0)
    assert combine(one, None, alpha=1.0) == 1.0
    assert combine(None, one, alpha=0.0) == 1.0
    with pytest.raises(AssertionError):
        combine(None, one, alpha=0.5)


def test_no_positions_give_zero() -> None:
    empty = Targets(
        torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4),
        torch.zeros(0),
    )  # fmt: skip
    student = torch.zeros(0, 97, requires_grad=True)
    assert distillation_loss(student, empty, objective=Objective(0.7, 2.0), vocabulary=97).total.item() == 0.0
