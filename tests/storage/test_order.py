"""order.py: every entry once per epoch, packs that fit, and one order for every world size."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage.order import LANES, Block, epoch_order, mix, unit_order
from stillroom.storage.records import digest128

WINDOW = 32


def make_blocks(rng: np.random.Generator, count: int, *, longest: int = WINDOW, largest: int = 20) -> list[Block]:
    """Units of 1 … `largest` entries in up to three row groups; entries are numbered through all units."""
    blocks: list[Block] = []
    number = 0
    for unit in range(count):
        size = int(rng.integers(1, largest + 1))
        blocks.append(
            Block(
                digest128(b"unit", str(unit).encode()),
                np.arange(number, number + size),
                np.sort(rng.integers(0, 3, size)),
                rng.integers(1, longest + 1, size),
                rng.integers(0, 2**63, size).astype(np.uint64),
            )
        )
        number += size
    return blocks


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    units=st.integers(1, 150),
    epoch=st.integers(0, 3),
    pack=st.booleans(),
    longest=st.sampled_from([1, 5, WINDOW]),
)
def test_every_entry_once_in_packs_that_fit(seed: int, units: int, epoch: int, pack: bool, longest: int) -> None:
    blocks = make_blocks(np.random.default_rng(seed), units, longest=longest)
    order = epoch_order(blocks, window=WINDOW, seed=seed, epoch=epoch, pack=pack)
    total = sum(len(b.entries) for b in blocks)
    tokens = np.concatenate([b.tokens for b in blocks])
    groups = np.concatenate([b.groups for b in blocks])
    block_of = np.repeat(np.arange(units), [len(b.entries) for b in blocks])

    assert sorted(order.entries.tolist()) == list(range(total))
    assert order.starts[-1] == total
    for number in range(len(order)):
        entries = order.pack(number)
        assert len(entries) >= 1
        assert pack or len(entries) == 1
        assert tokens[entries].sum() <= WINDOW
        assert set(block_of[entries]) == {order.blocks[number]}, "a pack stays in its unit"
        read = [group for group, after in pairwise([*groups[entries], -1]) if group != after]
        assert len(read) <= 2, "a pack spans at most two row groups, one after the other"
        assert len(set(read)) == len(read)


def test_first_fit_leaves_no_pack_that_an_earlier_one_could_hold() -> None:
    """Within a unit of one row group: the first sequence of a pack did not fit any pack opened before it."""
    block = make_blocks(np.random.default_rng(0), 1, largest=40)[0]
    block = Block(block.id, block.entries, np.zeros_like(block.groups), block.tokens, block.keys)
    order = epoch_order([block], window=WINDOW, seed=0, epoch=0, pack=True)
    packs = [order.pack(n).tolist() for n in range(len(order))]
    assert len(packs) > 4
    for late, pack in enumerate(packs):
        for earlier in packs[:late]:
            assert block.tokens[earlier].sum() + block.tokens[pack[0]] > WINDOW
    assert block.tokens.sum() / (WINDOW * len(packs)) > 0.8


def test_packing_saves_windows() -> None:
    blocks = make_blocks(np.random.default_rng(1), 80, longest=8)
    packed = len(epoch_order(blocks, window=WINDOW, seed=0, epoch=0, pack=True))
    assert packed < 0.4 * len(epoch_order(blocks, window=WINDOW, seed=0, epoch=0, pack=False))


def test_seeds_and_epochs_differ_and_repeat() -> None:
    blocks = make_blocks(np.random.default_rng(2), 100)
    orders = {
        (seed, epoch): epoch_order(blocks, window=WINDOW, seed=seed, epoch=epoch, pack=True).entries.tolist()
        for seed in (0, 1, -1, 2**64 - 2)
        for epoch in (0, 1)
    }
    assert len({tuple(o) for o in orders.values()}) == 8
    ids = [b.id for b in blocks]
    assert len({tuple(unit_order(ids, *case).tolist()) for case in orders}) == 8
    again = epoch_order(blocks, window=WINDOW, seed=1, epoch=1, pack=True).entries.tolist()
    assert again == orders[1, 1]
    # The order shuffles: few entries stay where they were.
    moved = np.array(orders[0, 0]) != np.array(orders[0, 1])
    assert moved.mean() > 0.95


def test_row_groups_and_the_rows_in_them_are_shuffled_too() -> None:
    """A single unit: 40 rows in 4 groups. Each epoch reads the groups in another order, and each group otherwise."""
    groups = np.repeat(np.arange(4), 10)
    keys = mix(np.arange(40, dtype=np.uint64))
    block = Block("ab" * 16, np.arange(40), groups, np.full(40, WINDOW), keys)
    orders = [
        epoch_order([block], window=WINDOW, seed=seed, epoch=epoch, pack=True).entries.tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(groups[o].tolist()) for o in orders}) > 1
    for group in range(4):
        within = {tuple(n for n in o if n // 10 == group) for o in orders}
        assert len(within) == 3
        assert tuple(range(10 * group, 10 * group + 10)) not in within


def test_the_order_does_not_depend_on_the_order_of_the_blocks() -> None:
    """Two snapshots that list the same units otherwise train alike."""
    blocks = make_blocks(np.random.default_rng(3), 90)
    one = epoch_order(blocks, window=WINDOW, seed=5, epoch=2, pack=True)
    two = epoch_order(blocks[::-1], window=WINDOW, seed=5, epoch=2, pack=True)
    assert one.entries.tolist() == two.entries.tolist()
    assert one.starts.tolist() == two.starts.tolist()


@pytest.mark.parametrize("world_size", [2, 4, 8, 64])
def test_ranks_do_not_read_each_others_units(world_size: int) -> None:
    """While all lanes are full: units of equal size, as many as lanes, one pack each."""
    blocks = [
        Block(digest128(str(n).encode()), np.array([2 * n, 2 * n + 1]), np.zeros(2, np.int64), np.full(2, WINDOW),
              np.array([1, 2], dtype=np.uint64))
        for n in range(LANES)
    ]  # fmt: skip
    order = epoch_order(blocks, window=WINDOW, seed=0, epoch=0, pack=True)
    read = [set(order.blocks[rank::world_size].tolist()) for rank in range(world_size)]
    assert sum(map(len, read)) == LANES
    assert set.union(*read) == set(range(LANES))


def test_teachers_score_in_the_order_of_epoch_zero() -> None:
    blocks = make_blocks(np.random.default_rng(4), 50)
    order = epoch_order(blocks, window=WINDOW, seed=9, epoch=0, pack=True)
    first_seen = list(dict.fromkeys(order.blocks.tolist()))
    assert first_seen == unit_order([b.id for b in blocks], 9, 0).tolist()


def test_mix_is_splitmix64() -> None:
    """The order of training must never change: SplitMix64's published first outputs from seed 0 hold it."""
    state = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert [hex(v) for v in mix(state)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_the_order_is_held_to_the_number() -> None:
    """One small order written out: it changes when anyone changes the hash, the lanes or the packing."""
    blocks = [
        Block(digest128(str(n).encode()), np.arange(3 * n, 3 * n + 3), np.array([0, 0, 1]), np.array([20, 10, 12]),
              np.array([7, 8, 9], dtype=np.uint64))
        for n in range(3)
    ]  # fmt: skip
    order = epoch_order(blocks, window=WINDOW, seed=3, epoch=1, pack=True)
    assert [order.pack(n).tolist() for n in range(len(order))] == [[0, 1], [6, 7], [5, 3], [2], [8], [4]]
