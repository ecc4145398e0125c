"""Each feature loss against a dense float64 oracle, value and gradient; gradcheck; shapes, masks and corners."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stillroom.pipeline.student.features.attention import attention_loss
from stillroom.pipeline.student.features.hidden import projections, state_loss
from stillroom.pipeline.student.features.relations import relation_loss
from stillroom.pipeline.student.features.targets import Wanted, feature_targets
from stillroom.storage.attention import Attention
from stillroom.storage.records import Pack, Sequence, Signal
from stillroom.storage.shard import StoredSequence
from stillroom.storage.stream import assemble

HEADS = 3


def packs_of(
    rng: np.random.Generator, rows: list[list[int]], *, window: int, keep: float = 0.7, heads: int = HEADS
) -> list[Pack]:
    """Packs of sequences of these lengths with random layers and maps; each token trains with chance `keep`."""
    packs = []
    for lengths in rows:
        found, masks = [], []
        for length in lengths:
            logits = np.where(np.tri(length, dtype=bool), rng.normal(size=(2, heads, length, length)) * 3, -np.inf)
            maps = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            signal = Signal(
                hidden=rng.normal(size=(length, 5)).astype(np.float32),
                layers=rng.normal(size=(length, 2, 5)).astype(np.float32),
                attention=Attention.of(maps.astype(np.float32), 0),
            )
            found.append(StoredSequence(Sequence(rng.integers(0, 9, length).astype(np.int32)), signal))
            masks.append(rng.random(length) < keep)
        weights = rng.uniform(0.5, 2, len(lengths)).astype(np.float32)
        names = tuple(f"s{i}" for i in range(len(lengths)))
        packs.append(assemble(found, masks, weights, names, window=window, epoch=0, index=0))
    return packs


def oracle_attention(maps_BHTT: NDArray[np.float64], packs: list[Pack], layer: int, *, mean: bool) -> float:
    """Σ_m w_m Σ_h Σ_j a log(a / s), sequence by sequence, with loops."""
    total = 0.0
    for row, pack in enumerate(packs):
        assert pack.signal is not None
        assert pack.signal.attention is not None
        for m, at in enumerate(pack.positions):
            one = pack.signal.attention[m : m + 1]
            width = int(one.widths[0])
            teacher_HW = one.values[layer].reshape(one.heads, width).astype(np.float64)
            student_HW = maps_BHTT[row, :, at, at + 1 - width : at + 1]
            if mean:
                teacher_HW, student_HW = teacher_HW.mean(0, keepdims=True), student_HW.mean(0, keepdims=True)
            teacher_HW = teacher_HW / teacher_HW.sum(-1, keepdims=True)
            total += float(pack.weights[m]) * float((teacher_HW * np.log(teacher_HW / student_HW)).sum())
    return total


@given(
    rows=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3),
    seed=st.integers(0, 99), mean=st.booleans(), other_heads=st.booleans(),
)  # fmt: skip
def test_attention_is_the_kl_of_each_row(rows: list[list[int]], seed: int, mean: bool, other_heads: bool) -> None:
    rng = np.random.default_rng(seed)
    width = max(map(sum, rows))
    packs = [pack for pack in packs_of(rng, rows, window=width) if len(pack.positions)]
    if not packs:
        return
    targets = feature_targets(packs, Wanted(maps="mean" if mean else "per_head"), width=width)
    assert targets.maps is not None
    heads = 5 if mean and other_heads else HEADS
    logits = rng.normal(size=(len(packs), heads, width, width)) * 2
    maps = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights_M = torch.from_numpy(np.concatenate([pack.weights for pack in packs]))
    student = torch.from_numpy(maps).requires_grad_()
    loss = attention_loss(student, targets.maps, 1, weights_M=weights_M)
    assert loss.item() == pytest.approx(oracle_attention(maps, packs, 1, mean=mean), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    seen = torch.zeros_like(student, dtype=torch.bool)
    for row, pack in enumerate(packs):
        for at in pack.positions:
            seen[row, :, at, at - int(pack.position_ids[at]) : at + 1] = True
    assert not gradient[~seen].any(), "no look across a border, ahead, or at a position that does not train"


def test_attention_gradients() -> None:
    packs = packs_of(np.random.default_rng(0), [[3, 2], [4]], window=5)
    weights_M = torch.from_numpy(np.concatenate([pack.weights for pack in packs]))
    scores = torch.randn(2, HEADS, 5, 5, dtype=torch.float64, requires_grad=True)
    for maps in ("per_head", "mean"):
        found = feature_targets(packs, Wanted(maps=maps), width=5).maps
        assert found is not None

        def loss(z: torch.Tensor, found=found) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return attention_loss(z.softmax(-1), found, 0, weights_M=weights_M)

        assert torch.autograd.gradcheck(loss, (scores,))


def test_attention_is_zero_with_the_teacher_and_finite_where_weights_vanish() -> None:
    packs = packs_of(np.random.default_rng(1), [[6]], window=6, keep=1.0)
    pack = packs[0]
    assert pack.signal is not None
    assert pack.signal.attention is not None
    targets = feature_targets(packs, Wanted(maps="per_head"), width=6).maps
    assert targets is not None
    weights_M = torch.ones(len(pack.positions))
    own = torch.zeros(1, HEADS, 6, 6)
    own[0, :, :5, :5] = torch.from_numpy(pack.signal.attention.dense()[1])
    assert float(attention_loss(own, targets, 1, weights_M=weights_M)) == pytest.approx(0, abs=1e-5)
    scores = torch.zeros(1, HEADS, 6, 6)
    scores[..., 0] = 1e4  # all else underflows to 0
    scores.requires_grad_()
    loss = attention_loss(scores.softmax(-1), targets, 1, weights_M=weights_M)
    loss.backward()
    assert torch.isfinite(loss)
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


@given(
    m=st.integers(1, 7), width=st.integers(1, 6), seed=st.integers(0, 99), loss=st.sampled_from(["mse", "cosine"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_states_against_the_formula(m: int, width: int, seed: int, loss: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(m, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    teacher = torch.randn(m, width, generator=generator)
    weights = torch.rand(m, generator=generator)
    s, t, w = (x.detach().double().numpy() for x in (student, teacher, weights))
    if loss == "mse":
        expected = float((w * ((s - t) ** 2).mean(1)).sum())
        gradient = 2 * w[:, None] * (s - t) / width
    else:
        norms = np.linalg.norm(s, axis=1, keepdims=True), np.linalg.norm(t, axis=1, keepdims=True)
        cosine = (s * t).sum(1, keepdims=True) / norms[0] / norms[1]
        expected = float((w * (1 - cosine[:, 0])).sum())
        gradient = -w[:, None] * (t / norms[1] - cosine * s / norms[0]) / norms[0]
    found = state_loss(student, teacher, loss=loss, weights_M=weights)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    (own,) = torch.autograd.grad(found, student)
    off = 0.02 if dtype == torch.bfloat16 else 1e-4
    np.testing.assert_allclose(own.double().numpy(), gradient, rtol=off, atol=off)


def oracle_relations(s: NDArray[np.float64], t: NDArray[np.float64], runs: list[int], w: NDArray[np.float64]) -> float:
    total, start = 0.0, 0
    for run in runs:
        for i in range(start, start + run):
            for j in range(start, start + run):
                cosines = [
                    float(x[i] @ x[j]) / (float(np.linalg.norm(x[i])) * float(np.linalg.norm(x[j]))) for x in (s, t)
                ]
                total += float(w[i]) * (cosines[0] - cosines[1]) ** 2 / run
        start += run
    return total


@given(runs=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_relations_against_loops_over_pairs(runs: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    student, teacher, weights = rng.normal(size=(sum(runs), 4)), rng.normal(size=(sum(runs), 6)), rng.random(sum(runs))
    found = relation_loss(
        torch.from_numpy(student), torch.from_numpy(teacher), runs=runs, weights_M=torch.from_numpy(weights)
    )
    assert float(found) == pytest.approx(oracle_relations(student, teacher, runs, weights), rel=1e-9, abs=1e-12)


def test_gradcheck_of_states_and_relations() -> None:
    torch.manual_seed(0)
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    teacher, weights = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    for loss in ("mse", "cosine"):
        assert torch.autograd.gradcheck(
            lambda s, loss=loss: state_loss(s, teacher, loss=loss, weights_M=weights), (student,)
        )
    assert torch.autograd.gradcheck(lambda s: relation_loss(s, teacher, runs=[2, 1, 3], weights_M=weights), (student,))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e18])
def test_states_of_any_size_give_finite_gradients(size: float) -> None:
    """Squares of 1e18 still fit into float32."""
    student = (torch.randn(4, 3) * size).requires_grad_()
    teacher, weights = torch.zeros(4, 3), torch.ones(4)
    total = state_loss(student, teacher, loss="cosine", weights_M=weights)
    total = total + relation_loss(student, teacher, runs=[4], weights_M=weights)
    total.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(total)


def test_equal_states_cost_nothing_and_scale_is_no_relation() -> None:
    states, weights = torch.randn(5, 4), torch.ones(5)
    assert float(state_loss(states, states, loss="mse", weights_M=weights)) == 0
    assert float(state_loss(3 * states, states, loss="cosine", weights_M=weights)) == pytest.approx(0, abs=1e-5)
    assert float(relation_loss(3 * states, states, runs=[5], weights_M=weights)) == pytest.approx(0, abs=1e-10)


def test_runs_are_the_trained_positions_of_each_sequence() -> None:
    packs = packs_of(np.random.default_rng(3), [[4, 1, 3], [5]], window=8, keep=1.0)
    targets = feature_targets(packs, Wanted(layers=True, final=True), width=8)
    assert targets.runs == (3, 2, 4), "the last token of each predicts nothing, and one token alone neither"
    assert targets.layers is not None
    assert targets.final is not None
    assert targets.layers.shape == (9, 2, 5)
    assert targets.final.shape == (9, 5)
    assert targets.maps is None


def test_matrices_follow_from_the_seed_and_leave_the_generators_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (
        projections(["b", "a"], student=4, teacher=6, seed=seed, device=torch.device("cpu")) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for key in ("a", "b"):
        assert one[key].weight.shape == (6, 4)
        assert torch.equal(one[key].weight, same[key].weight)  # type: ignore[arg-type]
        assert not torch.equal(one[key].weight, other[key].weight)  # type: ignore[arg-type]
    assert not torch.equal(one["a"].weight, one["b"].weight)  # type: ignore[arg-type]
