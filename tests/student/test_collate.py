"""Packs as tensors: what trains, what is padding, whose logits are asked for."""

import numpy as np
import pytest
import torch

from stillroom.pipeline.student.collate import collate, real_tokens
from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.records import Pack, Sequence, TopK
from tests.strategies import ragged_topk_of
from tests.student.world import pack_of, topk_of


def sequence(length: int, first: int = 0, context: int = 0) -> Sequence:
    return Sequence(np.arange(first, first + length, dtype=np.int32), context)


def signal(s: Sequence, seed: int) -> TopK:
    return topk_of(3 * torch.randn(s.rows, 50, generator=torch.Generator().manual_seed(seed)), 4)


def two_packs() -> list[Pack]:
    a, b, c = sequence(5), sequence(4, 10, context=2), sequence(7, 20)
    return [
        pack_of([a, b], [signal(a, 0), signal(b, 1)], window=16),
        pack_of([c], [signal(c, 2)], window=16, index=1),
    ]


def test_packed_rows_are_cut_to_the_longest_and_keep_their_positions() -> None:
    batch = collate(two_packs(), packing=True, temperature=2.0, vocabulary=50)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25, 26, 0, 0]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 0, 1]]
    assert batch.attention_mask is None


def test_labels_are_the_tokens_that_follow_the_kept_positions() -> None:
    batch = collate(two_packs(), packing=True, temperature=2.0, vocabulary=50)
    rows, columns = batch.keep.nonzero(as_tuple=True)
    # The second sequence has context 2: position 1 predicts its first new token.
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        *((0, t) for t in (0, 1, 2, 3, 6, 7)),
        *((1, t) for t in range(6)),
    ]
    assert torch.equal(batch.input_ids[rows, columns + 1], batch.targets.labels)


def test_signal_rows_stand_beside_their_positions() -> None:
    packs = two_packs()
    batch = collate(packs, packing=True, temperature=1.0, vocabulary=50)
    b = signal(sequence(4, 10, context=2), 1)
    assert batch.targets.ids is not None
    assert batch.targets.tail_lse is not None
    # Rows of b are its positions 1, 2, 3; the last trains nothing.
    assert np.array_equal(batch.targets.ids[4:6].numpy(), b.ids[:2])
    assert np.array_equal(batch.targets.tail_lse[4:6].numpy(), b.tail_lse[:2, -1])


def test_without_packing_rows_are_padded_under_a_mask() -> None:
    a, c = sequence(5), sequence(7, 20)
    packs = [pack_of([s], [signal(s, i)], window=len(s.input_ids)) for i, s in enumerate((a, c))]
    batch = collate(packs, packing=False, temperature=1.0, vocabulary=50)
    assert batch.position_ids is None
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(-1).tolist() == [5, 7]
    assert batch.keep.sum(-1).tolist() == [4, 6]


def test_several_sequences_in_an_unpacked_row_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="packing is off"):
        collate(two_packs(), packing=False, temperature=1.0, vocabulary=50)


def test_a_corpus_without_signal_has_labels_only() -> None:
    batch = collate([pack_of([sequence(5)], None, window=8)], packing=True, temperature=1.0, vocabulary=50)
    assert batch.targets.ids is None
    assert batch.targets.labels.tolist() == [1, 2, 3, 4]


def test_with_the_whole_vocabulary_kept_there_is_no_tail() -> None:
    s = sequence(5)
    full = topk_of(torch.randn(5, 50), 50)
    batch = collate([pack_of([s], [full], window=8)], packing=True, temperature=3.0, vocabulary=50)
    assert batch.targets.tail_lse is not None
    assert torch.isneginf(batch.targets.tail_lse).all()


def test_each_row_of_a_nucleus_has_a_tail_of_its_own_size() -> None:
    """Between grid points the tail depends on log(V − K), K being the row's."""
    s, counts = sequence(4), np.array([1, 4, 2, 3], np.int32)
    z = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(5))
    block = ragged_topk_of(z.double().numpy(), counts)
    targets = collate([pack_of([s], [block], window=8)], packing=True, temperature=3.3, vocabulary=50).targets
    assert targets.ids is not None
    assert targets.logits is not None
    assert targets.tail_lse is not None
    assert ((targets.ids >= 0).sum(-1).numpy() == counts[:3]).all()
    assert torch.equal(targets.ids < 0, torch.isneginf(targets.logits))
    for row, count in enumerate(counts[:3].tolist()):
        alone = tail_lse_at(block.tail_lse[row : row + 1], 1 / 3.3, 50 - count)
        assert targets.tail_lse[row].item() == pytest.approx(alone.item(), abs=1e-6)


def test_padding_is_not_counted() -> None:
    assert [real_tokens(p) for p in two_packs()] == [9, 7]
