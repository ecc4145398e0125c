"""The stream: a corpus manifest and a pinned snapshot become packs for a student. No torch, no log, no Ray.

Enters: a manifest (order, split, mask, weight), a snapshot (shards) or none, a cursor. Leaves: `Pack`s in the order
that order.py gives. Costs: a thread that decodes ahead; two decoded row groups (about 2 MiB each at k = 64) for
each of at most 64 lanes / world size.

Of a snapshot that teachers still fill (read-through) the order is the same, as it follows from the units alone; the
decoding thread waits, packs ahead of the student, where the shard of its next pack is not there yet.

Without a snapshot the stream serves ground truth: the same sequences with ids from the manifest and no signal,
packed by the manifest's row groups, as there are no units.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from math import gcd

import numpy as np
from numpy.typing import NDArray

from stillroom.storage.errors import CorruptShard, IdentityMismatch, StoreError, UsageError
from stillroom.storage.files import open_files
from stillroom.storage.manifest import Manifest, ManifestIndex
from stillroom.storage.order import LANES, Block, EpochOrder, digest_keys, epoch_order
from stillroom.storage.records import Pack, ShardRef, Signal, digest128
from stillroom.storage.remote.cache import cached_files
from stillroom.storage.shard import ShardReader, StoredSequence, row_groups
from stillroom.storage.snapshot import Snapshot

#: Gives the shard of a unit that an open snapshot lacks, when it is there. The second argument says, asked again and
#: again, whether nobody waits for it any more; then it raises whatever it likes.
AwaitShard = Callable[[str, Callable[[], bool]], ShardRef]


@dataclass(frozen=True)
class _Placed:
    """Where the sequence of a manifest row lies: block, row group in it, row in the group; int64 [N] each."""

    block: NDArray[np.int64]
    group: NDArray[np.int64]
    row: NDArray[np.int64]


class Stream:
    """Packs of one split, endlessly over epochs or for `epochs` of them.

    manifest: what to train on. snapshot: the teacher's shards, None for hard labels only.
    heldout: the held-out split instead of the training split. window: tokens T of a pack; no sequence may be
    longer. pack: lay several sequences into one window; else one sequence a pack, T its own length.
    rank, world_size: this process takes every world_size-th pack. start: packs already consumed, counted over all
    ranks and epochs; with it any world size resumes where another stopped. prefetch: packs decoded ahead.
    parts: of the signal that are read and decoded; None: all. await_shard: for an open snapshot, which needs it.
    chosen: bool [rows of the manifest], the rows of the split that there are at all; None: all. numbers: the packs to
    serve, counted over all epochs, rising, in place of what rank, world_size and start say.

    Raises UsageError if a sequence does not fit the window, IdentityMismatch if manifest and snapshot are of
    different tokenizers, StoreError if the snapshot lacks sequences of the split or the split is empty.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        snapshot: Snapshot | None,
        heldout: bool = False,
        window: int,
        seed: int = 0,
        pack: bool = True,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        epochs: int | None = None,
        prefetch: int = 4,
        parts: Collection[str] | None = None,
        await_shard: AwaitShard | None = None,
        chosen: NDArray[np.bool_] | None = None,
        numbers: Iterable[int] | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        assert snapshot is None or await_shard is not None or not snapshot.open
        self._await = await_shard
        self._manifest, self._snapshot = manifest, snapshot
        self._window, self._seed, self._pack = window, seed, pack
        self._rank, self._world_size, self._start = rank, world_size, start
        self._epochs, self._prefetch, self._parts = epochs, prefetch, parts
        self._index = manifest.index()
        self._masks = manifest.masks()
        self._numbers_given = numbers
        of_split = self._index.heldout == heldout
        self._entries = np.flatnonzero(of_split if chosen is None else of_split & chosen)
        self._check(heldout)
        self._placed = _place(self._index, manifest, snapshot, self._entries)
        self._blocks = _blocks(self._index, self._placed, snapshot, self._entries)
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._lock = threading.Lock()

    def packs_per_epoch(self, epoch: int) -> int:
        """Over all ranks."""
        return len(self._order(epoch))

    def units(self, packs: int | None = None) -> set[str]:
        """Ids of the units that the first so many packs of epoch 0 read; None: all packs."""
        return {self._blocks[number].id for number in np.unique(self._order(0).blocks[:packs])}

    def __iter__(self) -> Iterator[Pack]:
        """Decode in a thread of its own; what fails there is raised here."""
        ready: queue.Queue[Pack | Exception | None] = queue.Queue(maxsize=max(1, self._prefetch))
        stop = threading.Event()

        def put(item: Pack | Exception | None) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def decode() -> None:
            # The packs of a rank come from every gcd(64, world size)-th lane, two row groups in each.
            groups = 2 * (LANES // gcd(LANES, self._world_size))
            try:
                reader = _Reader(self._snapshot, self._parts, groups, self._shard_of(stop.is_set))
                for epoch, number in self._numbers():
                    if stop.is_set():
                        return
                    put(self._load(reader, epoch, number))
                put(None)
            except Exception as error:  # noqa: BLE001 - handed to the consumer, who raises it
                put(error)

        thread = threading.Thread(target=decode, name="stillroom-stream", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _shard_of(self, gone: Callable[[], bool]) -> Callable[[str], ShardRef]:
        """Where the shard of a unit lies; waits for it in an open snapshot."""
        held = self._snapshot.refs if self._snapshot else {}
        arrive = self._await

        def shard_of(unit: str) -> ShardRef:
            if unit in held or arrive is None:
                return held[unit]
            return arrive(unit, gone)

        return shard_of

    def _numbers(self) -> Iterator[tuple[int, int]]:
        """(epoch, number in the epoch) of this rank's packs from the cursor on."""
        epoch, before = 0, 0
        given = self._numbers_given
        for number in count(self._start + self._rank, self._world_size) if given is None else given:
            while number - before >= (packs := self.packs_per_epoch(epoch)):
                epoch, before = epoch + 1, before + packs
                if epoch == self._epochs:
                    return
            yield epoch, int(number) - before

    def _order(self, epoch: int) -> EpochOrder:
        with self._lock:  # the decoding thread and packs_per_epoch both ask
            if epoch not in self._orders:
                self._orders[epoch] = epoch_order(
                    self._blocks, window=self._window, seed=self._seed, epoch=epoch, pack=self._pack
                )
                while len(self._orders) > 2:
                    self._orders.popitem(last=False)
            return self._orders[epoch]

    def _load(self, reader: "_Reader", epoch: int, number: int) -> Pack:
        order = self._order(epoch)
        rows = self._entries[order.pack(number)]
        if self._snapshot is None:
            found = [StoredSequence(r.sequence, None) for r in self._manifest.rows(rows.tolist())]
        else:
            found = [self._stored(reader, int(row)) for row in rows]
        masks = [self._masks.mask(int(row), int(self._index.tokens[row])) for row in rows]
        weights = self._index.weights[rows]
        digests = tuple(self._index.sequences[row].decode() for row in rows)
        window = self._window if self._pack else len(found[0].sequence.input_ids)
        pack = assemble(found, masks, weights, digests, window=window, epoch=epoch, index=number)
        return replace(pack, rows=rows)

    def _stored(self, reader: "_Reader", row: int) -> StoredSequence:
        """A sequence with its signal. That its ids give the digest asked for costs 1 % of decoding it."""
        at = self._placed
        stored = reader.group(int(at.block[row]), int(at.group[row]))[int(at.row[row])]
        asked = self._index.sequences[row].decode()
        if stored.sequence.digest != asked:
            raise CorruptShard(
                f"{reader.where(int(at.block[row]))} holds sequence {stored.sequence.digest} where the plan has {asked}"
            )
        return stored

    def _check(self, heldout: bool) -> None:
        split = "held-out" if heldout else "training"
        if not len(self._entries):
            raise StoreError(f"manifest {self._manifest.path} has no sequences in its {split} split")
        longest = int(self._index.tokens[self._entries].max())
        if longest > self._window:
            raise UsageError(
                f"a sequence of {longest} tokens does not fit the student's window of {self._window}: "
                f"set the student's window to at least {longest}, or corpus.window to {self._window} and teach again"
            )
        if self._snapshot and self._snapshot.identity.tokenizer != self._manifest.meta.tokenizer:
            raise IdentityMismatch(
                f"manifest {self._manifest.path} was tokenised by {self._manifest.meta.tokenizer}, the store "
                f"{self._snapshot.uri} by {self._snapshot.identity.tokenizer}: "
                "ingest the corpus with the teacher's tokenizer"
            )


def assemble(
    found: list[StoredSequence],
    masks: list[NDArray[np.bool_]],
    weights: NDArray[np.float32],
    digests: tuple[str, ...],
    *,
    window: int,
    epoch: int,
    index: int,
) -> Pack:
    """Lay sequences end to end and pick the positions that train.

    Position t of a sequence trains if mask[t + 1] is set and t ≥ first_position: the mask belongs to the token
    predicted, and rows of the overlap belong to the window before.
    """
    lengths = [len(f.sequence.input_ids) for f in found]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    input_ids = np.zeros(window, dtype=np.int32)
    position_ids = np.arange(window, dtype=np.int32)
    segment_ids = np.full(window, -1, dtype=np.int32)
    positions, signal = [], []
    for number, (stored, mask, start) in enumerate(zip(found, masks, starts[:-1], strict=True)):
        length, first = lengths[number], stored.sequence.first_position
        part = slice(start, start + length)
        input_ids[part] = stored.sequence.input_ids
        position_ids[part] = np.arange(length)
        segment_ids[part] = number
        trained = np.flatnonzero(mask[first + 1 :]) + first
        positions.append(trained + start)
        if stored.signal is not None:
            signal.append(stored.signal[trained - first])
    position_ids[starts[-1] :] = np.arange(window - starts[-1])
    at = np.concatenate(positions).astype(np.int64)
    return Pack(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        positions=at,
        labels=input_ids[np.minimum(at + 1, window - 1)],
        weights=np.repeat(weights, [len(p) for p in positions]).astype(np.float32),
        signal=Signal.concatenate(signal) if signal else None,
        sequences=digests,
        epoch=epoch,
        index=index,
    )


class _Reader:
    """Decoded row groups, the last few of them; a shard is verified when its first group is read."""

    def __init__(
        self,
        snapshot: Snapshot | None,
        parts: Collection[str] | None,
        groups: int,
        shard_of: Callable[[str], ShardRef],
    ) -> None:
        self._snapshot, self._parts, self._shard_of = snapshot, parts, shard_of
        self._files = cached_files(open_files(snapshot.uri)) if snapshot else None
        self._limit = groups
        self._groups: OrderedDict[tuple[int, int], list[StoredSequence]] = OrderedDict()
        self._shards: OrderedDict[int, ShardReader] = OrderedDict()

    def group(self, block: int, group: int) -> list[StoredSequence]:
        key = (block, group)
        if key not in self._groups:
            self._groups[key] = self._shard(block).read_group(group)
            while len(self._groups) > self._limit:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def where(self, block: int) -> str:
        """The shard's path, for messages."""
        return self._shard(block).where

    def _shard(self, block: int) -> ShardReader:
        assert self._snapshot is not None
        assert self._files is not None
        if block not in self._shards:
            ref = self._shard_of(self._snapshot.units[block].id)
            self._shards[block] = ShardReader(self._files, ref, self._snapshot.identity, parts=self._parts)
            while len(self._shards) > LANES:
                self._shards.popitem(last=False)
        self._shards.move_to_end(block)
        return self._shards[block]


def _place(index: ManifestIndex, manifest: Manifest, snapshot: Snapshot | None, entries: NDArray[np.int64]) -> _Placed:
    """Find every row's sequence: in the snapshot's units, or in the manifest's own row groups."""
    total = len(index.sequences)
    if snapshot is None:
        block = np.empty(total, dtype=np.int64)
        row = np.empty(total, dtype=np.int64)
        for number, group in enumerate(manifest.groups()):
            block[group.start : group.stop] = number
            row[group.start : group.stop] = np.arange(len(group))
        return _Placed(block, np.zeros(total, dtype=np.int64), row)
    where = _Where.of(snapshot)
    found, at = where.find(index.sequences)
    missing = entries[~found[entries]]
    if len(missing):
        raise StoreError(
            f"store {snapshot.uri} lacks {len(missing):,} of the {len(entries):,} sequences of {manifest.path}, "
            f"the first is {index.sequences[missing[0]].decode()}: run `stillroom teach` on this recipe first"
        )
    return _Placed(where.block[at], where.group[at], where.row[at])


@dataclass(frozen=True)
class _Where:
    """Every sequence of a snapshot, sorted by digest."""

    digests: NDArray[np.bytes_]
    block: NDArray[np.int64]
    group: NDArray[np.int64]
    row: NDArray[np.int64]

    @staticmethod
    def of(snapshot: Snapshot) -> "_Where":
        digests: list[str] = []
        block: list[int] = []
        group: list[int] = []
        row: list[int] = []
        for number, unit in enumerate(snapshot.units):
            digests += unit.sequences
            block += [number] * len(unit.sequences)
            for place, members in enumerate(row_groups(unit.rows, snapshot.identity.signal)):
                group += [place] * len(members)
                row += range(len(members))
        names = np.array(digests, dtype="S32")
        order = np.argsort(names, kind="stable")
        return _Where(names[order], np.array(block)[order], np.array(group)[order], np.array(row)[order])

    def find(self, digests: NDArray[np.bytes_]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """(found, place) of each digest."""
        if not len(self.digests):
            return np.zeros(len(digests), dtype=bool), np.zeros(len(digests), dtype=np.int64)
        at = np.minimum(np.searchsorted(self.digests, digests), len(self.digests) - 1)
        return self.digests[at] == digests, at.astype(np.int64)


def _blocks(
    index: ManifestIndex, placed: _Placed, snapshot: Snapshot | None, entries: NDArray[np.int64]
) -> list[Block]:
    """One block per unit that the split reads, its entries in the manifest's order."""
    block_of = placed.block[entries]
    order = np.argsort(block_of, kind="stable")
    numbers, starts = np.unique(block_of[order], return_index=True)
    keys = digest_keys([index.sequences[e].decode() for e in entries])
    blocks = []
    for number, part in zip(numbers, np.split(order, starts[1:]), strict=True):
        if snapshot is not None:
            name = snapshot.units[number].id
        else:
            name = digest128(b"stillroom.rows.1", *(index.sequences[e] for e in entries[part]))
        blocks.append(
            Block(
                name,
                part,
                placed.group[entries[part]],
                index.tokens[entries[part]].astype(np.int64),
                keys[part],
            )
        )
    return blocks
