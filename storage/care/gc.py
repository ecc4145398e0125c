"""Removes from a store what nobody can need any more.

Enters: a store's URI. Leaves: what was removed, and why; what was spared. Costs: one listing of the store, the log, and
the snapshots of students on this machine; about 300 bytes of memory a file.

Removed, if they have not changed for an hour: shards that the log does not name (their writer was stopped between
writing and committing, or `verify --repair` dropped them), temporary files of killed writers, fidelity samples of units
that are not committed, calibrations that the identity does not name, pins of students whose snapshot is gone.

Spared: what the log names, what a pinned student needs (storage/care/pins.py), and what is younger: a writer may be
about to commit it. Only names that stillroom itself makes are removed; everything else is shown as foreign and left.
The log's own folder is delta-rs's business, and not looked at.
"""

import re
import time
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from stillroom.storage import plans
from stillroom.storage.calibration import calibration_path
from stillroom.storage.care import pins
from stillroom.storage.care.pins import Pin
from stillroom.storage.errors import StoreError
from stillroom.storage.files import GENERATIONS_MARK, FileInfo
from stillroom.storage.generations.store import GenerationStore, open_any
from stillroom.storage.store import IDENTITY, Store

OLDER_THAN_S = 3600.0

#: Foreign files shown by name; beyond that they are counted.
_SHOWN_FOREIGN = 20

_SHARD = re.compile(r"shards/([0-9a-f]{32})-([0-9a-f]{64})\.parquet")
_TRUTH = re.compile(r"_stillroom/truth/([0-9a-f]{32})-[0-9a-f]{64}\.parquet")
_CALIBRATION = re.compile(r"_stillroom/calibration-[0-9a-f]{64}\.parquet")
_TEMPORARY = re.compile(r"(?:shards|_stillroom(?:/[a-z]+)?)/\.[^/]+\.[0-9a-f]{32}\.tmp")
#: What stillroom makes and never removes here: identity, plans, heads, ledgers and what other commands note.
_KEPT = re.compile(
    rf"{re.escape(IDENTITY)}|{re.escape(GENERATIONS_MARK)}|{plans.FOLDER}/[^/]+\.parquet|_delta_log/.*"
    r"|_stillroom/(?:head-[0-9a-f]{64}\.safetensors|(?:transcode|fidelity|progress)\.json|tokens-[0-9a-f]{64}\.parquet)"
    r"|_stillroom/(?:uses|taught)/[^/]+\.json|_stillroom/[a-z_/]*ledger[^/]*"
)


_SPARED = ("kept", "pinned", "foreign")


@dataclass(frozen=True)
class _Needs:
    """What is to be spared: paths and units of the log, live pins by name, the calibration.

    pinned: beginnings of digests, and the names of the pins that need them.
    """

    paths: frozenset[str]
    units: frozenset[str]
    pinned: dict[str, list[str]]
    pins: dict[str, Pin]
    calibration: str | None

    def verdict(self, name: str) -> str:
        """Why a file may go, or one of _SPARED."""
        if shard := _SHARD.fullmatch(name):
            if name in self.paths:
                return "kept"
            return "pinned" if pins.short(shard[2]) in self.pinned else "shard that the log does not name"
        if truth := _TRUTH.fullmatch(name):
            return "kept" if truth[1] in self.units else "fidelity sample of a unit that is not committed"
        if _TEMPORARY.fullmatch(name):
            return "temporary file of a writer that was stopped"
        if _CALIBRATION.fullmatch(name):
            return "kept" if name == self.calibration else "calibration that the identity does not name"
        if pins.is_pin(name):
            return "kept" if name in self.pins else "pin of a student whose snapshot is gone"
        return "kept" if _KEPT.fullmatch(name) else "foreign"

    def pinned_by(self, spared: Seq[FileInfo]) -> list[dict[str, Any]]:
        """Of shards that only pins spare: whose pins these are, and how much each of them keeps."""
        rows: dict[str, dict[str, Any]] = {}
        for info in spared:
            shard = _SHARD.fullmatch(info.name)
            for name in self.pinned[pins.short(shard[2])] if shard else ():
                found = self.pins[name]
                none = {"student": found.path, "host": found.host, "pin": name, "files": 0, "size_bytes": 0}
                row = rows.setdefault(name, none)
                row["files"] += 1
                row["size_bytes"] += info.size_bytes
        return [rows[name] for name in sorted(rows)]


def collect_garbage(
    uri: str, *, older_than_s: float = OLDER_THAN_S, dry_run: bool = False, now_s: float | None = None
) -> dict[str, Any]:
    """Remove, or only list, what is not needed.

    older_than_s: spare what changed less than so many seconds ago, by the disk's or the server's clock. now_s: seconds
    since 1970, default this machine's clock.

    Of a store of any kind. Returns a dictionary with `removed`, a list of {file, size_bytes, why}, what was spared, and
    `pinned_by`: which student's snapshot keeps how many files that no log names; a file may stand with several.
    Raises NoStore if there is none, CorruptShard for a pin that cannot be read, StoreError.
    """
    store = open_any(uri)
    before_s = (time.time() if now_s is None else now_s) - older_than_s
    # The listing first: what is committed after it was made is in the log when that is read.
    infos = sorted(store.files.walk(), key=lambda info: info.name)
    held = dict(pins.load_pins(store.files))
    needs = _needs(store, held, {info.name: info for info in infos}, before_s)
    spared: Counter[str] = Counter()
    removed: list[dict[str, Any]] = []
    foreign: list[str] = []
    pinned: list[FileInfo] = []
    for info in infos:
        verdict = needs.verdict(info.name)
        if verdict in _SPARED or info.modified_s > before_s:
            spared[verdict if verdict in _SPARED else "young"] += 1
            foreign += [info.name] if verdict == "foreign" else []
            pinned += [info] if verdict == "pinned" else []
            continue
        if not dry_run:
            store.files.delete(info.name)
        removed.append({"file": info.name, "size_bytes": info.size_bytes, "why": verdict})
    if not dry_run:
        _require_untouched(store, {line["file"] for line in removed})
    return {
        "store": store.uri,
        "dry_run": dry_run,
        "removed_files": len(removed),
        "freed_bytes": sum(line["size_bytes"] for line in removed),
        "spared_young_files": spared["young"],
        "spared_pinned_files": spared["pinned"],
        "pins": len(needs.pins),
        "pinned_by": needs.pinned_by(pinned),
        "foreign_files": len(foreign),
        "foreign": foreign[:_SHOWN_FOREIGN],
        "removed": removed,
    }


def _require_untouched(store: Store | GenerationStore, removed: set[str]) -> None:
    """Raises StoreError if a writer has committed what was removed: it can have written an old leftover anew, under
    the same name, between our listing and our removing it."""
    lost = sorted(ref.path for ref in store.committed().values() if ref.path in removed)
    if lost:
        stage = "generate" if isinstance(store, GenerationStore) else "teach"
        raise StoreError(
            f"store {store.uri}: {len(lost)} shards were written anew and committed while they were removed as "
            f"leftovers, the first is {lost[0]}: run `stillroom verify {store.uri} --repair`, then `stillroom {stage}` "
            "on the recipe, and `stillroom gc` while nobody writes"
        )


def _needs(store: Store | GenerationStore, held: dict[str, Pin], infos: dict[str, FileInfo], before_s: float) -> _Needs:
    """A young pin is live whatever its file says: it is written before the snapshot is."""
    host = pins.this_host()
    live = {
        name: found
        for name, found in held.items()
        if name not in infos or infos[name].modified_s > before_s or not found.is_over(host)
    }
    pinned: dict[str, list[str]] = {}
    for name, found in live.items():
        for sha256 in found.shards:
            pinned.setdefault(sha256, []).append(name)
    refs = store.committed()
    hidden = store.identity.signal.hidden if isinstance(store, Store) else None
    return _Needs(
        paths=frozenset(ref.path for ref in refs.values()),
        units=frozenset(refs),
        pinned=pinned,
        pins=live,
        calibration=calibration_path(hidden.calibration) if hidden and hidden.calibration else None,
    )
