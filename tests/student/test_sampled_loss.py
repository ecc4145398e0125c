"""The loss on draws against the dense cross-entropy with the same shares, and against the teacher on average."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.pipeline.student.losses import Objective, Targets, cross_entropy
from stillroom.pipeline.student.sampled_loss import require_unit_temperature, sampled_cross_entropy, tail_cross_entropy
from stillroom.pipeline.student.teaching import Teaching
from stillroom.storage.codecs.sampled import position_keys
from stillroom.storage.errors import UnsupportedSignal
from stillroom.workers.draws import draw


def logits(seed: int, n: int = 12, v: int = 97, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(teacher_NV: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """(ids int64 [N, U], counts int32 [N, U]) of a teacher, as a store holds them."""
    block = draw(teacher_NV, position_keys("5a" * 16, np.arange(len(teacher_NV))), draws=draws)
    return torch.from_numpy(block.ids.astype(np.int64)), torch.from_numpy(block.counts)


def dense(ids_NU: Tensor, counts_NU: Tensor, v: int) -> Tensor:
    """p̂ [N, V], float64."""
    shares_NV = torch.zeros(len(ids_NU), v, dtype=torch.float64)
    for n, (ids, counts) in enumerate(zip(ids_NU.tolist(), counts_NU.tolist(), strict=True)):
        for id, count in zip(ids, counts, strict=True):
            if count:
                shares_NV[n, id] = count / sum(counts)
    return shares_NV


@pytest.mark.parametrize("draws", [1, 2, 50])
def test_value_and_gradient_are_those_of_the_dense_cross_entropy(draws: int) -> None:
    """Float32 against float64; the gradient is w · (q − p̂)."""
    ids, counts = drawn(logits(1), draws)
    weights_N = torch.linspace(0.0, 2.0, 12)
    p_NV, exact = dense(ids, counts, 97), logits(2)
    expected = -(weights_N[:, None] * p_NV * exact.log_softmax(-1)).sum()
    student = exact.float().requires_grad_()
    loss = sampled_cross_entropy(student, ids, counts, temperature=1.0, weights_N=weights_N)
    loss.backward()
    assert student.grad is not None
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(student.grad.double(), weights_N[:, None] * (exact.softmax(-1) - p_NV), rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_value() -> None:
    ids, counts = drawn(logits(1, n=3, v=11), 20)
    weights_N = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    student = logits(2, n=3, v=11).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: sampled_cross_entropy(z, ids, counts, temperature=1.0, weights_N=weights_N), (student,)
    )


def test_on_average_it_is_the_full_cross_entropy() -> None:
    """Linear in p̂: over 4,000 draws of one teacher row, the mean of value and gradient lies within 5 standard errors
    of −Σ p log q and q − p."""
    teacher_V, student_V = logits(1, n=1, v=30)[0], logits(2, n=1, v=30)[0]
    ids, counts = drawn(teacher_V.expand(4000, -1), 10)
    student = student_V.expand(4000, -1).clone().requires_grad_()
    one = torch.ones(1)
    values = torch.stack(
        [sampled_cross_entropy(student[n : n + 1], ids[n : n + 1], counts[n : n + 1], temperature=1.0, weights_N=one)
         for n in range(4000)]
    )  # fmt: skip
    (gradient_NV,) = torch.autograd.grad(values.sum(), student)
    full = -(teacher_V.softmax(-1) * student_V.log_softmax(-1)).sum()
    error = values.detach().std() / 4000**0.5
    assert abs(values.mean() - full) < 5 * error
    assert error < 0.02 * full, "the test must be able to see a wrong value"
    p_V = teacher_V.softmax(-1)
    fraction_V = 10 * p_V % 1  # a count is N·p rounded down or up, so its variance is f(1 − f)
    error_V = (fraction_V * (1 - fraction_V) / 4000).sqrt() / 10
    assert ((gradient_NV.mean(0) - (student_V.softmax(-1) - p_V)).abs() <= 5 * error_V + 1e-6).all()


@pytest.mark.parametrize("draws", [1, 50])
@pytest.mark.parametrize("k", [1, 20, 96, 97])
def test_the_tail_s_value_and_gradient_are_the_dense_ones(draws: int, k: int) -> None:
    """Float32 against float64, from single tokens' shares and a softmax over what is not kept."""
    teacher_NV, exact = logits(1), logits(2)
    ids, counts = drawn(teacher_NV, draws)
    kept = teacher_NV.topk(k, -1).indices
    weights_N = torch.linspace(0.0, 2.0, 12)
    tail_NV = torch.ones(12, 97, dtype=torch.bool).scatter(1, kept, False)
    p_NV = dense(ids, counts, 97) * tail_NV
    oracle = exact.clone().requires_grad_()
    log_q_NV = oracle.masked_fill(~tail_NV, -torch.inf).log_softmax(-1) if k < 97 else torch.zeros_like(oracle)
    expected = -(weights_N[:, None] * p_NV * torch.where(tail_NV, log_q_NV, 0.0)).sum()
    student = exact.float().requires_grad_()
    loss = tail_cross_entropy(student, kept, ids, counts, temperature=1.0, weights_N=weights_N)
    (gradient_NV,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_NV = torch.autograd.grad(expected, oracle)[0] if k < 97 else torch.zeros_like(oracle)
    assert torch.allclose(gradient_NV.double(), expected_NV, rtol=0, atol=1e-6)
    assert (gradient_NV[~tail_NV] == 0).all()


def test_top_k_and_draws_are_on_average_the_gradient_of_the_whole_vocabulary() -> None:
    """Over 4,000 draws of one row within 5 standard errors of q − p, where top-k alone is 100 of them off; and without
    noise in what is kept."""
    count, k, draws = 4000, 8, 20
    teacher_V, student_V = logits(1, n=1, v=60, spread=1.5)[0], logits(2, n=1, v=60, spread=1.5)[0]
    ids, counts = drawn(teacher_V.expand(count, -1), draws)
    kept = teacher_V.topk(k)
    tail = torch.logsumexp(teacher_V.scatter(0, kept.indices, -torch.inf), 0)
    targets = Targets(
        torch.zeros(count, dtype=torch.int64), torch.ones(count), kept.indices.expand(count, -1),
        kept.values.expand(count, -1), tail.expand(count), ids, counts.to(torch.int64),
    )  # fmt: skip

    def gradient(part: str) -> Tensor:
        student_NV = student_V.expand(count, -1).clone().requires_grad_()
        loss = Teaching(part).loss(student_NV, targets, objective=Objective(1.0, 1.0))
        return torch.autograd.grad(loss, student_NV)[0]

    full_V = student_V.softmax(-1) - teacher_V.softmax(-1)
    both_NV = gradient("topk+sampled")
    error_V = both_NV.std(0) / count**0.5
    assert ((both_NV.mean(0) - full_V).abs() <= 5 * error_V + 1e-6).all()
    assert ((gradient("topk").mean(0) - full_V).abs() > 100 * error_V + 1e-6).any()
    drawn_NV = gradient("sampled")
    assert both_NV.var(0).sum() < drawn_NV.var(0).sum()
    assert both_NV[:, kept.indices].var(0).max() < 1e-20 < drawn_NV[:, kept.indices].var(0).max()


def test_one_draw_is_a_hard_label() -> None:
    labels_N, weights_N = torch.arange(12), torch.linspace(0.5, 2.0, 12)
    student_NV = logits(2).float()
    loss = sampled_cross_entropy(
        student_NV, labels_N[:, None], torch.ones(12, 1, dtype=torch.int32), temperature=1.0, weights_N=weights_N
    )
    assert loss.item() == pytest.approx(cross_entropy(student_NV, labels_N, weights_N=weights_N).item(), rel=1e-6)


def test_unused_slots_count_for_nothing_even_over_an_impossible_id_0() -> None:
    """Padding reads id 0; the student that excludes it must neither lose nor become NaN."""
    ids, counts = torch.tensor([[3, 5, -1, -1], [1, 2, 3, 4]]), torch.tensor([[30, 20, 0, 0], [20, 10, 10, 10]])
    z_NV = logits(2, n=2, v=8)
    z_NV[:, 0] = -torch.inf
    student = z_NV.float().requires_grad_()
    weights_N = torch.tensor([1.0, 0.0])
    loss = sampled_cross_entropy(student, ids, counts, temperature=1.0, weights_N=weights_N)
    loss.backward()
    cut = sampled_cross_entropy(student[:1], ids[:1, :2], counts[:1, :2], temperature=1.0, weights_N=weights_N[:1])
    assert student.grad is not None
    assert loss.item() == cut.item()
    assert torch.isfinite(student.grad).all()
    assert (student.grad[:, 0] == 0).all()
    assert (student.grad[1] == 0).all()


def test_an_id_drawn_that_the_student_excludes_costs_infinity_not_nan() -> None:
    student_NV = torch.tensor([[0.0, -torch.inf, 1.0]])
    ids, counts = torch.tensor([[0, 1]]), torch.tensor([[1, 1]])
    assert sampled_cross_entropy(student_NV, ids, counts, temperature=1.0, weights_N=torch.ones(1)).item() == np.inf


@given(
    n=st.integers(1, 4),
    v=st.integers(1, 40),
    draws=st.integers(1, 60),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
def test_nothing_is_ever_nan(n: int, v: int, draws: int, scale: float, seed: int) -> None:
    """Ties, extreme logits, one id: finite, and never below the entropy of p̂, where q = p̂ (Gibbs)."""
    ids, counts = drawn(scale * logits(seed, n, v, 1.0), draws)
    student = (scale * logits(seed + 1, n, v, 1.0)).float().requires_grad_()
    loss = sampled_cross_entropy(student, ids, counts, temperature=1.0, weights_N=torch.ones(n))
    loss.backward()
    p_NV = dense(ids, counts, v)
    entropy = -torch.special.xlogy(p_NV, p_NV).sum().item()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert entropy - 1e-4 * max(1.0, scale) <= loss.item() < np.inf


@pytest.mark.parametrize("temperature", [2.0, 0.5, 1.0001])
def test_another_temperature_is_refused_with_the_remedy(temperature: float) -> None:
    ids, counts = drawn(logits(1), 50)
    with pytest.raises(UnsupportedSignal, match=rf"temperature {temperature:g} .* set the temperature to 1, or") as e:
        sampled_cross_entropy(logits(2), ids, counts, temperature=temperature, weights_N=torch.ones(12))
    assert "\n" not in str(e.value)
    require_unit_temperature(1.0)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    """256 + 1/2 is no bfloat16: a logsumexp there would be off by up to a whole nat."""
    ids, counts = drawn(logits(1), 50)
    student_NV = (256 + logits(2)).bfloat16()
    loss = sampled_cross_entropy(student_NV, ids, counts, temperature=1.0, weights_N=torch.ones(12))
    exact = sampled_cross_entropy(student_NV.double(), ids, counts, temperature=1.0, weights_N=torch.ones(12))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@given(
    n=st.integers(1, 4),
    v=st.integers(1, 40),
    draws=st.integers(1, 60),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_tail_is_never_nan_nor_below_zero(n: int, v: int, draws: int, scale: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, v))
    teacher_NV = logits(3, n=n, v=v)
    ids, counts = drawn(teacher_NV, draws)
    kept = teacher_NV.topk(k, -1).indices
    kept[0, 1:] = -1
    student = logits(4, n=n, v=v, spread=scale).float().requires_grad_()
    loss = tail_cross_entropy(student, kept, ids, counts, temperature=1.0, weights_N=torch.ones(n))
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert loss.item() >= -1e-3 * scale
