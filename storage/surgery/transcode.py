"""Surgery on stores without their teacher: fewer ids, coarser steps, another layout, fewer parts; merged, or a subset.

Enters: stores of one identity, what is to be different, which sequences are wanted. Leaves: a store of its own, with
the identity that teaching it would have given, and a report of the error added. Costs: one pass over the sources, a
unit's rows before and after in memory; 59,000 tokens/s a core from k = 128 to 32 (packed: 2,800), 99,000 where units
are only cut anew, 790,000 where they are copied.

    source shards ─► columns ─► top-k cut and rounded ─► shard ─► read back, compared ─► commit in batches
                 ├─ parts that stay: the same columns ─┘                                     │
                 └─ unit wanted whole, signal as it was: the same file, byte for byte ───────┘

Sources are only read. The plan is saved before the first shard, so that an interrupted run goes on where it stopped.
"""

import json
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

from stillroom.storage.calibration import FOLDER as SIDE_FILES
from stillroom.storage.calibration import calibration_path, find_head
from stillroom.storage.errors import CorruptShard, IdentityMismatch, StoreError, UsageError
from stillroom.storage.files import Files, LocalFiles, content_digest, open_files, sha256_hex
from stillroom.storage.identity import FORMAT_VERSION, Identity
from stillroom.storage.records import Receipt, ShardRef, Unit
from stillroom.storage.store import IDENTITY, Store, create_store, open_store
from stillroom.storage.surgery.added_error import AddedError
from stillroom.storage.surgery.changes import Changes, changed_signal, logit_error_bound
from stillroom.storage.surgery.columns import Row, SourceShard, write_rows
from stillroom.storage.surgery.plan import (
    Picked,
    Source,
    differing_parts,
    pick,
    pinned,
    plan_units,
    require_mergeable,
    whole_place,
)
from stillroom.storage.surgery.truth import TruthCarrier

#: A list with one report for each run into a store; the run's own is updated with every commit.
REPORTS = "_stillroom/transcode.json"

#: As when teaching: a commit takes about 70 ms, and at most this much work is lost.
COMMIT_INTERVAL_S = 2.0
COMMIT_RECEIPTS = 256

#: Called with tokens done and tokens to do.
Progress = Callable[[int, int], None]


def transcode(
    sources: Seq[str],
    destination: str,
    changes: Changes | None = None,
    *,
    sequences: frozenset[str] | None = None,
    limit_tokens: int | None = None,
    unit_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make, or go on making, the store at `destination` from those at `sources`.

    sequences: digests wanted; None for all. limit_tokens: at most so many tokens of those, by rising digest.
    unit_tokens: cut units anew at this size; None keeps those that are wanted whole.

    Returns the run's report, JSON-able. Raises UsageError where the data do not allow what is asked, IdentityMismatch
    for sources of different identities or a destination of another; StoreFull, StoreError, CorruptShard. What is
    committed by then stays, and the same call goes on from there.
    """
    for name, value in (("limit-tokens", limit_tokens), ("unit-tokens", unit_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1")
    _require_apart(sources, destination)
    opened = [pinned(open_store(uri)) for uri in sources]
    require_mergeable(opened)
    first = opened[0].identity
    signal = changed_signal(first.signal, changes or Changes())
    picked = pick(opened, sequences=sequences, limit_tokens=limit_tokens)
    store = _destination(destination, replace(first, signal=signal, format=FORMAT_VERSION), opened)
    units, held = plan_units(opened, picked, store, unit_tokens=unit_tokens)
    run = _Run(opened, picked, store, units, held, progress)
    return run.go()


def _require_apart(sources: Seq[str], destination: str) -> None:
    """Raises UsageError if the destination is a source, or one lies inside the other."""
    target = open_files(str(destination))
    for uri in sources:
        source = open_files(str(uri))
        one, other = source.uri.rstrip("/"), target.uri.rstrip("/")
        if isinstance(source, LocalFiles) and isinstance(target, LocalFiles):
            one, other = (str(files.root.resolve()) for files in (source, target))
        if one == other or one.startswith(other + "/") or other.startswith(one + "/"):
            raise UsageError(
                f"the destination {destination} is the source {uri} or lies inside it or around it: a source is never "
                "changed, give the result a folder of its own"
            )


def _destination(uri: str, identity: Identity, sources: Seq[Source]) -> Store:
    """The store of the result, founded if it is not there, with the side files that its signal needs.

    Raises IdentityMismatch, before anything is written, if another identity lives there.
    """
    files = open_files(str(uri))
    if files.exists(IDENTITY):
        held = open_store(uri).identity  # its format stays what it is
        differing = differing_parts(held, identity)
        if differing:
            raise IdentityMismatch(
                f"store {files.uri} holds other numbers than these sources and changes give "
                f"({'; '.join(differing)}); give the result a folder of its own"
            )
        identity = held
    for source in sources if identity.signal.hidden is not None else ():
        _copy_side_files(source.store, files)
    return create_store(uri, identity)


def _copy_side_files(source: Store, files: Files) -> None:
    """What hidden states cannot be read without: the calibration, and the output head of these weights.

    Before the store is founded: a store whose identity stands has them. Raises StoreError, CorruptShard.
    """
    hidden = source.identity.signal.hidden
    assert hidden is not None
    names = [find_head(source.files)]
    if hidden.calibration is not None:
        names.append(calibration_path(hidden.calibration))
    held = [name for name in files.list(SIDE_FILES) if name.startswith(f"{SIDE_FILES}/head-")]
    if held and held != names[:1]:
        raise StoreError(
            f"{source.uri} has the output head {names[0]} and {files.uri} has {held[0]}, expected one and the same for "
            f"teachers of one identity; run `stillroom verify` on both"
        )
    for name in names:
        if not files.exists(name):
            _copy(source, name, files.write)


def _copy(source: Store, name: str, write: Callable[[str, memoryview], None]) -> int:
    """A file whose name states its digest, byte for byte; returns its size. Raises CorruptShard if it is not that."""
    data = memoryview(source.files.open(name).read_buffer())
    if sha256_hex(data) != content_digest(name):
        raise CorruptShard(f"{source.uri}/{name} does not have the sha256 that its name states: put back a copy of it")
    write(name, data)
    return data.nbytes


@dataclass
class _Run:
    """One run: units in, shards and a report out."""

    sources: Seq[Source]
    picked: Picked
    store: Store
    units: list[Unit]
    held: int
    progress: Progress | None
    copied: int = 0
    encoded: int = 0
    tokens: int = 0
    rows: int = 0
    written: int = 0
    bytes_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.reports = _read_reports(self.store)
        self.truth = TruthCarrier(self.sources, self.picked, self.store)
        self.open: tuple[tuple[int, str], SourceShard] | None = None
        encoded = [u for u in self.units if not self._stays(u)]
        self.error = AddedError(self.store.identity.vocabulary, sum(sum(u.rows) for u in encoded))
        self.waiting: list[Receipt] = []
        self.committed_s = time.monotonic()

    def go(self) -> dict[str, Any]:
        total = sum(sum(u.tokens) for u in self.units)
        try:
            for unit in self.units:
                self._add(self._copied(unit) if self._stays(unit) else self._encoded(unit))
                if self.progress:
                    self.progress(self.tokens, total)
        finally:
            self._commit()  # also on Ctrl-C: what has been written is not to be written again
        return self.report()

    def _add(self, receipt: Receipt) -> None:
        self.waiting.append(receipt)
        self.tokens += receipt.tokens
        self.rows += receipt.rows
        self.written += receipt.shard.size_bytes
        due = time.monotonic() - self.committed_s >= COMMIT_INTERVAL_S
        if due or len(self.waiting) >= COMMIT_RECEIPTS:
            self._commit()

    def _commit(self) -> None:
        if self.waiting:
            self.store.commit(self.waiting)
            self.waiting = []
            text = json.dumps([*self.reports, self.report()], indent=2)
            self.store.files.write(REPORTS, (text + "\n").encode())
        self.committed_s = time.monotonic()

    # A unit that stays what it is

    def _stays(self, unit: Unit) -> bool:
        """Its shard can be copied: same unit, same signal, same format."""
        place = whole_place(self.picked, unit)
        return place is not None and self.sources[place.source].identity.id == self.store.identity.id

    def _copied(self, unit: Unit) -> Receipt:
        started = time.perf_counter()
        source = self.sources[self.picked.places[unit.sequences[0]].source]
        ref = source.ref(unit.id)
        source.store.reader(ref)  # what cannot be read is not copied
        _copy(source.store, ref.path, self.store.files.write)
        self.truth.carry(unit)
        self.copied += 1
        self.bytes_before += ref.size_bytes
        return _receipt(ref, unit, started)

    # A unit that is written anew

    def _encoded(self, unit: Unit) -> Receipt:
        started = time.perf_counter()
        identity = self.store.identity
        rows, provenance = self._read(unit)
        try:
            ref = write_rows(self.store, unit, rows, provenance)
        except ValueError as error:
            raise StoreError(f"unit {unit.id} cannot be written as {identity.signal.in_words()}: {error}") from error
        reader = self.store.reader(ref)
        if rows[0].before is not None:
            for row, stored in zip(rows, reader, strict=True):
                assert row.before is not None
                assert stored.signal is not None
                assert stored.signal.topk is not None
                self.error.add(row.before, stored.signal.topk, f"{self.store.uri}/{ref.path}")
        self.truth.carry(unit)
        self.encoded += 1
        return _receipt(ref, unit, started)

    def _read(self, unit: Unit) -> tuple[list[Row], dict[str, Any]]:
        """The unit's sequences in its order, and the provenance of its shard."""
        needed: dict[tuple[int, str], set[str]] = {}
        for digest in unit.sequences:
            place = self.picked.places[digest]
            needed.setdefault((place.source, place.unit), set()).add(digest)
        found: dict[str, Row] = {}
        provenances: list[Any] = []
        for key, digests in needed.items():
            shard = self._shard(key)
            found.update(shard.rows(digests, self.store.identity))
            if shard.provenance not in provenances:
                provenances.append(shard.provenance)
            unit_read = self.sources[key[0]].units[key[1]]
            tokens = sum(t for s, t in zip(unit_read.sequences, unit_read.tokens, strict=True) if s in digests)
            self.bytes_before += shard.ref.size_bytes * tokens / sum(unit_read.tokens)
        described = {
            "from": sorted({self.sources[number].identity.id for number, _ in needed}),
            "signal": self.sources[0].identity.signal.in_words(),
            "units": [name for _, name in needed],
        }
        provenance = {"transcoded": described, "source": provenances[0] if len(provenances) == 1 else provenances}
        return [found[digest] for digest in unit.sequences], provenance

    def _shard(self, key: tuple[int, str]) -> SourceShard:
        """The shard read last stays open: what is cut in pieces is hashed once."""
        if self.open is None or self.open[0] != key:
            self.open = key, SourceShard(self.sources[key[0]], key[1])
        return self.open[1]

    def report(self) -> dict[str, Any]:
        """Of this run, so far."""
        old, new = self.sources[0].identity.signal, self.store.identity.signal
        seconds = time.perf_counter() - self.started
        return {
            "store": self.store.uri,
            "identity": self.store.identity.id,
            "signal": new.in_words(),
            "sources": [
                {
                    "store": source.uri,
                    "identity": source.identity.id,
                    "signal": source.identity.signal.in_words(),
                    "sequences": count,
                    "sequences_duplicate": duplicate,
                }
                for source, count, duplicate in zip(
                    self.sources, self.picked.counts, self.picked.duplicates, strict=True
                )
            ],
            "sequences": len(self.picked.places),
            "sequences_held_before": self.held,
            "sequences_missing": self.picked.missing,
            "units_copied": self.copied,
            "units_encoded": self.encoded,
            "tokens": self.tokens,
            "rows": self.rows,
            "truth_positions": self.truth.positions,
            "bytes_written": self.written,
            "bytes_per_token_before": round(self.bytes_before / self.tokens, 2) if self.tokens else None,
            "bytes_per_token_after": round(self.written / self.tokens, 2) if self.tokens else None,
            "logit_error_bound_nats": logit_error_bound(old.topk, new.topk) if old.topk and new.topk else None,
            **self.error.as_dict(),
            "wall_s": round(seconds, 2),
            "tokens_per_s": round(self.tokens / seconds, 1),
        }


def _receipt(ref: ShardRef, unit: Unit, started: float) -> Receipt:
    seconds = time.perf_counter() - started
    return Receipt(ref, len(unit.sequences), sum(unit.tokens), sum(unit.rows), batches=0, seconds=seconds)


def _read_reports(store: Store) -> list[Any]:
    """Of the runs before. Raises StoreError if the file is damaged: it would be overwritten."""
    if not store.files.exists(REPORTS):
        return []
    try:
        reports = json.loads(store.files.read(REPORTS))
        if not isinstance(reports, list):
            raise ValueError("it is no list")
    except ValueError as error:
        raise StoreError(f"{store.uri}/{REPORTS} is damaged ({error}): put back a copy of it, or delete it") from error
    return reports
