"""codecs/attention.py: maps come back within their bound, with no lengths stored, and nothing else is let in."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.attention import Attention
from stillroom.storage.codecs.attention import AttentionCodec
from stillroom.storage.records import AttentionSpec
from tests.strategies import attention_of, columns_of, round_trip

DTYPES = ("uint8", "float32")


def codec_of(layers: int, heads: int, dtype: Any = "uint8", max_tokens: int = 64) -> AttentionCodec:
    which = tuple(range(1, 2 * layers, 2))
    if heads == 1:
        return AttentionCodec(AttentionSpec(which, max_tokens, dtype=dtype))
    return AttentionCodec(AttentionSpec(which, max_tokens, "per_head", heads, dtype))


def sequences_of(seed: int, layers: int, heads: int, shapes: list[tuple[int, int]]) -> Attention:
    """Maps of several sequences. shapes: (rows, first_position) of each."""
    rng = np.random.default_rng(seed)
    return Attention.concatenate([attention_of(rng, layers, heads, rows, first) for rows, first in shapes])


SHAPES = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=4)
CASES = (st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4), SHAPES)


@settings(deadline=None)
@given(*CASES)
def test_uint8_is_within_its_bound(seed: int, layers: int, heads: int, shapes: list[tuple[int, int]]) -> None:
    block, codec = sequences_of(seed, layers, heads, shapes), codec_of(layers, heads)
    rows = np.array([r for r, _ in shapes], np.int64)
    back = round_trip(codec, block, rows)
    assert back.widths.tolist() == block.widths.tolist()
    per_row = np.repeat(block.widths, heads)
    starts = np.cumsum(per_row) - per_row
    for stored, exact in zip(back.values.astype(np.float64), block.values.astype(np.float64), strict=True):
        scale = np.repeat(np.maximum.reduceat(exact, starts), per_row) * (1 + 2.0**-7)
        assert (np.abs(stored - exact) <= np.sqrt(exact * scale) / 255 + scale / 260_100 + 1e-6).all()
        assert (np.abs(stored - exact) <= scale / 254 + 1e-6).all()
        sums = np.add.reduceat(stored, starts)
        assert (np.abs(sums - 1) < 0.03).all()


@settings(deadline=None)
@given(*CASES)
def test_float32_is_exact(seed: int, layers: int, heads: int, shapes: list[tuple[int, int]]) -> None:
    block, rows = sequences_of(seed, layers, heads, shapes), np.array([r for r, _ in shapes], np.int64)
    back = round_trip(codec_of(layers, heads, "float32"), block, rows)
    np.testing.assert_array_equal(back.values, block.values)
    assert back.widths.tolist() == block.widths.tolist()


def test_small_weights_are_kept_far_closer_than_the_scale() -> None:
    """A head that looks at the first token with 0.9 and at 500 others with the rest: in equal steps all would be 0."""
    weights = np.full((1, 1, 1, 501), 0.1 / 500, np.float32)
    weights[..., 0] = 0.9
    back = round_trip(codec_of(1, 1, max_tokens=501), Attention.of(weights, 500)).values[0]
    assert abs(float(back[1]) / (0.1 / 500) - 1) < 0.15
    assert abs(float(back.sum()) - 1) < 0.02


def test_a_row_of_zeros_and_one_of_a_single_token() -> None:
    block = Attention(np.array([[1.0, 0.0, 0.0]], np.float32), np.array([1, 2]), 1)
    np.testing.assert_array_equal(round_trip(codec_of(1, 1), block).values, block.values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_hold_one_expression_for_any_reader(dtype: str) -> None:
    """Position t of a sequence kept from position 3 on has heads · (t + 1) numbers, head by head."""
    codec, block = codec_of(2, 2, dtype), sequences_of(4, 2, 2, [(4, 3), (2, 0)])
    columns = columns_of(codec, block, np.array([4, 2]))
    wanted = block[1:2].dense()[1, 1, 0]  # t = 4, of layer 3, head 1
    numbers = columns["attention_3"].to_pylist()[0]
    assert [len(part) for part in columns["attention_3"].to_pylist()] == [2 * (4 + 5 + 6 + 7), 2 * (1 + 2)]
    start = 2 * 4 + 5
    found = np.array(numbers[start : start + 5], np.float64)
    if dtype == "uint8":
        scale = columns["attention_3_scale"].to_pylist()[0][3]
        found = scale * (found / 255) ** 2
        assert columns["attention_3"].type.value_type == pa.int16()
    np.testing.assert_allclose(found, wanted, atol=1 / 254)
    np.testing.assert_allclose(found, round_trip(codec, block, np.array([4, 2]))[1:2].dense()[1, 1, 0], rtol=1e-6)


def damaged(columns: dict[str, Any], name: str, change: Any) -> dict[str, Any]:
    column = columns[name].to_pylist()
    change(column)
    return columns | {name: pa.array(column, columns[name].type)}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "attention_1",
            lambda c: c[0].pop(),
            "column attention_1 has 27 values for sequence 0, which are no maps of 4",
        ),
        (
            "attention_1",
            lambda c: c.__setitem__(0, c[0] + [0] * 8),
            "column attention_3 has 28 values for sequence 0, expected 36",
        ),
        ("attention_3", lambda c: c[1].pop(), "column attention_3 has 5 values for sequence 1, expected 6"),
        ("attention_3_scale", lambda c: c[1].pop(), "column attention_3_scale has 3 values for sequence 1, expected 4"),
        (
            "attention_3_scale",
            lambda c: c[1].__setitem__(0, -1.0),
            "column attention_3_scale, row 8: expected a weight",
        ),
        ("attention_3_scale", lambda c: c[1].__setitem__(0, float("nan")), "expected a weight"),
        ("attention_3", lambda c: c[1].__setitem__(0, 256), "column attention_3 holds 0 … 256, expected 0 … 255"),
        ("attention_3", lambda c: c[1].__setitem__(0, -1), "column attention_3 holds -1 … 255, expected 0 … 255"),
    ],
)
def test_columns_that_were_damaged_are_refused(name: str, change: Any, message: str) -> None:
    codec, rows = codec_of(2, 2), np.array([4, 2], np.int64)
    columns = columns_of(codec, sequences_of(4, 2, 2, [(4, 1), (2, 0)]), rows)
    with pytest.raises(ValueError, match=message):
        codec.decode(damaged(columns, name, change), rows)


def test_maps_beyond_the_cap_are_refused_both_ways() -> None:
    block = sequences_of(0, 1, 1, [(4, 9)])
    with pytest.raises(ValueError, match="row 3 looks at 13 positions, expected at most 12"):
        columns_of(codec_of(1, 1, max_tokens=12), block)
    columns = columns_of(codec_of(1, 1, max_tokens=13), block)
    with pytest.raises(ValueError, match="no maps of 4 positions in at most 12 tokens"):
        codec_of(1, 1, max_tokens=12).decode(columns, np.array([4]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.5])
def test_what_is_no_weight_is_not_let_in(bad: float) -> None:
    block = sequences_of(0, 2, 2, [(4, 0)])
    block.values[1, 2 * (1 + 2) + 4] = bad
    with pytest.raises(ValueError, match="column attention_3, row 2: a weight of"):
        columns_of(codec_of(2, 2), block)


def test_rows_that_are_not_consecutive_are_refused() -> None:
    """Lengths are not stored: they would be read as other positions."""
    block = sequences_of(0, 1, 1, [(4, 2)])
    for rows in (np.array([0, 2, 3]), np.array([2, 1, 3])):
        with pytest.raises(ValueError, match="does not follow the position before it"):
            columns_of(codec_of(1, 1), block[rows])
    assert len(columns_of(codec_of(1, 1), block[np.array([1, 2, 0, 1])], np.array([2, 2]))) == 2


def test_other_layers_or_heads_are_refused() -> None:
    block = sequences_of(0, 2, 2, [(4, 2)])
    for codec in (codec_of(1, 2), codec_of(2, 3), codec_of(2, 1)):
        with pytest.raises(ValueError, match="maps of 2 layers, 2 heads, float32; expected"):
            columns_of(codec, block)


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec((), 8),
        AttentionSpec((2, 1), 8),
        AttentionSpec((1,), 0),
        AttentionSpec((1,), 8, "per_head"),
        AttentionSpec((1,), 8, "mean", 4),
        AttentionSpec((1,), 8, "per_head", 0),
        AttentionSpec((1,), 8, dtype="int4"),  # type: ignore[arg-type]
        AttentionSpec((1,), 8, heads="max"),  # type: ignore[arg-type]
    ],
)
def test_a_spec_that_cannot_be_is_refused(spec: AttentionSpec) -> None:
    with pytest.raises(ValueError, match=r"attention\."):
        AttentionCodec(spec)
