"""attention.py: rows of different widths, cut and joined as any other part of a signal."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.attention import Attention
from stillroom.storage.records import Float32
from tests.strategies import attention_of


def maps_of(seed: int, layers: int, heads: int, rows: int, first: int) -> Float32:
    """[n, heads, R, T], zeros above the diagonal."""
    return attention_of(np.random.default_rng(seed), layers, heads, rows, first).dense()


SIZES = {
    "seed": st.integers(0, 2**32 - 1), "layers": st.integers(1, 3), "heads": st.integers(1, 3),
    "rows": st.integers(1, 9), "first": st.integers(0, 5),
}  # fmt: skip


@settings(deadline=None)
@given(**SIZES)
def test_whole_maps_and_back(seed: int, layers: int, heads: int, rows: int, first: int) -> None:
    maps = maps_of(seed, layers, heads, rows, first)
    wider = np.concatenate([maps, np.full((layers, heads, rows, 2), 7.0, np.float32)], axis=-1)
    block = Attention.of(wider, first)
    assert len(block) == rows
    assert block.layers == layers
    assert block.widths.tolist() == list(range(first + 1, first + rows + 1))
    assert block.values.shape == (layers, heads * block.widths.sum())
    np.testing.assert_array_equal(block.dense(), maps)
    assert block.values[-1, -1] == maps[-1, -1, -1, -1]


@settings(deadline=None)
@given(st.data(), *SIZES.values())
def test_any_rows_are_those_of_the_whole(
    data: st.DataObject, seed: int, layers: int, heads: int, rows: int, first: int
) -> None:
    maps = maps_of(seed, layers, heads, rows, first)
    block = Attention.of(maps, first)
    start, stop = data.draw(st.integers(-rows - 1, rows + 1)), data.draw(st.integers(-rows - 1, rows + 1))
    picked = np.array(data.draw(st.lists(st.integers(0, rows - 1))), np.int64)
    for chosen in (slice(start, stop), slice(None), slice(start, stop, 2), picked):
        part = block[chosen]
        assert part.widths.tolist() == block.widths[chosen].tolist()
        widest = int(part.widths.max(initial=0))
        np.testing.assert_array_equal(part.dense(), maps[:, :, chosen, :widest])


@settings(deadline=None)
@given(*SIZES.values(), st.integers(0, 9))
def test_cut_anywhere_and_joined_it_is_the_same(
    seed: int, layers: int, heads: int, rows: int, first: int, cut: int
) -> None:
    block = Attention.of(maps_of(seed, layers, heads, rows, first), first)
    whole = Attention.concatenate([block[:cut], block[cut:], block])
    np.testing.assert_array_equal(whole[:rows].values, block.values)
    np.testing.assert_array_equal(whole[rows:].values, block.values)
    assert whole.heads == heads


def test_a_slice_is_a_view() -> None:
    block = Attention.of(maps_of(0, 2, 2, 6, 1), 1)
    assert np.shares_memory(block[2:5].values, block.values)


def test_numbers_that_do_not_fit_their_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention \[2, 5\], expected \[layers, 6\]"):
        Attention(np.zeros((2, 5), np.float32), np.array([1, 2]), 2)
