"""The tail's mean shares: against the definition, and as a file."""

from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.fidelity.measure import Block
from stillroom.storage.fidelity.shares import read_shares, shares_path, tail_shares, write_shares
from stillroom.storage.records import BETAS, Sampled, Signal, TopK

V, K = 40, 6


def block(seed: int, positions: int = 5, *, ragged: bool = False) -> Block:
    """Truth, and a top-k of it; ragged: each row keeps one id less than the one before."""
    truth = np.random.default_rng(seed).normal(size=(positions, V)).astype(np.float32) * 3
    ids = np.argsort(-truth, axis=1)[:, :K].astype(np.int32)
    logits = np.take_along_axis(truth, ids, 1)
    counts = None
    if ragged:
        counts = np.array([K - row % K for row in range(positions)], np.int32)
        unused = np.arange(K) >= counts[:, None]
        ids, logits = np.where(unused, -1, ids), np.where(unused, -np.inf, logits).astype(np.float32)
    tail = np.zeros((positions, len(BETAS)), np.float32)  # not read here
    topk = TopK(ids, logits, tail) if counts is None else TopK(ids, logits, tail, counts)
    return Block(truth, Signal(topk), [(f"{seed:032x}", t) for t in range(positions)])


@pytest.mark.parametrize("ragged", [False, True])
def test_they_are_the_mean_tail_over_its_sum(ragged: bool) -> None:
    blocks = [block(1, ragged=ragged), block(2, 3, ragged=ragged)]
    expected = np.zeros(V)
    for found in blocks:
        assert found.signal.topk is not None
        for place, z_V in enumerate(found.truth.astype(np.float64)):
            p_V = np.exp(z_V) / np.exp(z_V).sum()
            kept = {int(i) for i in found.signal.topk.ids[place] if i >= 0}
            expected += [0.0 if i in kept else p for i, p in enumerate(p_V)]
    shares = tail_shares(blocks, V)
    assert shares is not None
    assert shares.dtype == np.float32
    assert shares.sum(dtype=np.float64) == pytest.approx(1)
    assert shares.min() > 0
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=2e-6)


def test_of_nothing_there_are_none_and_without_a_topk_they_are_refused() -> None:
    assert tail_shares([], V) is None
    drawn = Sampled(np.zeros((5, 1), np.int32), np.ones((5, 1), np.int32))
    with pytest.raises(ValueError, match="top-k"):
        tail_shares([Block(block(1).truth, Signal(sampled=drawn), block(1).keys)], V)


def test_a_file_is_read_as_it_was_written_or_told_to_be_damaged(tmp_path: Path) -> None:
    path = shares_path(tmp_path / "snapshot.parquet")
    assert path == tmp_path / "tail_shares.parquet"
    with pytest.raises(StoreError, match=r"is not there.*stillroom train"):
        read_shares(path, V)
    shares = tail_shares([block(1)], V)
    assert shares is not None
    write_shares(path, shares)
    assert read_shares(path, V).tobytes() == shares.tobytes()
    assert read_shares(path, V).flags.writeable
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(CorruptShard, match="40 rows, expected 41"):
        read_shares(path, V + 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(CorruptShard, match=r"tail_shares\.parquet"):
        read_shares(path, V)
    write_shares(path, np.full(V, 1.0, np.float32))
    with pytest.raises(CorruptShard, match="sum to 1"):
        read_shares(path, V)


def test_a_flipped_bit_of_the_shares_is_told(tmp_path: Path) -> None:
    """In the page's data, which the checksum is of; 40 offsets."""
    path = tmp_path / "tail_shares.parquet"
    shares = tail_shares([block(3)], V)
    assert shares is not None
    write_shares(path, shares)
    whole = path.read_bytes()
    told = []
    for offset in np.random.default_rng(0).choice(len(whole), 40, replace=False):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << int(offset) % 8
        path.write_bytes(damaged)
        try:
            assert read_shares(path, V).tobytes() == shares.tobytes(), offset
        except CorruptShard as error:
            told.append(str(error))
    assert len(told) > 10
    assert all(path.name in line for line in told)
