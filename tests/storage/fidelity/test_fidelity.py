"""fidelity.py, gradient.py, bound.py: numbers against a dense oracle whose gradients are finite differences."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stillroom.storage.errors import UnsupportedSignal
from stillroom.storage.fidelity.bound import Bound, supports
from stillroom.storage.fidelity.gradient import Point, angle_and_ratio, reference_noise
from stillroom.storage.fidelity.measure import Block, Fidelity, Measured, measure, measure_blocks, noise
from stillroom.storage.records import BETAS, Sampled, Signal, TopK
from tests.strategies import exact_lse, random_logits, topk_of

Float64 = NDArray[np.float64]
VOCABULARY = 40

#: First numbers of the reference noise at position 5 of sequence abab…: they may never change.
PINNED = [-0.20589371264416426, -0.9811128075526605, 0.02490808187073944]


def keys_of(count: int) -> list[tuple[str, int]]:
    return [(f"{row // 3:032x}", row % 3) for row in range(count)]


def truth_of(rows: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> NDArray[np.float32]:
    return random_logits(np.random.default_rng(seed), rows, vocabulary).astype(np.float32)


def rounded(topk: TopK, step: float) -> TopK:
    top = topk.logits[:, :1]
    return TopK(topk.ids, top - np.float32(step) * np.rint((top - topk.logits) / step), topk.tail_lse, topk.counts)


def nucleus_of(truth: NDArray[np.float32], counts: Sequence[int]) -> TopK:
    """Row r keeps its first counts[r], padded as records.TopK says."""
    parts = [topk_of(truth[row : row + 1], count) for row, count in enumerate(counts)]
    ragged = [TopK(p.ids, p.logits, p.tail_lse, np.array([p.ids.shape[1]], np.int32)) for p in parts]
    return TopK.concatenate(ragged)


def draws_of(truth: NDArray[np.float32], draws: int, *, seed: int = 1) -> Sampled:
    rng = np.random.default_rng(seed)
    rows = []
    for row_V in truth.astype(np.float64):
        p = np.exp(row_V - exact_lse(row_V))
        ids, counts = np.unique(rng.choice(len(p), draws, p=p / p.sum()), return_counts=True)
        rows.append(Sampled(ids[None].astype(np.int32), counts[None].astype(np.int32)))
    return Sampled.concatenate(rows)


# ---- the oracle: losses written plainly, gradients by finite differences -------------------------------------------


def softmax(x: Float64) -> Float64:
    return np.asarray(np.exp(x - exact_lse(x)))


def numeric_gradient(loss: Callable[[Float64], float], at: Float64) -> Float64:
    """Central differences of fourth order, good to 1e-9 at V = 40."""
    h = 1e-3
    gradient = np.empty_like(at)
    for i in range(len(at)):
        e = np.zeros_like(at)
        e[i] = h
        gradient[i] = (8 * (loss(at + e) - loss(at - e)) - (loss(at + 2 * e) - loss(at - 2 * e))) / (12 * h)
    return gradient


def full_kd(z: Float64, temperature: float) -> Callable[[Float64], float]:
    p = softmax(z / temperature)
    return lambda s: float(-(p * np.log(softmax(s / temperature))).sum())


def bucket_loss(ids: NDArray[np.int32], p_kept: Float64, p_tail: float, temperature: float) -> Callable[..., float]:
    """−Σ kept p̂ log q − p̂_tail log q_tail."""

    def loss(s: Float64) -> float:
        q = softmax(s / temperature)
        rest = np.delete(q, ids).sum()
        return float(-(p_kept * np.log(q[ids])).sum() - p_tail * np.log(rest))

    return loss


def draws_loss(ids: NDArray[np.int32], counts: NDArray[np.int32]) -> Callable[[Float64], float]:
    return lambda s: float(-(counts / counts.sum() * np.log(softmax(s)[ids])).sum())


def bucket_and_draws_loss(
    buckets: Callable[..., float], kept: NDArray[np.int32], ids: NDArray[np.int32], shares: Float64
) -> Callable[..., float]:
    """The bucket loss, and −Σ drawn share · log of the student's share of the tail."""

    def loss(s: Float64) -> float:
        q = softmax(s)
        return buckets(s) - float((shares * np.log(q[ids] / np.delete(q, kept).sum())).sum())

    return loss


def compared(full: Callable[..., float], other: Callable[..., float], student: Float64) -> tuple[float, float]:
    f, o = numeric_gradient(full, student), numeric_gradient(other, student)
    cosine = f @ o / np.linalg.norm(f) / np.linalg.norm(o)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))), float(np.linalg.norm(o) / np.linalg.norm(f))


def decoded_partition(topk: TopK, row: int, temperature: float) -> tuple[Float64, float]:
    """(p̂ of the kept, p̂ of the tail), at a temperature of the grid, where no spline comes between."""
    kept = int(topk.kept[row])
    grid = int(np.argmin(np.abs(np.array(BETAS) - 1 / temperature)))
    parts = np.append(topk.logits[row, :kept].astype(np.float64) / temperature, topk.tail_lse[row, grid])
    p = softmax(parts)
    return p[:-1], float(p[-1])


def close(got: float | None, expected: float, *, within: float = 1e-6) -> None:
    assert got is not None
    assert got == pytest.approx(expected, rel=within, abs=within)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("ragged", [False, True])
def test_topk_is_what_finite_differences_say(temperature: float, ragged: bool) -> None:
    """Mass, loss, KL over the buckets, angle and ratio of the bucket loss, all in plain float64."""
    truth = truth_of(4)
    topk = rounded(nucleus_of(truth, [1, 7, 3, 12]) if ragged else topk_of(truth, 6), 1.0)
    got = measure(truth, Signal(topk), keys=keys_of(4), vocabulary=VOCABULARY, temperatures=[temperature]).rows
    expected = []
    for row, z in enumerate(truth.astype(np.float64)):
        ids = topk.ids[row, : topk.kept[row]]
        p = softmax(z / temperature)
        p_kept, p_tail = decoded_partition(topk, row, temperature)
        mine = np.append(p[ids], np.delete(p, ids).sum())
        kl = float((mine * np.log(mine / np.append(p_kept, p_tail))).sum())
        student = z + reference_noise(keys_of(4)[row], VOCABULARY)
        angle, ratio = compared(full_kd(z, temperature), bucket_loss(ids, p_kept, p_tail, temperature), student)
        expected.append((p[ids].sum(), -np.log(p[ids].sum()), kl, angle, ratio))
    mass, loss, kl, angle, ratio = np.array(expected).T
    assert len(got) == 1
    assert (got[0].tier, got[0].temperature, got[0].positions) == ("topk", temperature, 4)
    close(got[0].retained_mass, mass.mean())
    close(got[0].truncation_loss_nats, loss.mean())
    close(got[0].kl_added_nats, kl.mean())
    close(got[0].kl_added_worst_nats, kl.max())
    close(got[0].gradient_angle_deg, angle.mean(), within=1e-5)
    close(got[0].gradient_norm_ratio, ratio.mean(), within=1e-5)
    assert kl.mean() > 1e-5, "rounding to whole nats must show, or this tests nothing"


def test_topk_with_draws_is_what_finite_differences_say() -> None:
    truth = truth_of(4, seed=2)
    topk, sampled = topk_of(truth, 5), draws_of(truth, 30)
    rows = measure(truth, Signal(topk, sampled), keys=keys_of(4), vocabulary=VOCABULARY, temperatures=[1.0, 2.0]).rows
    measured = [("topk", 1.0), ("topk", 2.0), ("sampled", 1.0), ("topk+sampled", 1.0)]
    assert [(row.tier, row.temperature) for row in rows] == measured
    expected, count = [], 0
    for row, z in enumerate(truth.astype(np.float64)):
        kept, drawn = topk.ids[row], sampled.counts[row] > 0
        outside = drawn & ~np.isin(sampled.ids[row], kept)
        count += int(outside.sum())
        loss = bucket_and_draws_loss(
            bucket_loss(kept, *decoded_partition(topk, row, 1.0), 1.0), kept, sampled.ids[row, outside],
            sampled.counts[row, outside] / sampled.counts[row].sum(),
        )  # fmt: skip
        expected.append(compared(full_kd(z, 1.0), loss, z + reference_noise(keys_of(4)[row], VOCABULARY)))
    angle, ratio = np.array(expected).mean(axis=0)
    assert count > 4, "draws outside of what is kept must be there, or this tests nothing"
    close(rows[-1].gradient_angle_deg, angle, within=1e-5)
    close(rows[-1].gradient_norm_ratio, ratio, within=1e-5)
    assert rows[-1].kl_added_nats is rows[-1].kl_added_worst_nats is None


def test_sampled_is_what_finite_differences_say() -> None:
    truth = truth_of(4, seed=2)
    sampled = draws_of(truth, 30)
    (got,) = measure(truth, Signal(sampled=sampled), keys=keys_of(4), vocabulary=VOCABULARY).rows
    expected = []
    for row, z in enumerate(truth.astype(np.float64)):
        drawn = sampled.counts[row] > 0
        ids, counts = sampled.ids[row, drawn], sampled.counts[row, drawn]
        student = z + reference_noise(keys_of(4)[row], VOCABULARY)
        mass = softmax(z)[ids].sum()
        expected.append((mass, -np.log(mass), *compared(full_kd(z, 1.0), draws_loss(ids, counts), student)))
    mass, loss, angle, ratio = np.array(expected).mean(axis=0)
    assert (got.tier, got.temperature) == ("sampled", 1.0), "draws say nothing above T = 1"
    close(got.retained_mass, mass)
    close(got.truncation_loss_nats, loss)
    assert got.kl_added_nats is got.kl_added_worst_nats is None
    close(got.gradient_angle_deg, angle, within=1e-5)
    close(got.gradient_norm_ratio, ratio, within=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.7, 8.0])
@pytest.mark.parametrize(("beside", "function"), [(False, True), (True, True), (True, False)])
def test_hidden_is_what_finite_differences_say(temperature: float, beside: bool, function: bool) -> None:
    """Over the whole vocabulary; kept logits stand in place of those that a function rebuilt, an array is as it is."""
    truth = truth_of(3, seed=3)
    rebuilt = truth + np.random.default_rng(4).normal(0, 0.3, truth.shape).astype(np.float32)
    before = rebuilt.copy()
    topk = rounded(topk_of(truth, 5), 1.0) if beside else None
    signal = Signal(topk, hidden=np.zeros((3, 2), np.float32))
    full = (lambda _: rebuilt) if function else rebuilt
    fidelity = measure(
        truth, signal, keys=keys_of(3), vocabulary=VOCABULARY, temperatures=[temperature], full_logits=full
    )
    got = fidelity.row("hidden", temperature)
    assert got is not None
    assert [r.tier for r in fidelity.rows] == (["topk", "hidden"] if beside else ["hidden"])
    expected = []
    for row, z in enumerate(truth.astype(np.float64)):
        z_hat = rebuilt[row].astype(np.float64)
        if topk is not None and function:
            z_hat[topk.ids[row]] = topk.logits[row]
        p, p_hat = softmax(z / temperature), softmax(z_hat / temperature)
        student = z + reference_noise(keys_of(3)[row], VOCABULARY)
        kl = float((p * np.log(p / p_hat)).sum())
        expected.append((kl, *compared(full_kd(z, temperature), full_kd(z_hat, temperature), student)))
    kl, angle, ratio = np.array(expected).T
    assert np.array_equal(rebuilt, before), "the caller's logits are not written to"
    assert (got.retained_mass, got.truncation_loss_nats) == (1.0, 0.0)
    close(got.kl_added_nats, kl.mean())
    close(got.kl_added_worst_nats, kl.max())
    close(got.gradient_angle_deg, angle.mean(), within=1e-5)
    close(got.gradient_norm_ratio, ratio.mean(), within=1e-5)


def test_hidden_states_are_rebuilt_by_a_callable() -> None:
    rng = np.random.default_rng(5)
    hidden = rng.normal(size=(70, 8)).astype(np.float32)  # more rows than are rebuilt at once
    head = rng.normal(size=(VOCABULARY, 8)).astype(np.float32)
    truth = hidden @ head.T
    calls: list[int] = []

    def rebuild(part: NDArray[np.float32]) -> NDArray[np.float32]:
        calls.append(len(part))
        return part @ head.T

    signal = Signal(hidden=hidden + np.float32(0.01))
    called = measure(truth, signal, keys=keys_of(70), vocabulary=VOCABULARY, full_logits=rebuild)
    given_ = measure(
        truth, signal, keys=keys_of(70), vocabulary=VOCABULARY, full_logits=(hidden + np.float32(0.01)) @ head.T
    )
    assert sum(calls) == 70
    assert max(calls) < 70
    for one, other in zip(called.rows, given_.rows, strict=True):
        assert one.gradient_angle_deg == pytest.approx(other.gradient_angle_deg, rel=1e-3)
    assert not measure(truth, signal, keys=keys_of(70), vocabulary=VOCABULARY).rows, "without a head there is no tier"


# ---- properties ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, VOCABULARY - 1),
    step=st.sampled_from([1 / 16, 1 / 2, 2.0]),
    spread=st.sampled_from([1e-3, 1.0, 8.0, 60.0]),
    temperature=st.floats(1, 10),
)
def test_numbers_stay_where_they_belong(seed: int, k: int, step: float, spread: float, temperature: float) -> None:
    truth = (np.random.default_rng(seed).normal(size=(3, VOCABULARY)) * spread).astype(np.float32)
    signal = Signal(rounded(topk_of(truth, k), step), draws_of(truth, 20, seed=seed), np.zeros((3, 1), np.float32))
    fidelity = measure(
        truth, signal, keys=keys_of(3), vocabulary=VOCABULARY, temperatures=[1.0, temperature], full_logits=truth + 1
    )
    for row in fidelity.rows:
        assert 0 <= row.retained_mass <= 1
        assert row.truncation_loss_nats >= 0
        assert 0 <= row.gradient_angle_deg <= 180
        assert row.gradient_norm_ratio >= 0
        if row.kl_added_nats is not None:
            assert row.kl_added_worst_nats is not None
            assert 0 <= row.kl_added_nats <= row.kl_added_worst_nats < np.inf
    json.dumps(fidelity.as_dict(), allow_nan=False)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_a_signal_of_all_ids_but_one_is_full_kd(temperature: float) -> None:
    """k = V − 1, unrounded: the tail bucket is one id. What is left is float32's rounding of the tail."""
    truth = truth_of(5, seed=6)
    (row,) = measure(
        truth,
        Signal(topk_of(truth, VOCABULARY - 1)),
        keys=keys_of(5),
        vocabulary=VOCABULARY,
        temperatures=[temperature],
    ).rows
    assert row.gradient_angle_deg < 1e-4
    assert row.gradient_norm_ratio == pytest.approx(1, abs=1e-6)
    assert row.kl_added_nats is not None
    assert row.kl_added_nats < 1e-12


def test_hidden_states_that_rebuild_the_truth_are_full_kd() -> None:
    truth = truth_of(5, seed=7)
    shifted = truth.astype(np.float64) + 3.0  # a softmax does not see a constant
    for row in measure(
        truth, Signal(hidden=np.zeros((5, 1), np.float32)), keys=keys_of(5), vocabulary=VOCABULARY, full_logits=shifted
    ).rows:
        assert row.gradient_angle_deg < 1e-8
        assert row.gradient_norm_ratio == pytest.approx(1, abs=1e-10)
        assert row.kl_added_nats == pytest.approx(0, abs=1e-13)


def test_an_unrounded_topk_adds_no_kl_however_small_k_is() -> None:
    """The bucket's mass is kept exactly, so the angle is what truncation costs and the KL what rounding does."""
    truth = truth_of(6, seed=8)
    fidelity = measure(
        truth, Signal(topk_of(truth, 2)), keys=keys_of(6), vocabulary=VOCABULARY, temperatures=[1, 2, 5, 10]
    )
    for row in fidelity.rows:
        assert row.kl_added_worst_nats is not None
        assert row.kl_added_worst_nats < 1e-12
        assert row.gradient_angle_deg > 1


@pytest.mark.parametrize("k", [2, 30])
def test_between_the_grids_temperatures_the_spline_adds_next_to_nothing(k: int) -> None:
    """T = 8 lies between β = 0.1 and 0.2, where log(V − K) at β = 0 counts."""
    truth = truth_of(6, seed=8)
    (row,) = measure(truth, Signal(topk_of(truth, k)), keys=keys_of(6), vocabulary=VOCABULARY, temperatures=[8.0]).rows
    assert row.kl_added_worst_nats is not None
    assert row.kl_added_worst_nats < 1e-9


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(7)), st.integers(0, 7))
def test_order_and_blocks_do_not_change_a_bit(order: list[int], cut: int) -> None:
    truth = truth_of(7, seed=9)
    rebuilt = truth + np.float32(0.1) * truth[::-1]
    topk = rounded(topk_of(truth, 4), 1 / 8)
    signal = Signal(topk, draws_of(truth, 20), np.zeros((7, 1), np.float32))
    whole = measure(truth, signal, keys=keys_of(7), vocabulary=VOCABULARY, full_logits=rebuilt)
    parts = [np.array(order[:cut], np.int64), np.array(order[cut:], np.int64)]
    blocks = [Block(truth[part], signal[part], [keys_of(7)[i] for i in part], rebuilt[part]) for part in parts]
    assert measure_blocks(blocks, vocabulary=VOCABULARY) == whole


def test_the_reference_student_is_a_function_of_sequence_and_position() -> None:
    """Pinned: the number in a report must be the same next year."""
    noise_V = reference_noise(("ab" * 16, 5), 50_000)
    assert np.array_equal(noise_V[:10], reference_noise(("ab" * 16, 5), 10))
    assert not np.allclose(noise_V[:10], reference_noise(("ab" * 16, 6), 10))
    assert not np.allclose(noise_V[:10], reference_noise(("ac" * 16, 5), 10))
    assert noise_V.mean() == pytest.approx(0, abs=0.02)
    assert noise_V.std() == pytest.approx(1, abs=0.02)
    assert noise_V[:3] == pytest.approx(PINNED, abs=1e-12)


def test_spread_scales_the_student() -> None:
    """A hidden state's error stays what it is while the student goes away: its angle falls with the spread."""
    truth = truth_of(4, seed=10)
    rebuilt = truth + np.random.default_rng(0).normal(0, 0.05, truth.shape).astype(np.float32)
    signal = Signal(hidden=np.zeros((4, 1), np.float32))
    angles = [
        measure(
            truth, signal, keys=keys_of(4), vocabulary=VOCABULARY, temperatures=[2], full_logits=rebuilt, spread=spread
        )
        .rows[0]
        .gradient_angle_deg
        for spread in (0.25, 1.0)
    ]
    assert angles[0] > 2 * angles[1]


def test_a_teacher_that_is_sure_keeps_its_gradient() -> None:
    """p = 1 − 1e-18: q − p of the likeliest id is lost in rounding, and is half of the norm."""
    z = np.array([60.0, 18.0, 17.0, 0.0])
    noise_V = np.array([0.3, -0.4, 0.8, 0.1])
    point = Point.of(z, noise_V, 1.0)
    assert point.full[0] == pytest.approx(-point.full[1:].sum(), rel=1e-12)
    assert point.full[0] != 0
    exact = point.hidden(z)
    assert exact.angle_deg == pytest.approx(0, abs=1e-9)


def test_gradients_that_vanish() -> None:
    zero, one = np.zeros(3), np.array([1.0, -1.0, 0.0])
    assert angle_and_ratio(zero, zero) == (0.0, 1.0)
    assert angle_and_ratio(one, zero) == (90.0, 0.0)
    angle, ratio = angle_and_ratio(zero, one)
    assert angle == 90.0
    assert np.isnan(ratio)
    assert angle_and_ratio(one, -2 * one) == pytest.approx((180.0, 2.0))


def test_small_angles_have_digits() -> None:
    """1e-9 rad; arccos of the cosine gives 0 there."""
    one, other = np.array([1.0, 0.0]), np.array([1.0, 1e-9])
    assert angle_and_ratio(one, other)[0] == pytest.approx(np.degrees(1e-9), rel=1e-6)


# ---- noise ---------------------------------------------------------------------------------------------------------


def test_noise_band_is_kl_and_angle_of_the_second_scoring() -> None:
    truth = truth_of(5, seed=11)
    again = truth + np.random.default_rng(12).normal(0, 0.1, truth.shape).astype(np.float32)
    parts = [(truth[:2], again[:2], keys_of(5)[:2]), (truth[2:], again[2:], keys_of(5)[2:])]
    band = noise(parts, vocabulary=VOCABULARY, temperatures=[4.0, 1.0])
    assert [row.temperature for row in band.rows] == [1.0, 4.0]
    assert band.positions == 5
    assert band.max_logit_difference == np.abs(truth.astype(np.float64) - again).max()
    for row in band.rows:
        p, p_again = (np.array([softmax(z / row.temperature) for z in x.astype(np.float64)]) for x in (truth, again))
        kl = (p * np.log(p / p_again)).sum(axis=1)
        close(row.kl_nats, kl.mean())
        close(row.kl_worst_nats, kl.max())
        signal = Signal(hidden=np.zeros((5, 1), np.float32))
        (same,) = measure(
            truth, signal, keys=keys_of(5), vocabulary=VOCABULARY, temperatures=[row.temperature], full_logits=again
        ).rows
        assert row.gradient_angle_deg == same.gradient_angle_deg > 0
    json.dumps(band.as_dict(), allow_nan=False)


def test_noise_of_nothing_and_of_equals() -> None:
    truth = truth_of(2)
    still = noise([(truth, truth, keys_of(2))], vocabulary=VOCABULARY)
    assert still.max_logit_difference == 0
    assert all(row.kl_worst_nats < 1e-14 and row.gradient_angle_deg < 1e-12 for row in still.rows)
    assert noise([], vocabulary=VOCABULARY).rows == ()
    with pytest.raises(ValueError, match="second scoring"):
        noise([(truth, truth[:, :5], keys_of(2))], vocabulary=VOCABULARY)


# ---- what cannot be measured ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth_PV": np.zeros((3, 7), np.float32)}, r"truth of shape \(3, 7\), expected \(3, 40\)"),
        ({"truth_PV": np.full((3, VOCABULARY), np.nan, np.float32)}, "row 0 holds NaN"),
        ({"keys": keys_of(2)}, r"expected \(2, 40\)"),
        ({"signal": Signal(topk_of(truth_of(2), 3))}, "2 rows for 3 positions"),
        ({"temperatures": [0.5]}, "0.5 is outside 1 … 10"),
        ({"temperatures": [1.0, 11.0]}, "11 is outside 1 … 10"),
        ({"temperatures": [float("nan")]}, "outside 1 … 10"),
        ({"full_logits": truth_of(3)[:, :5]}, r"rebuilt logits of shape \(3, 5\)"),
        ({"full_logits": lambda hidden: hidden}, "signal has none"),
        ({"signal": Signal(topk_of(truth_of(3, vocabulary=90), 80))}, "the vocabulary ends at 39"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "truth_PV": truth_of(3),
        "signal": Signal(topk_of(truth_of(3), 3)),
        "keys": keys_of(3),
        "vocabulary": VOCABULARY,
    }
    with pytest.raises(ValueError, match=message):
        measure(**(arguments | change))  # type: ignore[arg-type]


# ---- the bound -----------------------------------------------------------------------------------------------------


def row_of(tier: str, temperature: float, angle: float, kl: float | None = 1e-4) -> Measured:
    return Measured(tier, temperature, 256, 0.903, 0.11, kl, kl, angle, 0.99)


STORE = Fidelity(
    (
        row_of("topk", 1.0, 2.95, 2.5e-4),
        row_of("topk", 4.0, 60.3, 1e-6),
        row_of("sampled", 1.0, 32.3, None),
        row_of("hidden", 1.0, 1.5, 4e-4),
        row_of("hidden", 4.0, 2.6, 4e-5),
    )
)


def test_what_is_within_the_bound_passes() -> None:
    supports(STORE, "topk", 1.0, Bound(3.0, 1e-3), where="s")
    supports(STORE, "hidden", 4.0, Bound(3.0), where="s")
    supports(STORE, "sampled", 1.0, Bound(40.0, 1e-9), where="s")  # draws have no KL added
    supports(STORE, "topk", 4.0, Bound(), where="s")
    supports(None, "topk", 4.0, Bound(), where="s")


@pytest.mark.parametrize(
    ("tier", "temperature", "bound", "parts"),
    [
        ("topk", 4.0, Bound(5.0), ["60.3°", "max_gradient_angle_deg = 5", "the hidden tier", "raise the bound"]),
        ("topk", 4.0, Bound(50.0), ["60.3°", "a larger k or the hidden tier (signal.hidden: {dtype: int16}"]),
        ("topk", 4.0, Bound(5.0), ["tier hidden of this store", "T = 1 with topk"]),
        ("topk", 1.0, Bound(None, 1e-4), ["0.00025 nats", "max_kl_added = 0.0001", "a finer gap_step"]),
        ("topk", 4.0, Bound(1.0, 1e-9), ["60.3°", "1e-06", "a finer gap_step and the hidden tier"]),
        ("sampled", 1.0, Bound(5.0), ["32.3°", "tier topk of this store", "more draws"]),
        ("hidden", 4.0, Bound(2.0), ["2.6°", "bfloat16"]),
        ("sampled", 2.0, Bound(), ["T = 1 alone", "T = 2"]),
        ("topk+sampled", 2.0, Bound(), ["T = 1 alone", "T = 2"]),
        ("topk", 3.0, Bound(5.0), ["was not measured", "not interpolated", "topk at T = 4"]),
        ("topk", 1.0, Bound(float("nan")), ["2.95°"]),
    ],
)
def test_what_is_not_within_the_bound_is_refused(tier: str, temperature: float, bound: Bound, parts: list[str]) -> None:
    with pytest.raises(UnsupportedSignal) as caught:
        supports(STORE, tier, temperature, bound, where="/a/store")
    message = str(caught.value)
    assert "\n" not in message
    assert [
        part
        for part in ["/a/store", "" if "sampled" in tier and temperature != 1 else tier, *parts]
        if part not in message
    ] == []


@pytest.mark.parametrize("fidelity", [None, Fidelity(())])
def test_a_store_without_a_sample_says_so(fidelity: Fidelity | None) -> None:
    with pytest.raises(UnsupportedSignal, match=r"/a/store keeps no fidelity sample.*to null to train unchecked"):
        supports(fidelity, "topk", 1.0, Bound(5.0), where="/a/store")
