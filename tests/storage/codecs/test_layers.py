"""codecs/layers.py: hidden states of chosen layers come back within their bound, each from a column of its own."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.codecs.layers import LayersCodec
from stillroom.storage.records import Float32, LayersSpec
from tests.strategies import columns_of, round_trip


def states(seed: int, rows: int, layers: int, width: int, size: float) -> Float32:
    """Each layer larger than the one before, as residual streams grow."""
    rng = np.random.default_rng(seed)
    grown = size * 3.0 ** np.arange(layers)
    return (rng.normal(0.0, 1.0, (rows, layers, width)) * grown[:, None]).astype(np.float32)


CASES = {
    "seed": st.integers(0, 2**32 - 1), "rows": st.integers(0, 7), "layers": st.integers(1, 4),
    "width": st.sampled_from([1, 3, 576]), "size": st.sampled_from([0.0, 1e-42, 1e-20, 1.0, 1e30]),
}  # fmt: skip


@settings(deadline=None)
@given(**CASES)
def test_bfloat16_is_within_its_bound(seed: int, rows: int, layers: int, width: int, size: float) -> None:
    codec, block = LayersCodec(LayersSpec(tuple(range(layers)), width)), states(seed, rows, layers, width, size)
    back = round_trip(codec, block)
    exact = block.astype(np.float64)
    assert back.shape == block.shape
    assert (np.abs(back - exact) <= 2.0**-8 * np.abs(exact) + 2.0**-134).all()
    np.testing.assert_array_equal(round_trip(codec, back), back, "rounded once, it stays")


@settings(deadline=None)
@given(**CASES)
def test_float32_is_exact(seed: int, rows: int, layers: int, width: int, size: float) -> None:
    block = states(seed, rows, layers, width, size)
    back = round_trip(LayersCodec(LayersSpec(tuple(range(layers)), width, "float32")), block)
    np.testing.assert_array_equal(back.view(np.uint32), block.view(np.uint32))


def test_a_layer_is_a_column_that_any_reader_takes() -> None:
    codec, block = LayersCodec(LayersSpec((0, 4, 30), 5, "float32")), states(1, 6, 3, 5, 1.0)
    rows = np.array([2, 0, 4], np.int64)
    columns = columns_of(codec, block, rows)
    assert list(columns) == ["layer_0", "layer_4", "layer_30"]
    third = columns["layer_4"].to_pylist()[2]
    np.testing.assert_array_equal(np.array(third, np.float32).reshape(4, 5), block[2:, 1])
    assert codec.encodings() == {f"layer_{i}.list.element": "BYTE_STREAM_SPLIT" for i in (0, 4, 30)}
    np.testing.assert_array_equal(codec.decode(columns, rows), block)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.4e38])
def test_what_is_not_finite_is_not_let_in(bad: float) -> None:
    block = states(0, 4, 2, 3, 1.0)
    block[2, 1, 0] = bad
    with pytest.raises(ValueError, match=r"column layer_7, row 2: expected"):
        columns_of(LayersCodec(LayersSpec((2, 7), 3)), block)


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 4), (4, 3, 3)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected float32 \[R, 2, 3\]"):
        columns_of(LayersCodec(LayersSpec((2, 7), 3)), np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="layers float64"):
        columns_of(LayersCodec(LayersSpec((2, 7), 3)), np.zeros((4, 2, 3)))  # type: ignore[misc]


def test_columns_that_were_damaged_are_refused() -> None:
    codec, block = LayersCodec(LayersSpec((2, 7), 3)), states(0, 4, 2, 3, 1.0)
    columns, rows = columns_of(codec, block), np.array([4], np.int64)
    short = pa.array([[1.0] * 11], columns["layer_7"].type)
    with pytest.raises(ValueError, match="column layer_7 has 11 values for sequence 0, expected 12"):
        codec.decode(columns | {"layer_7": short}, rows)
    nan = pa.array([[1.0] * 11 + [float("nan")]], columns["layer_7"].type)
    with pytest.raises(ValueError, match="column layer_7, row 3"):
        codec.decode(columns | {"layer_7": nan}, rows)


@pytest.mark.parametrize(
    "spec",
    [
        LayersSpec((), 3),
        LayersSpec((4, 4), 3),
        LayersSpec((4, 2), 3),
        LayersSpec((-1,), 3),
        LayersSpec((1,), 0),
        LayersSpec((1,), 3, "int8"),  # type: ignore[arg-type]
    ],
)
def test_a_spec_that_cannot_be_is_refused(spec: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        LayersCodec(spec)
