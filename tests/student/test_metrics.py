"""Every measure against a naive float64 one, from whole logits: unused slots, ties, and what is not determined."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.student import metrics as measures
from stillroom.pipeline.student.evaluate import evaluate
from stillroom.pipeline.student.full_logits import TeacherHead
from stillroom.pipeline.student.losses import StudentHead
from stillroom.pipeline.student.metrics import BINS
from stillroom.pipeline.student.teaching import TOPK, Teaching
from stillroom.storage.records import BETAS, Pack, Sampled, Sequence, Signal, TopK
from tests.student.world import World, documents_of, pack_of, score

CPU = torch.device("cpu")
K = 16
KEYS = ("kl", "top1", "top5", "teacher_mass", "student_mass", "perplexity", "ece")


def nucleus(topk: TopK) -> TopK:
    """Each row keeps 1, 2, … of its ids; what it loses goes to its tail."""
    counts = (np.arange(len(topk)) % topk.ids.shape[1] + 1).astype(np.int32)
    lost = np.arange(topk.ids.shape[1]) >= counts[:, None]
    dropped = np.where(lost, topk.logits.astype(np.float64), -np.inf)
    betas = np.array(BETAS)[None, None]
    gone = np.logaddexp.reduce(betas * dropped[..., None], axis=1)
    tail = np.logaddexp(topk.tail_lse.astype(np.float64), gone).astype(np.float32)
    return TopK(
        np.where(lost, -1, topk.ids).astype(np.int32), np.where(lost, -np.inf, topk.logits).astype(np.float32), tail,
        counts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(world: World) -> Any:
    return AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def student(teacher: Any) -> Any:
    """Near enough to the teacher that every measure lies between its ends."""
    model = type(teacher)(teacher.config).eval()
    model.load_state_dict(teacher.state_dict())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def packs(world: World, teacher: Any) -> list[Pack]:
    """One sequence each; the teacher's top-k and final hidden states."""
    found = []
    for index, ids in enumerate(documents_of(AutoTokenizer.from_pretrained(world.teacher), 9)[1:]):
        sequence = Sequence(ids)
        topk = score(teacher, sequence, vocabulary=world.vocabulary, k=K)
        pack = pack_of([sequence], [topk], window=48, index=index)
        with torch.no_grad():
            states = teacher.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
        assert pack.signal is not None
        found.append(replace(pack, signal=Signal(pack.signal.topk, None, states[pack.positions].numpy())))
    return found


def with_signal(packs: list[Pack], change: Any) -> list[Pack]:
    return [replace(pack, signal=change(pack.signal)) for pack in packs]


def measure(model: Any, packs: list[Pack], world: World, **how: Any) -> dict[str, Any]:
    found = evaluate(
        model, packs, packing=True, vocabulary=world.vocabulary, device=CPU, autocast=False, **how
    )  # fmt: skip
    assert found is not None
    return found.as_dict()


def naive(model: Any, teacher: Any, packs: list[Pack], vocabulary: int, *, whole: bool) -> dict[str, float]:
    """In float64, position by position, from the logits of both models. whole: KL over the vocabulary."""
    rows: dict[str, list[float]] = {key: [] for key in ("kl", "top1", "top5", "teacher_mass", "student_mass", "nll")}
    confidence, correct = [], []
    for pack in packs:
        ids = torch.from_numpy(pack.input_ids[pack.segment_ids == 0].astype(np.int64))[None]
        with torch.no_grad():
            z = model(input_ids=ids).logits[0, :, :vocabulary].double().softmax(-1).numpy()
            t = teacher(input_ids=ids).logits[0, :, :vocabulary].double().softmax(-1).numpy()
        assert pack.signal is not None
        assert pack.signal.topk is not None
        for row, position in enumerate(pack.positions):
            p, q, label = t[position], z[position], pack.labels[row]
            kept = [i for i in pack.signal.topk.ids[row] if i >= 0]
            rest = np.setdiff1d(np.arange(vocabulary), kept)
            pb, qb = np.append(p[kept], p[rest].sum()), np.append(q[kept], q[rest].sum())
            if whole:
                pb, qb = p, q
            rows["kl"].append(float((pb * np.log(pb / qb)).sum()))
            order = np.argsort(-q, kind="stable")
            rows["top1"].append(float(order[0] == p.argmax()))
            rows["top5"].append(float(p.argmax() in order[:5]))
            rows["teacher_mass"].append(float(p[kept].sum()))
            rows["student_mass"].append(float(q[kept].sum()))
            rows["nll"].append(float(-np.log(q[label])))
            confidence.append(float(q.max()))
            correct.append(bool(q.argmax() == label))
    means = {key: float(np.mean(values)) for key, values in rows.items()}
    return means | {"perplexity": math.exp(means["nll"]), "ece": naive_ece(confidence, correct)}


def naive_ece(confidence: list[float], correct: list[bool]) -> float:
    """Guo et al. 2017, eq. 3, bin by bin."""
    error, count = 0.0, len(confidence)
    for number in range(BINS):
        low, high = number / BINS, (number + 1) / BINS
        inside = [i for i, c in enumerate(confidence) if low < c <= high]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            error += len(inside) / count * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return error


@pytest.mark.parametrize("tier", ["topk", "nucleus", "hidden"])
def test_all_measures_of_a_pass_are_the_naive_ones(
    tier: str, world: World, teacher: Any, student: Any, packs: list[Pack]
) -> None:
    if tier == "hidden":
        teaching = Teaching("hidden", TeacherHead(teacher.lm_head.weight.detach(), None, 1.0, None))
        given_packs = packs
    else:
        teaching, keep = TOPK, nucleus if tier == "nucleus" else lambda topk: topk
        given_packs = with_signal(packs, lambda signal: Signal(keep(signal.topk)))
    found = measure(student, given_packs, world, teaching=teaching)
    expected = naive(student, teacher, given_packs, world.vocabulary, whole=tier == "hidden")
    for key in KEYS:
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    assert 0 < expected["top1"] < expected["top5"] < 1, "the student should be wrong at times"
    assert found["tokens"] == sum(len(pack.positions) for pack in packs)


def test_the_head_as_a_formula_gives_the_same_in_slices(
    world: World, student: Any, packs: list[Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(student, packs, world)
    monkeypatch.setattr("stillroom.pipeline.student.evaluate.FUSED_ELEMENTS", 3 * world.vocabulary)
    # The weight of another model: that of the one that is measured counts.
    found = measure(student, packs, world, head=StudentHead(torch.zeros(1, 1)))
    assert found == pytest.approx(expected, rel=1e-5)
    assert measure(student, packs, world) == pytest.approx(expected, rel=1e-5)


def test_what_a_store_does_not_determine_is_null(world: World, student: Any, teacher: Any, packs: list[Pack]) -> None:
    def drawn(signal: Signal) -> Signal:
        assert signal.topk is not None
        return Signal(sampled=Sampled(signal.topk.ids[:, :2].copy(), np.full((len(signal), 2), 3, np.int32)))

    nothing = measure(student, [replace(pack, signal=None) for pack in packs], world)
    draws = measure(student, with_signal(packs, drawn), world, teaching=Teaching("sampled"))
    states = measure(
        student, with_signal(packs, lambda signal: Signal(hidden=signal.hidden)), world,
        teaching=Teaching("hidden", TeacherHead(teacher.lm_head.weight.detach(), None, 1.0, None)),
    )  # fmt: skip
    for found in (nothing, draws):
        assert [found[key] for key in KEYS[:5]] == [None] * 5
        assert found["perplexity"] > 1
        assert found["ece"] > 0
    assert states["teacher_mass"] is states["student_mass"] is None
    assert states["kl"] > 0
    assert states["top1"] > 0


def test_a_student_that_says_nan_has_no_measures_and_agrees_with_nobody(
    world: World, teacher: Any, packs: list[Pack]
) -> None:
    broken = type(teacher)(teacher.config).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    found = measure(broken, with_signal(packs, lambda signal: Signal(signal.topk)), world)
    assert found["kl"] is found["perplexity"] is found["ece"] is found["student_mass"] is None
    assert found["top1"] == found["top5"] == 0.0
    assert found["teacher_mass"] > 0


rows_of = st.integers(1, 7)


@given(rows=rows_of, vocabulary=st.integers(1, 12), levels=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_rank_is_the_place_in_a_stable_sort(rows: int, vocabulary: int, levels: int, seed: int) -> None:
    """Few levels: ties everywhere."""
    random = np.random.default_rng(seed)
    z = random.integers(0, levels, (rows, vocabulary)).astype(np.float32)
    ids = random.integers(0, vocabulary, rows)
    order = np.argsort(-z, axis=1, kind="stable")
    expected = [int(np.flatnonzero(order[n] == ids[n])[0]) for n in range(rows)]
    assert measures.rank_of(torch.from_numpy(z), torch.from_numpy(ids)).tolist() == expected


@given(
    rows=rows_of, kept=st.integers(1, 6), extra=st.integers(0, 5), scale=st.floats(0, 60), seed=st.integers(0, 2**31)
)
def test_masses_are_sums_of_probabilities(rows: int, kept: int, extra: int, scale: float, seed: int) -> None:
    """extra 0: all ids are kept, and the mass is one. Rows keep 1 … kept ids."""
    random = np.random.default_rng(seed)
    vocabulary = kept + extra
    t, z = (scale * random.standard_normal((rows, vocabulary)) for _ in range(2))
    ids = np.argsort(-t, axis=1)[:, :kept]
    counts = random.integers(1, kept + 1, rows) if extra else np.full(rows, kept)
    unused = np.arange(kept) >= counts[:, None]
    logits = np.where(unused, -np.inf, np.take_along_axis(t, ids, 1))
    gone = t.copy()
    for n in range(rows):
        gone[n, ids[n, : counts[n]]] = -np.inf
    tail = np.logaddexp.reduce(gone, axis=1)
    ids = np.where(unused, -1, ids)

    def share(x: Any, n: int) -> float:
        p = np.exp(x[n] - np.logaddexp.reduce(x[n]))
        return float(p[ids[n][ids[n] >= 0]].sum())

    found_p = measures.teacher_mass(torch.from_numpy(logits).float(), torch.from_numpy(tail).float())
    log_q = torch.from_numpy(z).float().log_softmax(-1)
    found_q = measures.student_mass(log_q, torch.from_numpy(ids))
    assert found_p.tolist() == pytest.approx([share(t, n) for n in range(rows)], rel=1e-4, abs=1e-5)
    assert found_q.tolist() == pytest.approx([share(z, n) for n in range(rows)], rel=1e-4, abs=1e-5)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60), st.integers(0, 60))
def test_calibration_is_that_of_guo_and_adds_up_over_slices(rows: list[tuple[float, bool]], cut: int) -> None:
    confidence = np.array([c for c, _ in rows], np.float32)
    correct = np.array([c for _, c in rows])
    parts = [(confidence[:cut], correct[:cut]), (confidence[cut:], correct[cut:])]
    bins = sum((measures.calibration_bins(*part) for part in parts), np.zeros((BINS, 3)))
    shown = [max(float(c), 1e-9) for c in confidence]  # a confidence of zero lies in the first bin
    assert measures.calibration_error(bins) == pytest.approx(naive_ece(shown, correct.tolist()), abs=1e-6)


def test_measures_of_nothing_are_null() -> None:
    assert measures.calibration_error(np.zeros((BINS, 3))) is None
    assert measures.mean(0.0, 0) is None
    assert measures.mean(math.inf, 3) is None
    assert measures.perplexity(0.0, 0) is None
    assert measures.perplexity(1e6, 1) is None
    assert measures.perplexity(math.log(3) * 4, 4) == pytest.approx(3)


def test_an_impossible_id_adds_nothing_to_the_kl() -> None:
    log_p = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    log_q = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert measures.full_kl(log_p, log_q).item() == pytest.approx(math.log(2))
