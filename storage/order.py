"""The order of training: a pure function of seed, epoch and the units, the same for every world size.

Enters: per unit the lengths of its sequences and which of them train. Leaves: packs in global order. Costs: 2 to
6 µs a sequence and epoch.

    units, permuted by (seed, epoch)      u3 u0 u7 u1 u4 …
    lane l holds every 64th               lane 0: u3 …   lane 1: u0 …   …
    packs fill a window within a unit     lane 0: p p p p   lane 1: p p p …
    global order: one pack from each lane in turn

Rank r of W takes packs r, r + W, r + 2W … of the global order. Where W divides 64 these are whole lanes, so ranks
do not read each other's shards (but at the ragged end of an epoch), and interleaving the ranks gives the same
sequence for any W. Within a unit rows stay close: a pack spans at most two adjacent row groups, so a reader
holds two decoded groups a lane.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LANES = 64

#: Packs that may still be filled at one time: it bounds the search for one with room.
OPEN_PACKS = 64

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Block:
    """What the order needs to know of one unit.

    id: 32 hex digits. entries: int64 [E], the caller's numbers of its training occurrences. groups: int64 [E],
    the row group that each lies in. tokens: int64 [E]. keys: uint64 [E], from the sequences' digests.
    """

    id: str
    entries: Int64
    groups: Int64
    tokens: Int64
    keys: UInt64


@dataclass(frozen=True)
class EpochOrder:
    """Packs of an epoch in global order.

    blocks: int64 [P], the block that each pack reads. entries: the caller's numbers, pack after pack;
    starts: int64 [P + 1] into it.
    """

    blocks: Int64
    entries: Int64
    starts: Int64

    def __len__(self) -> int:
        return len(self.blocks)

    def pack(self, number: int) -> Int64:
        """Entries of one pack, in the order in which they lie in the window."""
        return self.entries[self.starts[number] : self.starts[number + 1]]


def mix(values: UInt64) -> UInt64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): our own, because numpy's permutations may change
    between releases and an order of training must not."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def digest_keys(digests: Seq[str]) -> UInt64:
    """The first 64 bits of hex digests."""
    return np.array([int(d[:16], 16) for d in digests], dtype=np.uint64)


def unit_order(ids: Seq[str], seed: int, epoch: int) -> Int64:
    """Numbers of the units in the order in which an epoch reads them; teachers score in that of epoch 0."""
    return np.argsort(mix(digest_keys(ids) ^ _salt(seed, epoch)), kind="stable")


def epoch_order(blocks: Seq[Block], *, window: int, seed: int, epoch: int, pack: bool) -> EpochOrder:
    """All packs of an epoch. `pack=False` gives every sequence a pack of its own."""
    salt = _salt(seed, epoch)
    lanes: list[list[tuple[int, list[int]]]] = [[] for _ in range(LANES)]
    for place, number in enumerate(unit_order([b.id for b in blocks], seed, epoch)):
        block = blocks[number]
        order = _within(block, salt)
        filled = _fill(block, order, window) if pack else [[entry] for entry in block.entries[order].tolist()]
        lanes[place % LANES] += [(int(number), members) for members in filled]
    rounds = max((len(lane) for lane in lanes), default=0)
    packs = [lane[r] for r in range(rounds) for lane in lanes if r < len(lane)]
    lengths = [len(members) for _, members in packs]
    return EpochOrder(
        np.array([number for number, _ in packs], dtype=np.int64),
        np.array([entry for _, members in packs for entry in members], dtype=np.int64),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
    )


def _salt(seed: int, epoch: int) -> np.uint64:
    once = mix(np.array([seed % 2**64], dtype=np.uint64))
    return np.uint64(mix(once ^ np.uint64(epoch))[0])


def _within(block: Block, salt: np.uint64) -> Int64:
    """Row groups permuted, and the entries within each."""
    group_keys = mix(mix(block.groups.astype(np.uint64)) ^ salt ^ digest_keys([block.id]))
    order: Int64 = np.lexsort((mix(block.keys ^ salt), block.groups, group_keys))
    return order


def _fill(block: Block, order: Int64, window: int) -> list[list[int]]:
    """Entries of each pack, first-fit over the packs still open; a pack opened in one row group may be filled from
    the next one, then closes. Nothing is dropped or cut."""
    smallest = int(block.tokens.min(initial=window))
    filled: list[list[int]] = []
    room: list[int] = []
    open_packs: list[int] = []
    opened = 0
    current = -1
    entries, tokens, groups = (column[order].tolist() for column in (block.entries, block.tokens, block.groups))
    for entry, length, group in zip(entries, tokens, groups, strict=True):
        if group != current:
            open_packs = [number for number in open_packs if number >= opened]
            opened, current = len(filled), group
        number = next((n for n in open_packs if room[n] >= length), len(filled))
        if number == len(filled):
            filled.append([])
            room.append(window)
            open_packs.append(number)
        filled[number].append(entry)
        room[number] -= length
        if room[number] < smallest:
            open_packs.remove(number)
        del open_packs[:-OPEN_PACKS]
    return filled
