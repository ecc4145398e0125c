"""Every output loss against a dense float64 oracle written from the textbook, and where a signal does not determine
one."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from stillroom.pipeline.fidelity import require_taught
from stillroom.pipeline.student.config import LossConfig, StudentConfig, require_determined
from stillroom.pipeline.student.full_logits import full_loss
from stillroom.pipeline.student.losses import Objective, Targets, cross_entropy, sparse_loss
from stillroom.storage.errors import UnsupportedSignal
from stillroom.storage.records import HiddenSpec, SignalSpec, TopKSpec
from tests.student.test_losses import bucketed, keep, logits

NAMES = ("forward_kl", "reverse_kl", "js", "tv", "mse", "cosine")
BUCKETED = NAMES[:-1]
MIXING = 0.3
V = 97


def js(p: Tensor, q: Tensor) -> Tensor:
    m = MIXING * p + (1 - MIXING) * q
    return (MIXING * p * (p / m).log() + (1 - MIXING) * q * (q / m).log()).sum(-1)


#: On probabilities [N, B]; sizes: ids in each of the B.
ORACLES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda p, q, _: (p * (p / q).log()).sum(-1),
    "reverse_kl": lambda p, q, _: (q * (q / p).log()).sum(-1),
    "js": lambda p, q, _: js(p, q),
    "tv": lambda p, q, _: (p - q).abs().sum(-1) / 2,
    "mse": lambda p, q, sizes: ((p - q) ** 2 / sizes).sum(-1),
}
POWER = {"tv": 1, "cosine": 0}


def objective(name: str, temperature: float, weight: float = 1.0) -> Objective:
    return Objective(1.0, temperature, {name: weight}, MIXING)


def targets(teacher_NV: Tensor, k: int, temperature: float, weights_N: Tensor, dtype: torch.dtype) -> Targets:
    ids, kept, tail = keep(teacher_NV, k, temperature)
    labels = torch.zeros(len(ids), dtype=torch.long)
    return Targets(labels, weights_N, ids, kept.to(dtype), tail.to(dtype))


def oracle(name: str, student_NV: Tensor, teacher_NV: Tensor, k: int, temperature: float) -> Tensor:
    """[N], with the factor of the temperature: over V where k = V, else over the k ids and the rest."""
    if name == "cosine":
        return 1 - torch.cosine_similarity(student_NV, teacher_NV, dim=-1)
    p, q = ((z / temperature).softmax(-1) for z in (teacher_NV, student_NV))
    sizes = torch.ones(k + (k < V), dtype=torch.float64)
    if k < V:
        ids = teacher_NV.topk(k, dim=-1).indices
        p, q = bucketed(p, ids), bucketed(q, ids)
        sizes[-1] = V - k
    return temperature ** POWER.get(name, 2) * ORACLES[name](p, q, sizes)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
@pytest.mark.parametrize(("name", "k"), [(n, k) for n in NAMES for k in (1, 8, 96, V) if k == V or n != "cosine"])
def test_value_and_gradient_are_the_oracles(name: str, k: int, temperature: float) -> None:
    """Float32 against float64, to 1e-5 of the largest: with k = V of the loss over V, below of the stated buckets."""
    teacher_NV, weights_N = logits(1), torch.rand(12, generator=torch.Generator().manual_seed(3))
    exact = logits(2).requires_grad_()
    expected = (oracle(name, exact, teacher_NV, k, temperature) * weights_N).sum()
    expected.backward()
    student = exact.detach().float().requires_grad_()
    found = targets(teacher_NV, k, temperature, weights_N, torch.float32)
    loss = sparse_loss(student, found, objective=objective(name, temperature))
    loss.backward()
    assert student.grad is not None
    assert exact.grad is not None
    # Few buckets at a high temperature all but agree, and float32 has the logits to 5e-7: that much is allowed there.
    some = 0.0 if k == V else 1e-6
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=some * 12 * temperature**2)
    assert (student.grad - exact.grad).abs().max() <= (1e-5 * exact.grad.abs().max()).clamp_min(some * temperature)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_over_the_whole_vocabulary_it_is_the_same_oracle(name: str, temperature: float) -> None:
    """What the hidden tier is held to."""
    teacher_NV, weights_N = logits(1), torch.rand(12, generator=torch.Generator().manual_seed(3))
    exact = logits(2).requires_grad_()
    expected = (oracle(name, exact, teacher_NV, V, temperature) * weights_N).sum()
    expected.backward()
    student = exact.detach().float().requires_grad_()
    loss = full_loss(student, teacher_NV.float(), objective=objective(name, temperature), weights_N=weights_N)
    loss.backward()
    assert student.grad is not None
    assert exact.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (student.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


@pytest.mark.parametrize("name", BUCKETED)
@pytest.mark.parametrize("k", [1, 8, 96])
def test_buckets_are_a_lower_bound_of_the_whole_vocabulary(name: str, k: int) -> None:
    for temperature in (1.0, 4.0):
        for seed in range(5):
            teacher_NV, student_NV, ones = logits(seed), logits(seed + 50), torch.ones(12, dtype=torch.float64)
            found = targets(teacher_NV, k, temperature, ones, torch.float64)
            below = sparse_loss(student_NV, found, objective=objective(name, temperature))
            whole = full_loss(student_NV, teacher_NV, objective=objective(name, temperature), weights_N=ones)
            assert below <= whole * (1 + 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_factor_keeps_the_gradient_as_the_temperature_grows(name: str) -> None:
    """Logits of 0.1 nat are the limit of high T already at 8: what is left from there to 10 is the factor's to undo."""
    teacher_NV, ones = logits(1, spread=0.1), torch.ones(12, dtype=torch.float64)

    def size(temperature: float) -> float:
        student = logits(2, spread=0.1).requires_grad_()
        full_loss(student, teacher_NV, objective=objective(name, temperature), weights_N=ones).backward()
        assert student.grad is not None
        return float(student.grad.norm())

    assert size(10.0) == pytest.approx(size(5.0), rel=0.02)


def test_jensen_shannon_goes_to_both_kls() -> None:
    """Divided by β to the forward KL, by 1 − β to the reverse (GKD, eq. 1)."""
    teacher_NV, student_NV = logits(1, spread=1.0), logits(2, spread=1.0)
    ones = torch.ones(12, dtype=torch.float64)

    def loss(name: str, mixing: float = 0.5) -> float:
        return float(
            full_loss(student_NV, teacher_NV, objective=Objective(1.0, 1.0, {name: 1.0}, mixing), weights_N=ones)
        )

    assert loss("js", 1e-6) / 1e-6 == pytest.approx(loss("forward_kl"), rel=1e-3)
    assert loss("js", 1 - 1e-6) / 1e-6 == pytest.approx(loss("reverse_kl"), rel=1e-3)
    assert 0 < loss("js") < 12 * math.log(2)


def test_losses_add_up_by_their_weights() -> None:
    weights = {"forward_kl": 0.5, "reverse_kl": 2.0, "js": 1.0, "tv": 0.25, "mse": 3.0}
    teacher_NV, student_NV, ones = logits(1), logits(2), torch.ones(12, dtype=torch.float64)
    found = targets(teacher_NV, 8, 3.0, ones, torch.float64)
    together = sparse_loss(student_NV, found, objective=Objective(1.0, 3.0, weights, MIXING))
    alone = [sparse_loss(student_NV, found, objective=objective(name, 3.0, w)) for name, w in weights.items()]
    assert float(together) == pytest.approx(float(sum(alone)), rel=1e-12)


def test_label_smoothing_is_a_target_spread_over_the_vocabulary() -> None:
    student, labels = logits(2).requires_grad_(), torch.arange(12)
    spread_NV = 0.9 * torch.nn.functional.one_hot(labels, V).double() + 0.1 / V
    loss = cross_entropy(student, labels, weights_N=torch.ones(12), label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = -(spread_NV * student.log_softmax(-1)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (gradient - (student.softmax(-1) - spread_NV)).abs().max() < 1e-12


@given(
    n=st.integers(1, 4),
    v=st.integers(2, 40),
    data=st.data(),
    name=st.sampled_from(NAMES),
    temperature=st.floats(1.0, 10.0),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_nothing_is_ever_nan(
    n: int, v: int, data: st.DataObject, name: str, temperature: float, scale: float, seed: int
) -> None:
    """Ties (scale 0), logits of 1e4, k = 1, ids that the teacher can never say, rows that keep fewer."""
    k = v if name == "cosine" else data.draw(st.integers(1, v))
    teacher_NV, student_NV = scale * logits(seed, n, v, 1.0), scale * logits(seed + 1, n, v, 1.0)
    ids, kept, tail = keep(teacher_NV, k, temperature)
    few = data.draw(st.integers(1, k))
    kept[:, few:] = -torch.inf
    if data.draw(st.booleans()):
        ids[0, few:] = -1
        rest = teacher_NV[0].scatter(0, ids[0, :few], -torch.inf)
        tail[0] = torch.logsumexp(rest / temperature, -1)
    student = student_NV.float().requires_grad_()
    found = Targets(torch.zeros(n, dtype=torch.long), torch.ones(n), ids, kept.float(), tail.float())
    loss = sparse_loss(student, found, objective=objective(name, temperature))
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert loss >= -1e-4 * temperature**2 * n


class TestRecipe:
    def test_it_is_the_forward_kl_unless_something_is_said(self) -> None:
        found = Objective.of(LossConfig())
        assert found == Objective(0.7, 2.0, {"forward_kl": 1.0})
        asked = LossConfig.model_validate({"output": {"js": 2, "tv": 0.5}, "label_smoothing": 0.1})
        assert Objective.of(asked) == Objective(0.7, 2.0, {"tv": 0.5, "js": 2.0}, 0.5, 0.1)
        mixed = LossConfig.model_validate({"output": {"js": {"weight": 1, "mixing": 0.1}}})
        assert Objective.of(mixed).mixing == 0.1

    @pytest.mark.parametrize("output", [{}, {"tv": 0}, {"kl": 1}, {"tv": -1}, {"js": {"mixing": 0.5}}])
    def test_what_says_nothing_is_refused(self, output: dict[str, object]) -> None:
        with pytest.raises(ValidationError):
            LossConfig.model_validate({"output": output})

    def test_what_was_trained_before_these_fields_is_the_same_run(self) -> None:
        plain = StudentConfig.model_validate({"name": "a", "model": {"from": "x"}})
        assert plain.numbers()["losses"] == {"alpha": 0.7, "signal": "auto", "temperature": 2.0}
        other = plain.model_copy(update={"losses": LossConfig.model_validate({"output": {"tv": 1}})})
        assert other.numbers()["losses"]["output"]["tv"] == 1.0
        assert other.digest != plain.digest

    @pytest.mark.parametrize(
        ("part", "output", "message"),
        [
            ("sampled", {"reverse_kl": 1}, "losses.output.reverse_kl on draws .* keep forward_kl alone"),
            ("sampled", {"forward_kl": 1, "tv": 1}, "losses.output.tv on draws"),
            ("topk+sampled", {"tv": 1}, "losses.output.tv on draws"),
            ("topk", {"cosine": 1}, "losses.output.cosine needs .*whole vocabulary.*signal.hidden"),
        ],
    )
    def test_what_the_signal_does_not_determine_is_refused(
        self, part: str, output: dict[str, float], message: str
    ) -> None:
        losses = LossConfig.model_validate({"output": output})
        with pytest.raises(UnsupportedSignal, match=message):
            require_determined(losses, part)
        require_determined(losses, "hidden")
        require_determined(losses.model_copy(update={"alpha": 0.0}), part)

    def test_it_is_said_before_the_teacher_works(self) -> None:
        student = StudentConfig.model_validate(
            {"name": "a", "model": {"from": "x"}, "losses": {"temperature": 1, "output": {"cosine": 1}}}
        )
        require_taught(student, SignalSpec(TopKSpec(8), hidden=HiddenSpec(32, "bfloat16")), where="store")
        with pytest.raises(UnsupportedSignal, match=r"losses\.output\.cosine"):
            require_taught(student, SignalSpec(TopKSpec(8)), where="store")
