"""The fused head and loss against the plain form, which is the reference: value and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.pipeline.student.full_logits import TeacherHead
from stillroom.pipeline.student.losses import LossSums, Objective, StudentHead, Targets
from stillroom.pipeline.student.losses import fused as fused_module
from stillroom.pipeline.student.teaching import Teaching, distillation_loss, distillation_loss_fused

V, D, PADDED = 60, 8, 4
ALL = {"forward_kl": 0.7, "reverse_kl": 0.4, "js": 1.0, "tv": 0.3, "mse": 2.0}
PLAIN = {"forward_kl": 1.0}
#: Columns: scale, soft cap, whether there is a bias.
FORMS: list[tuple[float, float | None, bool]] = [(1.0, None, False), (1.0, None, True), (0.5, 3.0, True)]


class Case:
    """Hidden states, a head with padding, and all parts of a signal, ragged and with padding slots."""

    def __init__(
        self, seed: int = 0, n: int = 11, k: int = 6, size: float = 1.0, temperature: float = 1.0, *, v: int = V,
        d: int = D,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.weight, self.bias = size * normal(n, d), normal(v + PADDED, d), normal(v + PADDED)
        teacher_hidden, teacher_weight = normal(n, d), normal(v, d)
        self.teacher_head = TeacherHead(teacher_weight.float(), None, 1.0, None)
        teacher_NV = size * teacher_hidden @ teacher_weight.T
        top = teacher_NV.topk(k, -1)
        self.ids, self.kept = top.indices, top.values
        if n and k > 1:
            self.ids[0, 1:], self.kept[0, 1:] = -1, -torch.inf
        rest_NV = teacher_NV.clone()
        for row in range(n):
            rest_NV[row, self.ids[row][self.ids[row] >= 0]] = -torch.inf
        self.tail = torch.logsumexp(rest_NV / temperature, -1)
        self.labels = torch.randint(0, v, (n,), generator=generator)
        self.weights = torch.rand(n, generator=generator) * (torch.arange(n) % 4 != 2)  # some masked
        self.drawn = torch.tensor([[3, 7, -1]]).repeat(n, 1), torch.tensor([[4, 1, 0]]).repeat(n, 1)
        self.teacher_hidden = teacher_hidden.float()

    def targets(self, dtype: torch.dtype) -> Targets:
        """The logits in that dtype: more than a store has, for the plain form in float64 is the oracle."""
        return Targets(
            self.labels, self.weights.float(), self.ids, self.kept.to(dtype), self.tail.to(dtype), *self.drawn
        )

    def stored(self) -> Targets:
        """As a store of hidden states has it."""
        return replace(self.targets(torch.float32), hidden=self.teacher_hidden)

    def teaching(self, part: str) -> Teaching:
        return Teaching(part, self.teacher_head if part == "hidden" else None)

    def leaves(self, dtype: torch.dtype, *, biased: bool) -> list[Tensor]:
        found = [self.hidden, self.weight, *([self.bias] if biased else [])]
        return [t.to(dtype).requires_grad_() for t in found]


def both(
    case: Case, objective: Objective, *, part: str = "topk", form: tuple[float, float | None, bool] = FORMS[0],
    dtype: torch.dtype = torch.float32, rows: int = 3,
) -> tuple[tuple[LossSums, list[Tensor]], tuple[LossSums, list[Tensor]]]:  # fmt: skip
    """(sums, gradients) of the plain form in float64 and of the fused one."""
    scale, softcap, biased = form

    def run(fused: bool, dtype: torch.dtype) -> tuple[LossSums, list[Tensor]]:
        hidden, weight, *bias = leaves = case.leaves(dtype, biased=biased)
        head = StudentHead(weight, bias[0] if bias else None, scale, softcap)
        settings: dict[str, Any] = {"objective": objective, "vocabulary": V, "teaching": case.teaching(part)}
        targets = case.stored() if part == "hidden" else case.targets(dtype)
        if fused:
            sums = distillation_loss_fused(hidden, head, targets, slice_elements=rows * V, **settings)
        else:
            sums = distillation_loss(head.logits(hidden), targets, **settings)
        return sums, list(torch.autograd.grad(3.0 * sums.total, leaves))

    return run(False, torch.float64), run(True, dtype)


def require_close(plain: tuple[LossSums, list[Tensor]], fused: tuple[LossSums, list[Tensor]], tolerance: float) -> None:
    for name in ("total", "kd", "ce"):
        expected, found = getattr(plain[0], name), getattr(fused[0], name)
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)
    for expected, found in zip(plain[1], fused[1], strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    ("part", "temperature", "weights"),
    [
        ("topk", 1.0, ALL), ("topk", 4.0, ALL), ("topk", 4.0, PLAIN), ("sampled", 1.0, PLAIN), ("hidden", 3.0, ALL),
        ("topk+sampled", 1.0, PLAIN), ("topk+sampled", 1.0, {"forward_kl": 0.7}),
        ("hidden", 1.0, {"cosine": 1.0, "forward_kl": 0.5}),
    ],
)  # fmt: skip
def test_it_is_the_plain_form(
    part: str, temperature: float, weights: dict[str, float], alpha: float, smoothing: float,
    form: tuple[float, float | None, bool],
) -> None:  # fmt: skip
    """Every signal, temperature 1 and not, with and without text, head forms, padding of the head, masked positions."""
    objective = Objective(alpha, temperature, weights, 0.3, smoothing)
    plain, fused = both(Case(temperature=temperature), objective, part=part, form=form)
    require_close(plain, fused, 2e-5)
    assert not fused[1][1][V:].any()


@pytest.mark.parametrize("block", [1, V, 2 * V, 2**20])
@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_slices_and_blocks_change_nothing_but_rounding(rows: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillroom.pipeline.student.teaching.BLOCK_ELEMENTS", block)
    require_close(*both(Case(temperature=4.0), Objective(0.6, 4.0, ALL), rows=rows, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("k", [1, V - 1, V])
def test_one_id_kept_and_all_of_them(k: int) -> None:
    require_close(*both(Case(k=k, temperature=2.0), Objective(0.6, 2.0, ALL)), 2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("part", "temperature"), [("topk", 1.0), ("topk", 4.0), ("sampled", 1.0), ("topk+sampled", 1.0)]
)
def test_gradients_are_those_of_the_value(
    part: str, temperature: float, form: tuple[float, float | None, bool]
) -> None:
    """By differences, with the backward pass asked for as often as gradcheck likes."""
    scale, softcap, biased = form
    case = Case(n=4, k=3, temperature=temperature, v=12, d=3)
    smooth = {name: weight for name, weight in ALL.items() if name != "tv"}  # which has corners
    objective = Objective(0.6, temperature, PLAIN if "sampled" in part else smooth, 0.3, 0.05)

    def loss(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        head = StudentHead(weight, bias[0] if bias else None, scale, softcap)
        return distillation_loss_fused(
            hidden, head, case.targets(torch.float64), objective=objective, vocabulary=12,
            teaching=case.teaching(part), slice_elements=3 * 12, again=True,
        ).total  # fmt: skip

    assert torch.autograd.gradcheck(loss, case.leaves(torch.float64, biased=biased))


def test_a_tied_embedding_gets_both_gradients() -> None:
    """The parameter serves as the input's embedding too: autograd adds the two, here as in the plain form."""
    case, objective = Case(temperature=4.0), Objective(0.6, 4.0, ALL)
    ids = torch.arange(11)

    def gradient(fused: bool) -> Tensor:
        weight = case.weight.clone().requires_grad_()
        hidden, head = torch.tanh(weight[ids]), StudentHead(weight)
        targets = case.targets(torch.float64)
        if fused:
            sums = distillation_loss_fused(hidden, head, targets, objective=objective, vocabulary=V)
        else:
            sums = distillation_loss(head.logits(hidden), targets, objective=objective, vocabulary=V)
        sums.total.backward()
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-10, atol=1e-12)


def test_steps_add_up() -> None:
    """Gradient accumulation: two micro-batches are the whole one."""
    case, objective = Case(temperature=4.0), Objective(0.6, 4.0, ALL)
    targets = case.targets(torch.float64)

    def gradient(rows: int) -> Tensor:
        hidden, weight = case.leaves(torch.float64, biased=False)
        for part_ND, part in zip(hidden.split(rows), targets.split(rows), strict=True):
            sums = distillation_loss_fused(part_ND, StudentHead(weight), part, objective=objective, vocabulary=V)
            (sums.total / 7).backward()
        assert weight.grad is not None
        return weight.grad

    torch.testing.assert_close(gradient(6), gradient(11), rtol=1e-10, atol=1e-12)


def test_what_needs_no_gradient_gets_none() -> None:
    case, objective = Case(), Objective(0.6, 1.0)
    targets = case.targets(torch.float32)
    hidden, weight = case.leaves(torch.float32, biased=False)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return distillation_loss_fused(hidden, StudentHead(weight), targets, objective=objective, vocabulary=V).total

    expected = loss(hidden, weight)
    (whole,) = torch.autograd.grad(expected, hidden)
    frozen = loss(hidden, weight.detach())  # a head that is not trained
    (alone,) = torch.autograd.grad(frozen, hidden)
    assert torch.equal(alone, whole)
    with torch.no_grad():
        value = loss(hidden, weight)
    assert not value.requires_grad
    assert torch.equal(value, expected.detach())


def test_the_gradient_is_given_once() -> None:
    case = Case()
    hidden, weight = case.leaves(torch.float32, biased=False)
    sums = distillation_loss_fused(
        hidden, StudentHead(weight), case.targets(torch.float32), objective=Objective(0.6, 1.0), vocabulary=V
    )
    sums.total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        sums.total.backward()


def test_no_positions_are_a_loss_of_zero() -> None:
    case = Case(n=0)
    hidden, weight = case.leaves(torch.float32, biased=False)
    for part in ("topk", "sampled", "topk+sampled", "hidden"):
        sums = distillation_loss_fused(
            hidden, StudentHead(weight), case.stored(), objective=Objective(0.6, 1.0), vocabulary=V,
            teaching=case.teaching(part),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(sums.total, weight)
        assert sums.total.item() == 0.0
        assert not gradient.any()


def test_the_same_inputs_give_the_same_bits() -> None:
    case, objective = Case(n=50, temperature=4.0), Objective(0.6, 4.0, ALL)
    first, second = (both(case, objective)[1] for _ in range(2))
    assert torch.equal(first[0].total, second[0].total)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("part", ["topk", "sampled", "topk+sampled", "hidden"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_off_by_its_own_rounding_only(dtype: torch.dtype, part: str) -> None:
    """float32 parameters, products in 16 bits. Gradients in float32; within 3 % of float64's, as the dtype's rounding
    of
    the logits makes them. float16: of positions whose weight is 1e-6, which its range would lose."""
    case = Case(n=40)
    objective = Objective(0.6, 1.0)
    case.weights = torch.full_like(case.weights, 1e-6)
    (plain, expected), _ = both(case, objective, part=part)
    hidden, weight = leaves = case.leaves(torch.float32, biased=False)
    with torch.autocast("cpu", dtype=dtype):
        sums = distillation_loss_fused(
            hidden, StudentHead(weight), case.stored(), objective=objective, vocabulary=V,
            teaching=case.teaching(part), slice_elements=7 * V,
        )  # fmt: skip
    found = torch.autograd.grad(3.0 * sums.total, leaves)
    assert sums.total.dtype == torch.float32
    assert float(sums.total.detach()) == pytest.approx(float(plain.total.detach()), rel=2e-2)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.03 * other.norm()


@pytest.mark.parametrize("frozen", [False, True])
def test_sums_of_many_positions_do_not_overflow_float16(frozen: bool) -> None:
    """400 positions of one label with hidden states near 50: Σ g h of that label is 2·10^4 times the largest g."""
    case = Case(n=400)
    case.hidden = 50 + case.hidden
    case.weight = case.weight / 50
    case.labels = torch.full_like(case.labels, 5)
    case.weights = torch.ones_like(case.weights)
    (_, expected), _ = both(case, Objective(0.0, 1.0))
    hidden = case.hidden.detach().float().requires_grad_()
    weight = case.weight.detach().float().requires_grad_(not frozen)
    with torch.autocast("cpu", dtype=torch.float16):
        sums = distillation_loss_fused(
            hidden, StudentHead(weight), case.stored(), objective=Objective(0.0, 1.0), vocabulary=V,
            teaching=case.teaching("topk"),
        )  # fmt: skip
    (3.0 * sums.total).backward()
    for one, other in zip((hidden.grad, weight.grad), expected, strict=True):
        if one is not None:
            assert (one - other).norm() <= 0.03 * other.norm()
    assert (weight.grad is None) == frozen


def test_a_scaled_loss_reaches_float16_hidden_states_whole() -> None:
    """Gradients near 1e-9, which float16 has not; times the scale of the loss it has them."""
    case = Case(n=40)
    case.weights = torch.full_like(case.weights, 1e-9)
    (_, (expected, _)), _ = both(case, Objective(0.6, 1.0))
    hidden = case.hidden.detach().half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        sums = distillation_loss_fused(
            hidden, StudentHead(case.weight.detach().float()), case.stored(), objective=Objective(0.6, 1.0),
            vocabulary=V, teaching=case.teaching("topk"),
        )  # fmt: skip
    (3.0 * 2.0**24 * sums.total).backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float16
    assert (hidden.grad.double() / 2.0**24 - expected).norm() <= 0.03 * expected.norm()


def test_a_model_of_sixteen_bits_keeps_its_dtype() -> None:
    plain, fused = both(Case(n=40), Objective(0.6, 1.0), form=FORMS[1], dtype=torch.bfloat16)
    for one, other in zip(fused[1], plain[1], strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() <= 0.03 * other.norm()


def test_the_logits_exist_for_one_slice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of float32 [N, V]: the largest that the loss is given has one slice's rows."""
    seen = []
    kept = fused_module._Run._loss

    def watch(self: Any, z_PV: Tensor, targets: Targets) -> Any:
        seen.append(max(buffer.numel() for buffer in self._buffers))
        return kept(self, z_PV, targets)

    monkeypatch.setattr(fused_module._Run, "_loss", watch)
    both(Case(n=40, temperature=4.0), Objective(0.6, 4.0), rows=5)
    assert set(seen) == {5 * V}


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 6),
    k=st.integers(1, V),
    temperature=st.sampled_from([1.0, 1.7, 10.0]),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    size=st.sampled_from([0.0, 1.0, 100.0, 3e3]),
    name=st.sampled_from(sorted(ALL)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.integers(1, 7),
)
@settings(max_examples=200, deadline=None)
def test_nothing_is_ever_nan(
    seed: int, n: int, k: int, temperature: float, alpha: float, size: float, name: str, dtype: torch.dtype, rows: int
) -> None:
    """Ties (size 0), logits of 1e4, one id kept, all of them, 16 bits; and it is the plain form."""
    case, objective = Case(seed, n, k, size, temperature), Objective(alpha, temperature, {name: 1.0})
    plain, fused = both(case, objective, dtype=dtype, rows=rows)
    assert torch.isfinite(fused[0].total)
    assert all(torch.isfinite(gradient).all() for gradient in fused[1])
    if dtype == torch.float32 and size <= 1.0:
        require_close(plain, fused, 1e-4)
