"""codecs/topk.py where rows keep different numbers of ids: what is cut, where the cut goes, and how it is stored."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.codecs.columns import flat
from stillroom.storage.codecs.tail import STEP, tail_lse_at
from stillroom.storage.codecs.topk import TopKCodec, first_k, nucleus
from stillroom.storage.records import BETAS, NucleusSpec, TopK, TopKSpec
from tests.strategies import columns_of, exact_lse, nucleus_of, ragged_topk_of, random_logits, round_trip, topk_of

EPS = float(np.finfo(np.float32).eps)
#: Temperatures of the tail's grid, where its value is not interpolated.
GRID_TEMPERATURES = [1.0, 2.0, 5.0, 10.0]
MASSES = [1e-6, 0.3, 0.9, 0.98, 1 - 1e-9]


def rounding(block: TopK) -> float:
    """Nats by which float32 may miss at this block's size: the tail comes in and goes out rounded to half an ulp."""
    return 2 * EPS * (float(np.abs(block.tail_lse).max(initial=0)) + 1)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    step=st.sampled_from([None, 1 / 16, 1 / 8, 1 / 2]),
    vocabulary=st.sampled_from([2, 3, 40, 900]),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    spread=st.sampled_from([0.0, 0.01, 2.0, 9.0]),
    offset=st.sampled_from([0.0, -120.0, 2000.0]),
    mass=st.sampled_from(MASSES),
    temperature=st.sampled_from([1.0, 3.0, 10.0]),
)
def test_round_trip(
    seed: int,
    step: float | None,
    vocabulary: int,
    lengths: list[int],
    spread: float,
    offset: float,
    mass: float,
    temperature: float,
) -> None:
    rng, rows = np.random.default_rng(seed), np.array(lengths, np.int64)
    k = int(rng.integers(1, vocabulary))
    z = random_logits(rng, int(rows.sum()), vocabulary, spread=spread, offset=offset)
    block = nucleus_of(z, k, mass, temperature)
    assert block.counts is not None
    back = round_trip(TopKCodec(TopKSpec(k, step, NucleusSpec(mass, temperature)), vocabulary), block, rows)

    assert back.counts is not None
    assert np.array_equal(back.ids, block.ids)
    assert np.array_equal(back.counts, block.counts)
    assert back.logits.dtype == back.tail_lse.dtype == np.float32
    used = np.arange(block.ids.shape[1]) < block.counts[:, None]
    assert (back.logits[~used] == -np.inf).all()
    size = float(np.abs(block.logits[used]).max()) + 1
    error = np.abs(back.logits[used].astype(np.float64) - block.logits[used])
    assert error.max() <= (step or 0.0) / 2 + 3 * EPS * size
    assert np.array_equal(back.logits[:, 0], block.logits[:, 0]), "the top logit is kept exactly"
    assert np.abs(back.tail_lse.astype(np.float64) - block.tail_lse).max() <= STEP / 2 + 3 * EPS * 2 * size
    for t in GRID_TEMPERATURES:
        # V − K of each row is its own: log Z over kept and tail is that of the full logits at every grid point.
        tail = tail_lse_at(back.tail_lse, 1 / t, vocabulary - back.kept).astype(np.float64)
        z_t = np.logaddexp(exact_lse(back.logits, 1 / t), tail)
        assert np.abs(z_t - exact_lse(z, 1 / t)).max() <= ((step or 0.0) / 2 + STEP) / t + STEP + 8 * EPS * size


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.sampled_from([2, 40, 900]),
    spread=st.sampled_from([0.0, 0.01, 2.0, 9.0]),
    mass=st.sampled_from(MASSES),
    temperature=st.sampled_from(GRID_TEMPERATURES),
)
def test_the_fewest_ids_that_hold_the_mass(
    seed: int, vocabulary: int, spread: float, mass: float, temperature: float
) -> None:
    """Against full logits in float64: the ids, the counts, and the tail within float32's rounding."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, vocabulary))
    z = random_logits(rng, 5, vocabulary, spread=spread)
    block = topk_of(z, k)
    got = nucleus(block, mass, temperature, tail_lse_at(block.tail_lse, 1 / temperature, vocabulary - k))
    assert got.counts is not None
    wanted = nucleus_of(z, k, mass, temperature)
    p = -np.sort(-np.exp(z / temperature - exact_lse(z, 1 / temperature)[:, None]), axis=1)
    held = np.cumsum(p, axis=1)
    for r, count in enumerate(got.counts.tolist()):
        # Where the mass is met within 1e-5, the tail's float32 decides; elsewhere the count is the oracle's.
        near = np.abs(held[r] - mass).min() < 1e-5
        assert count == wanted.kept[r] or near
        assert count == k or held[r, count - 1] >= mass - 1e-5
        assert count == 1 or held[r, count - 2] < mass + 1e-5
    exact = ragged_topk_of(z, got.counts)
    assert np.array_equal(got.ids, exact.ids)
    assert np.array_equal(got.logits, exact.logits)
    assert np.abs(got.tail_lse.astype(np.float64) - exact.tail_lse).max() <= rounding(exact)


def test_a_nucleus_between_the_grids_temperatures() -> None:
    """T = 1.3 at a vocabulary's size: interpolating the tail moves the mass held by less than 1e-3."""
    rng = np.random.default_rng(0)
    z = rng.gumbel(0.0, 2.0, (12, 20_000)).astype(np.float32).astype(np.float64)
    block = topk_of(z, 256)
    got = nucleus(block, 0.8, 1.3, tail_lse_at(block.tail_lse, 1 / 1.3, 20_000 - 256))
    assert got.counts is not None
    held = np.cumsum(-np.sort(-np.exp(z / 1.3 - exact_lse(z, 1 / 1.3)[:, None]), axis=1), axis=1)
    inner = (got.counts > 1) & (got.counts < 256)
    assert inner.sum() > 6
    for r in np.flatnonzero(inner):
        assert held[r, got.counts[r] - 1] >= 0.8 - 1e-3
        assert held[r, got.counts[r] - 2] < 0.8 + 1e-3


def test_where_nothing_holds_the_mass_all_are_kept_and_where_one_does_one() -> None:
    z = np.zeros((2, 40))
    z[1, 7] = 30.0
    block = topk_of(z, 6)
    got = nucleus(block, 0.9, 1.0, block.tail_lse[:, -1])
    assert got.counts is not None
    assert got.counts.tolist() == [6, 1]
    assert got.ids[1].tolist() == [7, -1, -1, -1, -1, -1]


def test_the_width_is_that_of_the_widest_row() -> None:
    z = np.zeros((2, 40))
    z[:, 7], z[1, 9] = 30.0, 29.9
    got = nucleus(topk_of(z, 6), 0.9, 1.0, topk_of(z, 6).tail_lse[:, -1])
    assert got.ids.tolist() == [[7, -1], [7, 9]]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.sampled_from([3, 40, 900]),
    spread=st.sampled_from([0.0, 2.0, 9.0]),
    offset=st.sampled_from([0.0, -120.0, 2000.0]),
)
def test_the_first_k_of_a_wider_block(seed: int, vocabulary: int, spread: float, offset: float) -> None:
    """Against what a teacher that kept k would have kept: equal ids and logits, the tail within float32's rounding."""
    rng = np.random.default_rng(seed)
    wide = int(rng.integers(2, vocabulary))
    k = int(rng.integers(1, wide))
    z = random_logits(rng, 4, vocabulary, spread=spread, offset=offset)
    got, wanted = first_k(topk_of(z, wide), k), topk_of(z, k)
    assert got.counts is None
    assert np.array_equal(got.ids, wanted.ids)
    assert np.array_equal(got.logits, wanted.logits)
    assert np.abs(got.tail_lse.astype(np.float64) - wanted.tail_lse).max() <= rounding(wanted)
    for array in (got.ids, got.logits, got.tail_lse):
        assert array.flags.c_contiguous


def test_the_first_k_of_what_came_out_of_a_file() -> None:
    """The tail's rounding of STEP/2 = 2.4e-4 nats is what is added, not more: a log-sum-exp only averages errors."""
    z = np.random.default_rng(3).gumbel(0, 4, (6, 5000)).astype(np.float32).astype(np.float64)
    stored = round_trip(TopKCodec(TopKSpec(64, None), 5000), topk_of(z, 64))
    for k in (1, 8, 63):
        got, wanted = first_k(stored, k), topk_of(z, k)
        assert np.array_equal(got.ids, wanted.ids)
        assert np.abs(got.tail_lse.astype(np.float64) - wanted.tail_lse).max() <= STEP / 2 + 1e-5


def test_the_first_k_of_a_nucleus() -> None:
    z = random_logits(np.random.default_rng(4), 3, 40)
    got = first_k(ragged_topk_of(z, np.array([7, 2, 4], np.int32)), 4)
    wanted = ragged_topk_of(z, np.array([4, 2, 4], np.int32))
    assert got.counts is not None
    assert got.counts.tolist() == [4, 2, 4]
    assert np.array_equal(got.ids, wanted.ids)
    assert np.array_equal(got.logits, wanted.logits)
    assert np.abs(got.tail_lse - wanted.tail_lse).max() <= rounding(wanted)


@pytest.mark.parametrize("k", [4, 5, 1000])
def test_a_block_that_keeps_no_more_is_the_first_k(k: int) -> None:
    block = topk_of(random_logits(np.random.default_rng(4), 3, 40), 4)
    assert first_k(block, k) is block


CODEC = TopKCodec(TopKSpec(6, 1 / 8, NucleusSpec(0.9)), 40)


@pytest.fixture
def block() -> TopK:
    return ragged_topk_of(random_logits(np.random.default_rng(9), 5, 40), np.array([2, 5, 1, 3, 4], np.int32))


def test_columns_hold_what_is_kept_and_nothing_else(block: TopK) -> None:
    """Lists of a sequence's kept ids end to end; the counts tell the positions apart. Two sequences of 3 and 2 rows."""
    columns = columns_of(CODEC, block, np.array([3, 2]))
    assert [f"{field.name} {field.type.value_type}" for field in CODEC.fields()] == [
        "topk_ids int32", "topk_gap int16", "top_logit float", "tail_code int32", "topk_count int32"
    ]  # fmt: skip
    lengths = {name: flat(column)[1].tolist() for name, column in columns.items()}
    assert lengths == {
        "topk_ids": [8, 7], "topk_gap": [8, 7], "top_logit": [3, 2], "tail_code": [30, 20], "topk_count": [3, 2]
    }  # fmt: skip
    assert columns["topk_count"].to_pylist() == [[2, 5, 1], [3, 4]]
    assert block.counts is not None
    assert flat(columns["topk_ids"])[0].tolist() == [
        i for row, n in zip(block.ids.tolist(), block.counts.tolist(), strict=True) for i in row[:n]
    ]
    assert set(CODEC.encodings()) == {f"{name}.list.element" for name in columns}
    assert "topk_count" not in columns_of(TopKCodec(TopKSpec(6), 40), topk_of(np.eye(40)[:2], 6))


def test_unused_slots_never_reach_the_file(block: TopK) -> None:
    assert block.counts is not None
    unused = np.arange(5) >= block.counts[:, None]
    ids, logits = block.ids.copy(), block.logits.copy()
    ids[unused], logits[unused] = 17, np.nan
    wide = replace(block, ids=np.pad(ids, ((0, 0), (0, 1))), logits=np.pad(logits, ((0, 0), (0, 1))))
    for name, column in columns_of(CODEC, wide).items():
        assert column.equals(columns_of(CODEC, block)[name])
    assert round_trip(CODEC, wide).ids.tolist() == block.ids.tolist(), "and the width is the widest row's again"


def test_rows_cut_from_a_wider_block_are_stored_as_they_are(block: TopK) -> None:
    back = round_trip(CODEC, block[2:4])
    assert back.ids.shape == (2, 3)
    assert back.kept.tolist() == [1, 3]


def _changed(array: np.ndarray, at: tuple[int, int], value: float) -> np.ndarray:
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_kept_logit_that_is_not_finite_is_refused_by_row(block: TopK, value: float) -> None:
    with pytest.raises(ValueError, match="row 3 is not"):
        columns_of(CODEC, replace(block, logits=_changed(block.logits, (3, 2), value)))


@pytest.mark.parametrize("identifier", [40, -1, 2**31 - 1])
def test_a_kept_id_outside_the_vocabulary_is_refused_by_row(block: TopK, identifier: int) -> None:
    with pytest.raises(ValueError, match=r"row 4 is not .* below 40"):
        columns_of(CODEC, replace(block, ids=_changed(block.ids, (4, 3), identifier)))


def test_a_repeated_id_is_refused_by_row(block: TopK) -> None:
    with pytest.raises(ValueError, match="row 1 is not"):
        columns_of(CODEC, replace(block, ids=_changed(block.ids, (1, 4), int(block.ids[1, 0]))))


def test_logits_out_of_order_are_refused_by_row(block: TopK) -> None:
    with pytest.raises(ValueError, match=r"row 1 is not .* by falling finite logit"):
        columns_of(CODEC, replace(block, logits=_changed(block.logits, (1, 4), float(block.logits[1, 0]) + 1)))


@pytest.mark.parametrize("count", [0, -1, 6])
def test_counts_that_no_row_can_have_are_refused(block: TopK, count: int) -> None:
    assert block.counts is not None
    counts = block.counts.copy()
    counts[2] = count
    with pytest.raises(ValueError, match=r"counts outside 1 … 5"):
        columns_of(CODEC, replace(block, counts=counts))


def test_more_ids_than_k_are_refused() -> None:
    wide = ragged_topk_of(random_logits(np.random.default_rng(1), 2, 40), np.array([7, 1], np.int32))
    with pytest.raises(ValueError, match=r"ids \(2, 7\) and logits \(2, 7\), expected both \(2, 6\)"):
        columns_of(CODEC, wide)


def test_counts_belong_to_a_nucleus_and_to_nothing_else(block: TopK) -> None:
    with pytest.raises(ValueError, match="only a nucleus has them"):
        columns_of(CODEC, replace(block, counts=None))
    plain = topk_of(random_logits(np.random.default_rng(1), 2, 40), 6)
    with pytest.raises(ValueError, match="only a nucleus has them"):
        columns_of(TopKCodec(TopKSpec(6), 40), replace(plain, counts=np.array([6, 6], np.int32)))


def test_a_gap_beyond_int16_is_refused_by_row(block: TopK) -> None:
    with pytest.raises(ValueError, match=r"row 3: a kept logit lies .*gap_step above"):
        columns_of(CODEC, replace(block, logits=_changed(block.logits, (3, 2), -1e5)))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("topk_count", [[2, 5, 0], [3, 5]], "column topk_count holds 0 … 5, expected 1 … 6"),
        ("topk_count", [[2, 5, 7], [1, 0]], "column topk_count holds 0 … 7, expected 1 … 6"),
        ("topk_count", [[2, 5], [1, 3, 4]], "column topk_count has 2 values for sequence 0, expected 3"),
        ("topk_count", [[2, 5, 2], [3, 3]], "column topk_ids has 8 values for sequence 0, expected 9"),
        ("topk_ids", [[1] * 8, [1] * 6], "column topk_ids has 6 values for sequence 1, expected 7"),
        ("topk_gap", [[1] * 7, [1] * 7], "column topk_gap has 7 values for sequence 0, expected 8"),
        ("top_logit", [[1.0] * 3, [1.0]], "column top_logit has 1 values for sequence 1, expected 2"),
        ("tail_code", [[1] * 30, [1] * 19], "column tail_code has 19 values for sequence 1, expected 20"),
    ],
)
def test_columns_of_other_sizes_are_refused(block: TopK, name: str, values: list[list[float]], message: str) -> None:
    rows = np.array([3, 2])
    columns = columns_of(CODEC, block, rows)
    assert len(CODEC.decode(columns, rows)) == 5
    forged = pa.array(values, columns[name].type)
    with pytest.raises(ValueError, match=message):
        CODEC.decode({**columns, name: forged}, rows)


def test_no_positions_make_no_columns() -> None:
    empty = TopK(
        np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32), np.zeros((0, len(BETAS)), np.float32),
        np.zeros(0, np.int32),
    )  # fmt: skip
    assert len(round_trip(CODEC, empty)) == 0
