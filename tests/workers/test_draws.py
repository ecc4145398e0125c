"""Systematic draws: what they promise row by row, on average, and whatever the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from stillroom.storage.codecs.sampled import position_keys
from stillroom.storage.errors import BadLogits
from stillroom.storage.records import Sampled
from stillroom.workers.draws import draw

DIGEST = "0123456789abcdef" * 2


def keys(count: int, start: int = 0) -> NDArray[np.uint64]:
    return position_keys(DIGEST, np.arange(start, start + count))


def normal(rows: int, width: int, scale: float = 4.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def dense(block: Sampled, vocabulary: int) -> NDArray[np.int64]:
    """Counts [S, V]."""
    counts = np.zeros((len(block), vocabulary), dtype=np.int64)
    rows, slots = np.nonzero(block.counts)
    counts[rows, block.ids[rows, slots]] = block.counts[rows, slots]
    return counts


def probabilities(z_SV: Tensor) -> NDArray[np.float64]:
    return np.asarray(z_SV.double().softmax(-1).numpy())


def assert_same(got: Sampled, want: Sampled) -> None:
    """Equal draws, whatever the width that a call's widest row gave them."""
    width = int((want.counts > 0).sum(axis=1).max())
    assert not got.counts[:, width:].any()
    np.testing.assert_array_equal(got.ids[:, :width], want.ids[:, :width])
    np.testing.assert_array_equal(got.counts[:, :width], want.counts[:, :width])


def assert_well_formed(block: Sampled, draws: int, vocabulary: int) -> None:
    assert block.ids.dtype == block.counts.dtype == np.int32
    assert (block.counts.sum(axis=1) == draws).all()
    used = block.counts > 0
    assert (block.ids[~used] == -1).all()
    assert used[:, 0].all()
    assert (np.diff(used.astype(int), axis=1) <= 0).all(), "used slots come first"
    rising = np.diff(block.ids, axis=1) > 0
    assert rising[used[:, 1:]].all()
    assert block.ids.max() < vocabulary
    assert used.sum(axis=1).max() == block.ids.shape[1], "no wider than the widest row"


@pytest.mark.parametrize(("width", "draws"), [(49_152, 50), (262_144, 50), (33_333, 7), (2, 50), (320, 2**15 - 1)])
def test_every_count_is_the_expected_one_rounded_down_or_up(width: int, draws: int) -> None:
    """Against float64: |count − N·p| < 1 is what systematic sampling is. Counts could differ by one draw more only
    where N·p lies within its error of a whole number; 2e-6 relative allows for that."""
    z = normal(6, width)
    block = draw(z, keys(6), draws=draws)
    assert_well_formed(block, draws, width)
    expected = draws * probabilities(z)
    assert (np.abs(dense(block, width) - expected) < 1 + 2e-6 * expected + 1e-6).all()


@pytest.mark.parametrize("draws", [1, 3, 50])
def test_the_mean_over_positions_is_the_distribution(draws: int) -> None:
    """The same logits at M positions: p̂_i has mean p_i and variance f(1 − f)/N² with f the fraction of N·p_i, so the
    mean over M lies within 5 standard errors, but for 1 in 1.7 million; 60 ids are looked at."""
    positions, width = 4000, 60
    z_V = normal(1, width, scale=1.5, seed=3)
    block = draw(z_V.expand(positions, -1), keys(positions), draws=draws)
    p_V = probabilities(z_V)[0]
    fraction_V = draws * p_V % 1
    error_V = np.sqrt(fraction_V * (1 - fraction_V) / positions) / draws
    assert (np.abs(dense(block, width).mean(axis=0) / draws - p_V) <= 5 * error_V + 1e-6).all()


def test_a_statistic_over_different_rows_is_unbiased() -> None:
    """Σ_i p̂_i f_i against Σ_i p_i f_i with f the square of the id's logit, over 2,000 rows of their own. Rows are
    independent and each difference has mean 0 whatever the joint law of its draws, so their mean lies within 5 of the
    standard errors seen."""
    z = normal(2000, 200, scale=2.0, seed=4)
    f = z.double().numpy() ** 2
    differences = ((dense(draw(z, keys(2000), draws=20), 200) / 20 - probabilities(z)) * f).sum(axis=1)
    assert abs(differences.mean()) < 5 * differences.std() / np.sqrt(2000)
    assert differences.std() > 0.01, "the test must be able to see a spread"


def test_rows_do_not_know_of_each_other() -> None:
    z, k = normal(23, 5000), keys(23)
    whole = draw(z, k, draws=50)
    order = np.random.default_rng(0).permutation(23)
    assert_same(draw(z[order], k[order], draws=50), whole[order])
    for start in (0, 7, 22):
        assert_same(draw(z[start : start + 1], k[start : start + 1], draws=50), whole[start : start + 1])
    for chunk_bytes in (1, 3 * 8 * 5000, 1 << 30):
        assert_same(draw(z, k, draws=50, chunk_bytes=chunk_bytes), whole)


@pytest.mark.parametrize("width", [49_152, 151_669])
def test_thread_counts_do_not_change_a_draw(width: int) -> None:
    z, k, before = normal(5, width), keys(5), torch.get_num_threads()
    try:
        blocks = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            blocks += [draw(z, k, draws=200), draw(z, k, draws=200, chunk_bytes=1)]
    finally:
        torch.set_num_threads(before)
    for block in blocks[1:]:
        assert_same(block, blocks[0])


def test_cumulative_weights_are_whole_numbers_whose_sums_are_exact() -> None:
    """What makes draws independent of the order of summation: a reversed cumulative sum gives the same numbers."""
    from stillroom.workers.draws import _cumulate_

    for width in (3, 49_152, 262_144):
        z = torch.cat([normal(2, width), torch.zeros(1, width)])
        sums = torch.empty(3, width, dtype=torch.float64)
        _cumulate_(z.clone(), sums)
        weights = torch.diff(sums, prepend=torch.zeros(3, 1, dtype=torch.float64))
        assert torch.equal(weights, weights.round())
        assert float(sums[:, -1].max()) <= 2.0**53
        p = probabilities(z)
        error = np.abs((weights / sums[:, -1:]).numpy() - p)
        bits = (width - 1).bit_length()
        assert (error <= 2e-6 * p + 2.0 ** (bits - 54) * p.max(axis=1, keepdims=True)).all()
        backwards = weights.flip(-1).cumsum(-1)
        assert torch.equal(backwards[:, -1], sums[:, -1])
        assert torch.equal(backwards[:, -1:] - backwards[:, :-1], sums.flip(-1)[:, 1:])


def test_another_key_gives_another_draw() -> None:
    z = normal(1, 2000).expand(3, -1)
    here, there = position_keys(DIGEST, np.array([4])), position_keys(DIGEST[::-1], np.array([4]))
    block = dense(draw(z, np.concatenate([here, keys(1, 5), there]), draws=50), 2000)
    assert not (block[0] == block[1]).all()
    assert not (block[0] == block[2]).all()


def test_a_certain_id_gets_all_draws() -> None:
    z = torch.full((4, 70_000), -1e4)
    for row, id in enumerate((0, 1, 69_999, 30_000)):
        z[row, id] = 1e4
    block = draw(z, keys(4), draws=50)
    assert block.ids.tolist() == [[0], [1], [69_999], [30_000]]
    assert block.counts.tolist() == [[50]] * 4


@pytest.mark.parametrize("key", [0, 1, 2**28 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("draws", [1, 2, 3, 50, 32_767])
@pytest.mark.parametrize("width", [1, 5, 49_151])
def test_the_ends_of_the_distribution(key: int, draws: int, width: int) -> None:
    """u = 0 and u just below 1, with impossible ids at both ends, where a slip would take the first or step over the
    last."""
    z = torch.zeros(1, width + 8)
    z[:, :4] = z[:, -4:] = -torch.inf
    block = draw(z, np.array([key], dtype=np.uint64), draws=draws)
    assert_well_formed(block, draws, width + 8)
    assert block.ids[block.counts > 0].min() >= 4
    assert block.ids.max() < width + 4
    assert (np.abs(block.counts[block.counts > 0] - draws / width) < 1).all()


def test_equal_logits_are_spread_evenly() -> None:
    block = draw(torch.zeros(2, 200), keys(2), draws=50)
    assert block.counts.tolist() == [[1] * 50] * 2
    assert (np.diff(block.ids, axis=1) == 4).all()


def test_ids_beyond_two_to_the_seventeenth_are_drawn() -> None:
    z = torch.full((1, 300_000), -50.0)
    z[0, [131_072, 299_999]] = 0.0
    block = draw(z, keys(1), draws=50)
    assert block.ids.tolist() == [[131_072, 299_999]]
    assert block.counts.tolist() == [[25, 25]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_draw_as_their_values_in_float32(dtype: torch.dtype) -> None:
    z = normal(4, 3000).to(dtype)
    assert_same(draw(z, keys(4), draws=50), draw(z.float(), keys(4), draws=50))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused_by_name(bad: float) -> None:
    z = normal(5, 100)
    z[3, 99] = bad
    with pytest.raises(BadLogits, match=r"at 1 of 5 positions, the first is position 13$"):
        draw(z, keys(5), draws=50, name_row=lambda row: f"position {10 + row}")


def test_a_row_of_impossible_ids_alone_is_refused() -> None:
    z = normal(2, 100)
    z[1] = -torch.inf
    with pytest.raises(BadLogits, match=r"the first is row 1$"):
        draw(z, keys(2), draws=50)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_row_of_few_values(data: st.DataObject) -> None:
    width, draws = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 400))
    values = torch.tensor([0.0, *data.draw(st.lists(st.floats(-60, 60, width=32) | st.just(-np.inf), max_size=5))])
    seed = data.draw(st.integers(0, 2**32))
    picks = torch.randint(len(values), (3, width), generator=torch.Generator().manual_seed(seed))
    picks[:, seed % width] = 0
    z = values[picks]
    block = draw(z, keys(3, seed), draws=draws, chunk_bytes=data.draw(st.sampled_from([1, 1 << 20])))
    assert_well_formed(block, draws, width)
    expected = draws * probabilities(z)
    counts = dense(block, width)
    assert not counts[z.numpy() == -np.inf].any()
    assert (np.abs(counts - expected) < 1 + 2e-6 * expected + 1e-6).all()
