"""Which sequences a transcoded store gets, from which source, in which units: all of it known before a shard is read.

Enters: open source stores, what is wanted of them, what the destination has. Leaves: `Picked`, then units to write.
Costs: the sources' plans in memory, about 200 bytes a sequence.

Units that are taken whole stay as they are. What is left over of the others is packed, in the sources' order, into
units as large as the largest of the sources, so that a subset of one in a hundred does not become as many shards.
"""

import re
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stillroom.storage.errors import IdentityMismatch, StoreError, UsageError
from stillroom.storage.identity import Identity
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import ShardRef, Unit
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import Store

_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Source:
    """A store that is read, pinned as it was when the run began."""

    store: Store
    snapshot: Snapshot

    @property
    def uri(self) -> str:
        return self.store.uri

    @property
    def identity(self) -> Identity:
        return self.store.identity

    @cached_property
    def units(self) -> dict[str, Unit]:
        """Committed units by id, oldest plan first."""
        return {unit.id: unit for unit in self.snapshot.units}

    def ref(self, unit: str) -> ShardRef:
        return self.snapshot.refs[unit]


@dataclass(frozen=True)
class Place:
    """Where a sequence is read: the source's number and the unit's id there; T and context."""

    source: int
    unit: str
    tokens: int
    context: int


@dataclass(frozen=True)
class Picked:
    """What a run is about.

    places: by sequence digest, in the sources' order. counts, duplicates: sequences of each source, and those of them
    that an earlier source (or an earlier unit) has already. missing: asked for and in none.
    """

    places: dict[str, Place]
    counts: tuple[int, ...]
    duplicates: tuple[int, ...]
    missing: int


def pinned(store: Store) -> Source:
    """Raises StoreError if nothing is committed."""
    source = Source(store, store.snapshot())
    if not source.units:
        raise StoreError(f"store {store.uri} has nothing committed: there is nothing to transcode")
    return source


def require_mergeable(sources: Seq[Source]) -> None:
    """Raises IdentityMismatch naming the parts in which a source differs from the first."""
    first = sources[0]
    for other in sources[1:]:
        differing = differing_parts(first.identity, other.identity)
        if differing:
            raise IdentityMismatch(
                f"{first.uri} and {other.uri} are not of one identity and cannot be merged ({'; '.join(differing)}); "
                "where only the signal differs, transcode each to the one that both can give, then merge those"
            )


def differing_parts(one: Identity, other: Identity) -> list[str]:
    """Each part in which two identities differ, in words; the format of their files is none."""
    parts, others = one.parts(), other.parts()
    found = [
        f"{key}: {parts[key]} against {others[key]}" for key in parts if key != "signal" and parts[key] != others[key]
    ]
    if one.signal != other.signal:
        words = one.signal.in_words(), other.signal.in_words()
        if words[0] == words[1]:  # such as another calibration vector
            words = str(one.signal.as_dict()), str(other.signal.as_dict())
        found.append(f"signal: {words[0]} against {words[1]}")
    return found


def read_sequences(path: Path) -> frozenset[str]:
    """Digests that a file names: one a line, or all of a corpus manifest (`.parquet`).

    Raises UsageError naming the line that is none; StoreError, CorruptShard, FormatMismatch for a manifest.
    """
    if path.suffix == ".parquet":
        return frozenset(digest.decode() for digest in Manifest.open(path).index().sequences.tolist())
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"sequences cannot be read from {path}: {' '.join(str(error).split())}") from error
    named = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    for number, line in named.items():
        if not _DIGEST.fullmatch(line):
            raise UsageError(
                f"{path}:{number}: {line[:40]!r} is no sequence digest, expected 32 hex digits a line "
                "(or a corpus manifest, whose name ends in .parquet)"
            )
    return frozenset(named.values())


def pick(sources: Seq[Source], *, sequences: frozenset[str] | None, limit_tokens: int | None) -> Picked:
    """Every sequence once, from the first source that has it; only those named, if any are.

    limit_tokens: the most tokens in all, taken by rising digest: a shuffle, the same whatever the sources' order.
    Raises UsageError if nothing is left.
    """
    places: dict[str, Place] = {}
    counts, duplicates = [0] * len(sources), [0] * len(sources)
    for number, source in enumerate(sources):
        for unit in source.units.values():
            for digest, tokens, context in zip(unit.sequences, unit.tokens, unit.contexts, strict=True):
                counts[number] += 1
                if digest in places:
                    duplicates[number] += 1
                elif sequences is None or digest in sequences:
                    places[digest] = Place(number, unit.id, tokens, context)
    missing = len(sequences - places.keys()) if sequences is not None else 0
    limited = 0
    if limit_tokens is not None and places:
        limited = places[min(places)].tokens
        places = _limited(places, limit_tokens)
    if not places:
        problem = (
            "none of the sequences named is there"
            if not limited
            else f"limit-tokens {limit_tokens} is below the first sequence's {limited:,} tokens"
        )
        raise UsageError(f"nothing of {', '.join(source.uri for source in sources)} is wanted: {problem}")
    return Picked(places, tuple(counts), tuple(duplicates), missing)


def _limited(places: dict[str, Place], limit_tokens: int) -> dict[str, Place]:
    """The longest prefix by digest that holds at most so many tokens, in the order given."""
    held, kept = 0, set()
    for digest in sorted(places):
        held += places[digest].tokens
        if held > limit_tokens:
            break
        kept.add(digest)
    return {digest: place for digest, place in places.items() if digest in kept}


def plan_units(
    sources: Seq[Source], picked: Picked, destination: Store, *, unit_tokens: int | None
) -> tuple[list[Unit], int]:
    """Units to write, and how many of the wanted sequences the destination holds already; what is new is saved there.

    Units that an earlier plan holds are followed as they are, as when teaching: an interrupted run goes on with them.
    unit_tokens: cut all units anew at so many tokens; None keeps those that are wanted whole.
    """
    committed = destination.committed()
    covered: set[str] = set()
    planned = {unit.id: unit for unit in destination.planned()}
    for unit in planned.values():
        if unit.id in committed:
            covered.update(unit.sequences)
    held = len(covered & picked.places.keys())
    pending = []
    for unit in planned.values():
        if unit.id not in committed and all(s in picked.places and s not in covered for s in unit.sequences):
            pending.append(unit)
            covered.update(unit.sequences)
    fresh = list(_fresh_units(sources, picked, covered, unit_tokens))
    if fresh:
        destination.save_plan(fresh)
    return [*pending, *fresh], held


def _fresh_units(sources: Seq[Source], picked: Picked, covered: set[str], unit_tokens: int | None) -> Iterator[Unit]:
    budget = unit_tokens or max(sum(u.tokens) for source in sources for u in source.units.values())
    members: list[str] = []
    held = 0
    for number, source in enumerate(sources):
        for unit in source.units.values():
            mine = [s for s in unit.sequences if s not in covered and _is_of(picked, s, number, unit)]
            if unit_tokens is None and len(mine) == len(unit.sequences):
                yield unit
                continue
            for digest in mine:
                tokens = picked.places[digest].tokens
                if members and held + tokens > budget:
                    yield _unit(picked, members)
                    members, held = [], 0
                members.append(digest)
                held += tokens
    if members:
        yield _unit(picked, members)


def _is_of(picked: Picked, digest: str, source: int, unit: Unit) -> bool:
    place = picked.places.get(digest)
    return place is not None and (place.source, place.unit) == (source, unit.id)


def _unit(picked: Picked, members: Iterable[str]) -> Unit:
    members = tuple(members)
    places = [picked.places[m] for m in members]
    return Unit(members, tuple(p.tokens for p in places), tuple(p.context for p in places))


def whole_place(picked: Picked, unit: Unit) -> Place | None:
    """Where the very same unit lies in a source, if all its sequences are read from there."""
    places = {(p.source, p.unit): p for p in (picked.places[s] for s in unit.sequences)}
    place = next(iter(places.values()))
    return place if len(places) == 1 and place.unit == unit.id else None
