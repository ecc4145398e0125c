"""codecs/tail.py: the spline's weights, the integer codes, and the log-partition rebuilt from both."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.codecs.tail import (
    GRID,
    STEP,
    decode_tail,
    encode_tail,
    interpolation_weights,
    tail_lse_at,
)
from stillroom.storage.codecs.topk import TopKCodec
from stillroom.storage.records import BETAS, TopK, TopKSpec
from tests.strategies import exact_lse, round_trip, topk_of

TEMPERATURES = np.unique(np.concatenate([np.linspace(1, 10, 91), 1 / np.array(BETAS)]))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_weights_sum_to_one(temperature: float) -> None:
    """A constant is interpolated exactly, so adding c to every logit adds β·c to nothing but the linear part."""
    assert interpolation_weights(1 / temperature).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("number", range(1, len(GRID)))
def test_weights_are_a_unit_vector_at_grid_points(number: int) -> None:
    expected = np.eye(len(GRID))[number]
    assert np.array_equal(interpolation_weights(BETAS[number - 1]), expected)
    # 1/T in floating point may miss the grid point by a few ulp; the value must not.
    assert np.array_equal(interpolation_weights(1 / (1 / BETAS[number - 1])), expected)


@given(
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    st.floats(0.1, 1.0),
)
def test_spline_is_exact_for_cubics(coefficients: list[float], beta: float) -> None:
    """A not-a-knot spline reproduces cubics everywhere, also in the first and last interval; a natural one does not."""
    cubic = np.polynomial.Polynomial(coefficients)
    assert interpolation_weights(beta) @ cubic(GRID) == pytest.approx(cubic(beta), abs=1e-10)


def test_spline_is_smooth_across_knots() -> None:
    """Values of a wild function meet from both sides of every inner knot, and so do slopes."""
    values = np.random.default_rng(1).normal(size=len(GRID))
    h = 1e-5

    def at(beta: float) -> float:
        return float(interpolation_weights(beta) @ values)

    for knot in BETAS[1:-1]:
        left, right = (at(knot) - at(knot - h)) / h, (at(knot + h) - at(knot)) / h
        assert left == pytest.approx(right, abs=0.1)
        assert at(knot - h) == pytest.approx(at(knot + h), abs=1e-2)


@pytest.mark.parametrize("beta", [0.0, 0.0999, 1.001, 2.0, -0.5, float("nan"), float("inf")])
def test_temperatures_outside_one_to_ten_are_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"outside 1 … 10"):
        interpolation_weights(beta)


def test_weights_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        interpolation_weights(0.35)[0] = 3.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.sampled_from([2, 3, 17, 300, 5000]),
    rows=st.integers(1, 5),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 8.0, 60.0]),
    offset=st.sampled_from([0.0, -300.0, 40.0, 1e4]),
)
def test_codes_round_trip_within_half_a_step(
    seed: int, vocabulary: int, rows: int, spread: float, offset: float
) -> None:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, vocabulary))
    block = topk_of((rng.normal(size=(rows, vocabulary)) * spread + offset).astype(np.float32), k)
    top = block.logits[:, 0]
    back = decode_tail(encode_tail(block.tail_lse, top, vocabulary - k), top, vocabulary - k)
    # Half a step, and the rounding of float32 at this size: two operations.
    size = np.abs(block.tail_lse).max() + np.abs(top).max()
    assert back.dtype == np.float32
    assert np.abs(back.astype(np.float64) - block.tail_lse).max() <= STEP / 2 + 3 * np.finfo(np.float32).eps * size


def test_codes_round_trip_at_a_vocabulary_of_200_000() -> None:
    rng = np.random.default_rng(3)
    block = topk_of(rng.gumbel(0, 4, (3, 200_000)).astype(np.float32), 64)
    top = block.logits[:, 0]
    back = decode_tail(encode_tail(block.tail_lse, top, 200_000 - 64), top, 200_000 - 64)
    assert np.abs(back - block.tail_lse).max() <= STEP / 2 + 1e-5


def test_codes_are_small_and_hold_second_differences() -> None:
    """Written out for one row: c_0 is known, the first code is a first difference, the rest second differences."""
    curve = np.array([[2.0 + 0.5 * beta + beta**2 for beta in BETAS]], dtype=np.float32)
    codes = encode_tail(curve, np.zeros(1, np.float32), tail_size=8)
    points = np.rint(np.array([np.log(8), *curve[0].astype(np.float64)]) / STEP)
    assert codes[0, 0] == points[1] - points[0]
    assert np.array_equal(codes[0, 1:], np.diff(points, n=2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tail_that_is_not_finite_is_refused_by_row(bad: float) -> None:
    tail = np.ones((4, len(BETAS)), dtype=np.float32)
    tail[2, 3] = bad
    with pytest.raises(ValueError, match="not finite at row 2"):
        encode_tail(tail, np.zeros(4, np.float32), 10)


def test_a_tail_beyond_the_codes_is_refused_by_row() -> None:
    """A tail of one banned token (float32's lowest number) has no int32 code; nothing may wrap around."""
    tail = np.ones((3, len(BETAS)), dtype=np.float32)
    tail[1] = np.finfo(np.float32).min * np.array(BETAS, dtype=np.float32)
    with pytest.raises(ValueError, match="row 1"):
        encode_tail(tail, np.zeros(3, np.float32), 1)


def _zipf_logits(rng: np.random.Generator, rows: int, vocabulary: int) -> np.ndarray:
    """Logits that fall with the logarithm of the rank, as a trained model's do, steep and flat ones."""
    slope = rng.uniform(0.8, 2.5, (rows, 1))
    ranks = np.log(np.arange(1, vocabulary + 1) + rng.uniform(0, 3, (rows, 1)))
    logits = rng.uniform(-10, 30, (rows, 1)) - slope * ranks + rng.normal(0, 0.7, (rows, vocabulary))
    return rng.permuted(logits, axis=1).astype(np.float32)


def _rebuilt_lse(block: TopK, beta: float, tail_size: int) -> np.ndarray:
    tail = tail_lse_at(block.tail_lse, beta, tail_size).astype(np.float64)
    return np.logaddexp(exact_lse(block.logits, beta), tail)


@pytest.mark.parametrize("k", [1, 16, 64])
def test_full_log_partition_is_rebuilt_within_a_thousandth(k: int) -> None:
    """Kept logits and tail as they come out of the file give log Z(T) over all of T in 1 … 10.

    Gaps are kept float32 here: rounding them moves log Z by what it moves the distribution, which
    test_topk.py bounds.
    """
    vocabulary = 20_000
    logits = _zipf_logits(np.random.default_rng(7), 12, vocabulary)
    codec = TopKCodec(TopKSpec(k, None), vocabulary)
    stored = round_trip(codec, topk_of(logits, k))
    worst = max(
        float(np.abs(_rebuilt_lse(stored, 1 / t, vocabulary - k) - exact_lse(logits, 1 / t)).max())
        for t in TEMPERATURES
    )
    assert worst < 1e-3


def test_the_spline_is_needed() -> None:
    """Straight lines between grid points miss by more than the spline may: the test above can fail."""
    vocabulary, k = 20_000, 16
    logits = _zipf_logits(np.random.default_rng(7), 12, vocabulary)
    block = topk_of(logits, k)
    tail = np.array([np.interp(0.15, GRID, [np.log(vocabulary - k), *row]) for row in block.tail_lse])
    rebuilt = np.logaddexp(exact_lse(block.logits, 0.15), tail)
    assert np.abs(rebuilt - exact_lse(logits, 0.15)).max() > 1e-3
