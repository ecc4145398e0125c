"""codecs/topk.py: what comes back from the file, and what is never let into it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.codecs.columns import flat
from stillroom.storage.codecs.tail import STEP, tail_lse_at
from stillroom.storage.codecs.topk import TopKCodec
from stillroom.storage.records import BETAS, TopK, TopKSpec
from tests.strategies import columns_of, exact_lse, random_logits, random_topk, round_trip, topk_of

STEPS = [None, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
EPS = float(np.finfo(np.float32).eps)


def probabilities(block: TopK, temperature: float, tail_size: int) -> np.ndarray:
    """float64 [R, K + 1]: the kept ids and the tail as one bucket."""
    tail = tail_lse_at(block.tail_lse, 1 / temperature, tail_size).astype(np.float64)
    logs = np.concatenate([block.logits.astype(np.float64) / temperature, tail[:, None]], axis=1)
    return np.asarray(np.exp(logs - exact_lse(logs)[:, None]))


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    step=st.sampled_from(STEPS),
    vocabulary=st.sampled_from([2, 3, 40, 900]),
    rows=st.integers(1, 6),
    spread=st.sampled_from([0.0, 0.01, 2.0, 9.0]),
    offset=st.sampled_from([0.0, -120.0, 2000.0]),
)
def test_round_trip(seed: int, step: float | None, vocabulary: int, rows: int, spread: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, vocabulary))
    logits = random_logits(rng, rows, vocabulary, spread=spread, offset=offset)
    block = topk_of(logits, k)
    codec = TopKCodec(TopKSpec(k, step), vocabulary)
    back = round_trip(codec, block)

    assert np.array_equal(back.ids, block.ids)
    assert back.logits.dtype == back.tail_lse.dtype == np.float32
    size = float(np.abs(block.logits).max()) + 1
    error = np.abs(back.logits.astype(np.float64) - block.logits)
    assert error.max() <= (step or 0.0) / 2 + 3 * EPS * size
    assert np.array_equal(back.logits[:, 0], block.logits[:, 0]), "the top logit is kept exactly"
    assert (np.diff(back.logits, axis=1) <= 0).all(), "rounding keeps the order"
    # Grid points, where the tail is not interpolated: a tail of two ids far apart bends too sharply for the spline
    # (test_tail.py has its error on tails as a vocabulary has them).
    for temperature in (1, 2, 5, 10):
        p = probabilities(back, temperature, vocabulary - k)
        assert np.abs(p.sum(axis=1) - 1).max() < 1e-9
        assert (p > 0).all(), "no tail is empty or negative"
        exact = exact_lse(logits, 1 / temperature)
        tail = exact_lse(np.sort(logits, axis=1)[:, : vocabulary - k], 1 / temperature)
        # Every log probability moves by at most the rounding of its own logit and that of log Z.
        moved = ((step or 0.0) + STEP) / temperature + STEP + 8 * EPS * size
        assert np.abs(np.log(p[:, -1]) - (tail - exact)).max() <= moved


@pytest.mark.parametrize("step", STEPS)
def test_the_stated_expression_is_the_decoding(step: float | None) -> None:
    """`top_logit - topk_gap * step`, as FORMAT.md tells other readers, to the bit."""
    block = random_topk(np.random.default_rng(0), 5, 6, 50)
    codec = TopKCodec(TopKSpec(6, step), 50)
    columns = columns_of(codec, block)
    codes, top = (flat(columns[name])[0] for name in ("topk_gap", "top_logit"))
    gaps = codes.reshape(5, 6).astype(np.float32) * np.float32(1 if step is None else step)
    assert codes.dtype == (np.float32 if step is None else np.int16)
    assert np.array_equal(top[:, None] - gaps, round_trip(codec, block).logits)


@pytest.mark.parametrize("k", [1, 39])
def test_smallest_and_largest_k(k: int) -> None:
    """k = 1 keeps a row of one; at k = V − 1 the tail is a single id, whose logit it then is at β = 1."""
    logits = random_logits(np.random.default_rng(2), 7, 40)
    codec = TopKCodec(TopKSpec(k, 1 / 8), 40)
    back = round_trip(codec, topk_of(logits, k))
    assert back.ids.shape == (7, k)
    if k == 39:
        assert np.abs(back.tail_lse[:, -1] - logits.min(axis=1)).max() <= STEP / 2 + 1e-5


def test_ids_above_two_to_the_seventeenth() -> None:
    vocabulary = 262_144
    logits = np.random.default_rng(5).normal(size=(2, vocabulary)).astype(np.float32)
    logits[:, 262_143], logits[:, 131_072] = 30.0, 29.0
    codec = TopKCodec(TopKSpec(3, 1 / 8), vocabulary)
    back = round_trip(codec, topk_of(logits, 3))
    assert back.ids[:, :2].tolist() == [[262_143, 131_072]] * 2
    assert back.ids.dtype == np.int32


def test_ties_keep_their_order_and_are_accepted() -> None:
    block = topk_of(np.array([[1.0, 5.0, 5.0, 5.0, 0.0]]), 3)
    codec = TopKCodec(TopKSpec(3, 1 / 8), 5)
    back = round_trip(codec, block)
    assert back.ids.tolist() == [[1, 2, 3]]
    assert back.logits.tolist() == [[5.0, 5.0, 5.0]]


def _with(block: TopK, **changed: np.ndarray) -> TopK:
    fields = {"ids": block.ids.copy(), "logits": block.logits.copy(), "tail_lse": block.tail_lse.copy()}
    return TopK(**(fields | changed))


def _changed(array: np.ndarray, at: tuple[int, int], value: float) -> np.ndarray:
    array = array.copy()
    array[at] = value
    return array


@pytest.fixture
def block() -> TopK:
    return random_topk(np.random.default_rng(9), 5, 4, 40)


CODEC = TopKCodec(TopKSpec(4, 1 / 8), 40)


def test_what_the_contract_allows_is_accepted(block: TopK) -> None:
    """The refusals below are of the change that each makes, not of the block they start from."""
    assert len(flat(columns_of(CODEC, _with(block))["topk_ids"])[0]) == 20


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_logit_that_is_not_finite_is_refused_by_row(block: TopK, value: float, rank: int) -> None:
    with pytest.raises(ValueError, match="row 3 is not 4 distinct ids"):
        columns_of(CODEC, _with(block, logits=_changed(block.logits, (3, rank), value)))


def test_a_whole_row_of_infinities_is_refused_by_row(block: TopK) -> None:
    logits = block.logits.copy()
    logits[2] = -np.inf
    with pytest.raises(ValueError, match="row 2 is not 4 distinct ids"):
        columns_of(CODEC, _with(block, logits=logits))


@pytest.mark.parametrize("identifier", [40, -1, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_refused_by_row(block: TopK, identifier: int) -> None:
    with pytest.raises(ValueError, match="row 4 is not 4 distinct ids below 40"):
        columns_of(CODEC, _with(block, ids=_changed(block.ids, (4, 1), identifier)))


def test_a_repeated_id_is_refused_by_row(block: TopK) -> None:
    with pytest.raises(ValueError, match="row 1 is not 4 distinct ids"):
        columns_of(CODEC, _with(block, ids=_changed(block.ids, (1, 3), int(block.ids[1, 0]))))


def test_logits_out_of_order_are_refused_by_row(block: TopK) -> None:
    logits = block.logits.copy()
    logits[2] = logits[2, ::-1]
    with pytest.raises(ValueError, match=r"row 2 is not .* by falling finite logit"):
        columns_of(CODEC, _with(block, logits=logits))


def test_a_tail_that_is_not_finite_is_refused_by_row(block: TopK) -> None:
    with pytest.raises(ValueError, match="row 2"):
        columns_of(CODEC, _with(block, tail_lse=_changed(block.tail_lse, (2, 5), np.nan)))


def test_a_short_row_is_refused(block: TopK) -> None:
    with pytest.raises(ValueError, match=r"\(5, 3\).*expected both \(5, 4\)"):
        columns_of(CODEC, _with(block, ids=block.ids[:, :3], logits=block.logits[:, :3]))


@pytest.mark.parametrize(
    ("field", "dtype"), [("ids", np.int64), ("ids", np.uint32), ("logits", np.float64), ("logits", np.float16)]
)
def test_another_dtype_is_refused(block: TopK, field: str, dtype: type) -> None:
    with pytest.raises(ValueError, match="expected int32 and float32"):
        columns_of(CODEC, _with(block, **{field: getattr(block, field).astype(dtype)}))


def test_another_number_of_grid_points_is_refused(block: TopK) -> None:
    with pytest.raises(ValueError, match=r"tail_lse \(5, 9\), expected \(5, 10\)"):
        columns_of(CODEC, _with(block, tail_lse=block.tail_lse[:, :9]))


def test_a_gap_beyond_int16_is_refused_by_row_with_a_step_that_holds_it(block: TopK) -> None:
    far = _changed(block.logits, (3, 3), float(block.logits[3, 0]) - 5000)
    with pytest.raises(ValueError, match=r"row 3.*5000 nats.*gap_step above 0\.15"):
        columns_of(CODEC, _with(block, logits=far))
    wide = TopKCodec(TopKSpec(4, 1 / 4), 40)
    assert round_trip(wide, _with(block, logits=far)).logits[3, 3] == pytest.approx(far[3, 3], abs=1 / 8)


def test_a_gap_beyond_float32_is_refused_by_row(block: TopK) -> None:
    """Both ends are finite, their difference is not: it would come back as −inf."""
    logits = block.logits.copy()
    logits[1, 0], logits[1, 3] = 3e38, -3e38
    exact = TopKCodec(TopKSpec(4, None), 40)
    with pytest.raises(ValueError, match="row 1"):
        columns_of(exact, _with(block, logits=logits))


@pytest.mark.parametrize("k", [0, 40, 41])
def test_k_outside_one_to_below_the_vocabulary_is_refused(k: int) -> None:
    """At k = V there is no tail, and its log-partition at β = 0 would be log 0."""
    with pytest.raises(ValueError, match=r"k=.* 1 … 39"):
        TopKCodec(TopKSpec(k, None), 40)


def test_no_positions_make_no_columns() -> None:
    empty = TopK(np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32), np.zeros((0, len(BETAS)), np.float32))
    assert len(round_trip(CODEC, empty)) == 0
