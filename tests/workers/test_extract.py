"""Top-k and the tail's log-partition against float64 and a plain sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.storage.errors import BadLogits
from stillroom.storage.records import BETAS, TopK
from stillroom.workers.extract import extract


def oracle(z_SV: Tensor, k: int) -> TopK:
    """A full sort by (−logit, id), and the tail in float64."""
    z = z_SV.double().numpy()
    ids = np.stack([np.lexsort((np.arange(z.shape[1]), -row)) for row in z])
    tail = np.take_along_axis(z, ids[:, k:], 1)
    lse = np.stack([np.logaddexp.reduce(beta * tail, axis=1) for beta in BETAS], 1)
    kept = np.take_along_axis(z, ids[:, :k], 1)
    return TopK(ids[:, :k].astype(np.int32), kept.astype(np.float32), lse)


def assert_like_oracle(z_SV: Tensor, k: int, chunk_bytes: int = 1 << 20) -> None:
    got, want = extract(z_SV, k=k, vocabulary=z_SV.shape[1], chunk_bytes=chunk_bytes), oracle(z_SV.float(), k)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.logits, want.logits)
    half_ulp = np.spacing(np.abs(want.tail_lse).astype(np.float32)) / 2
    assert np.all(np.abs(got.tail_lse - want.tail_lse) <= np.maximum(1e-4, half_ulp))


def normal(rows: int, width: int, scale: float = 4.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(
    ("width", "k"), [(49_152, 64), (151_936, 64), (151_669, 1), (33_333, 128), (320, 1), (320, 319)]
)
def test_against_float64(width: int, k: int) -> None:
    assert_like_oracle(normal(3, width), k)


def test_all_but_one_of_a_large_vocabulary() -> None:
    assert_like_oracle(normal(1, 151_936), 151_935)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 1e4])
def test_flat_and_extreme_logits(scale: float) -> None:
    assert_like_oracle(normal(4, 49_152, scale), 64)


def test_values_far_apart_do_not_underflow_the_tail() -> None:
    z = torch.full((2, 1000), -1e4)
    z[:, :5] = 1e4
    assert_like_oracle(z, 5)
    assert_like_oracle(z, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [49_152, 49_999, 700])
def test_equal_logits_are_kept_in_order_of_id(dtype: torch.dtype, width: int) -> None:
    z = normal(16, width).to(dtype)
    ranked = z.float().sort(descending=True).values
    assert bool((ranked[:, 63] == ranked[:, 64]).any()), "the case needs a tie at the border"
    assert_like_oracle(z, 64)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_row_of_few_values(data: st.DataObject) -> None:
    width = data.draw(st.integers(2, 2000))
    k = data.draw(st.integers(1, min(width - 1, 9)))
    values = torch.tensor(data.draw(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=6)))
    seed = data.draw(st.integers(0, 2**32))
    picks = torch.randint(
        len(values), (data.draw(st.integers(1, 5)), width), generator=torch.Generator().manual_seed(seed)
    )
    assert_like_oracle(values[picks], k, chunk_bytes=data.draw(st.sampled_from([1, 20_000, 1 << 20])))


def test_impossible_tokens_in_the_tail_count_for_nothing() -> None:
    z = normal(3, 5000)
    z[:, 1000:] = -torch.inf
    assert_like_oracle(z, 64)


def test_a_tail_of_impossible_tokens_alone() -> None:
    z = normal(2, 500)
    z[:, 7:] = -torch.inf
    assert np.all(extract(z, k=7, vocabulary=500).tail_lse == -np.inf)


def test_padded_columns_are_cut_first() -> None:
    z = normal(5, 49_152)
    padded = torch.cat([z, torch.full((5, 128), 1e9)], 1)
    padded[0, -1] = torch.nan
    got, want = extract(padded, k=64, vocabulary=49_152), extract(z, k=64, vocabulary=49_152)
    assert int(got.ids.max()) < 49_152
    np.testing.assert_array_equal(got.logits, want.logits)
    np.testing.assert_array_equal(got.tail_lse, want.tail_lse)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 17, 4998, 4999])
def test_nan_and_infinity_anywhere_are_refused(value: float, column: int) -> None:
    z = normal(6, 5000)
    z[4, column] = value
    with pytest.raises(BadLogits, match="1 of 6 positions, the first is place 4"):
        extract(z, k=8, vocabulary=5000, name_row="place {}".format, chunk_bytes=1)


def test_too_few_possible_tokens_are_refused() -> None:
    z = normal(2, 500)
    z[1, 7:] = -torch.inf
    with pytest.raises(BadLogits, match="1 of 2 positions, the first is row 1"):
        extract(z, k=8, vocabulary=500)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("width", [33_333, 151_669])
def test_bit_equal_for_any_thread_count_and_chunk(rows: int, width: int) -> None:
    z, before = normal(rows, width), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = extract(z, k=64, vocabulary=width)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for chunk_bytes in (1, 1 << 20, 1 << 26):
                got = extract(z, k=64, vocabulary=width, chunk_bytes=chunk_bytes)
                for name in ("ids", "logits", "tail_lse"):
                    np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=f"{name} {threads}")
    finally:
        torch.set_num_threads(before)


def test_input_is_left_alone() -> None:
    z = normal(3, 1000)
    copy = z.clone()
    extract(z, k=8, vocabulary=1000)
    assert torch.equal(z, copy)


def test_zeros_of_either_sign_are_equal() -> None:
    z = torch.zeros(2, 3000)
    z[:, ::2] = -0.0
    got = extract(z, k=5, vocabulary=3000)
    assert got.ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert np.signbit(got.logits).tolist() == [[True, False, True, False, True]] * 2


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000 - (1 << 32), 0x7F800001, -1])
@pytest.mark.parametrize("column", [0, 17, 4998])
def test_no_nan_of_whatever_sign_is_overlooked(bits: int, column: int) -> None:
    z = normal(2, 4999)
    z[1, column] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    with pytest.raises(BadLogits, match="1 of 2 positions, the first is row 1"):
        extract(z, k=8, vocabulary=4999)
