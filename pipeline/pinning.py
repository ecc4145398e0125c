"""Pinning: which shards a student trains on, fixed in its folder before it starts.

Enters: a recipe, its corpus and store. Leaves: `snapshot.parquet` and `pinned.json` in the student's folder, for
losses.signal topk+truth the tail's shares too, and a pin in the store. Costs: 40 bytes a sequence.

Where teachers still write, the snapshot is open: all planned units are in it, and a `Follower` tells the student of
their shards as the log gets them. It is completed when the last one is there, and is then the snapshot that a run after
all teaching would have pinned.
"""

import json
from collections.abc import Collection
from pathlib import Path

from stillroom.pipeline.fidelity import require_described, require_supported, sample_digest, tail_shares_of
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.student.bindings import RESULT
from stillroom.pipeline.student.config import StudentConfig
from stillroom.storage.arrivals import ArrivalsWriter, arrivals_path
from stillroom.storage.care.pins import pin
from stillroom.storage.errors import StoreError, UnsupportedSignal
from stillroom.storage.fidelity.shares import shares_path, write_shares
from stillroom.storage.files import LocalFiles, open_files
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import IDENTITY, Store, open_store

SNAPSHOT, NOTE = "snapshot.parquet", "pinned.json"
SAMPLE = "fidelity_sample"  # of the note


def pinned(recipe: Recipe, student: StudentConfig, manifest: Manifest, folder: Path) -> Path | None:
    """The snapshot that this student trains on: the one it began with, unless the corpus has changed since. None for
    a student of hard labels that began where there was no store.

    Raises IdentityMismatch for a store that the recipe does not describe, StoreError if it lacks a part of the corpus,
    UnsupportedSignal: nothing is pinned then.
    """
    path, files = folder / SNAPSHOT, open_files(recipe.store.path)
    stated = {"manifest": manifest.digest, "store": files.uri}
    held = _note(folder)
    unchecked = student.taught and not (folder / RESULT).exists()
    store = open_store(recipe.store.path) if files.exists(IDENTITY) else None
    if unchecked and store:
        require_described(recipe, store)
    if _says(held, stated, signal=True) and path.exists():
        follower = Follower(store, path) if store and Snapshot.read(path).open else None
        if follower is not None and follower.look():
            raise _lacking(files.uri, follower.missing, manifest)
        if unchecked and store:
            require_supported(recipe, student, store)
        if store:
            _keep_shares(student, store, path, held)
        if follower is not None:
            follower.complete()
        return path
    if not student.taught and (_says(held, stated, signal=False) or not files.exists(IDENTITY)):
        LocalFiles(folder).write(NOTE, json.dumps(stated | {"signal": False}).encode())
        return None
    store = store or open_store(recipe.store.path)
    digests = _digests(manifest)
    snapshot: Snapshot = store.snapshot(digests)
    lacking = len(digests.difference(*(u.sequences for u in snapshot.units)))
    if lacking:
        raise StoreError(
            f"store {files.uri} lacks {lacking:,} of the corpus's {len(digests):,} sequences: run `stillroom teach` on "
            "this recipe first"
        )
    if unchecked:
        require_supported(recipe, student, store)  # a student that is refused must not hold on to shards
        stated |= _keep_shares(student, store, path)
    _write(store, snapshot, folder, stated)
    return path


def pin_open(
    recipe: Recipe, student: StudentConfig, manifest: Manifest, folder: Path, store: Store, pending: Collection[str]
) -> Path | None:
    """As `pinned`, where the units `pending` of the corpus are planned and not scored yet. The student's fidelity is
    checked when they are, as the sample is spread over them."""
    if student.distils and student.losses.signal == "topk+truth":
        raise UnsupportedSignal(
            f"student {student.name}: losses.signal topk+truth needs the whole fidelity sample, which is there when "
            "all units are: set train.read_through to false, or losses.signal to topk"
        )
    path = folder / SNAPSHOT
    stated = {"manifest": manifest.digest, "store": store.files.uri}
    held = _note(folder)
    require_described(recipe, store)
    if _says(held, stated, signal=True) and path.exists():
        if Snapshot.read(path).open:
            Follower(store, path)  # raises where its units will never come
        return path
    if not student.taught and _says(held, stated, signal=False):
        return None
    snapshot = store.snapshot(_digests(manifest), pending=pending)
    arrivals_path(path).unlink(missing_ok=True)
    _write(store, snapshot, folder, stated)
    return path


def to_be_pinned(student: StudentConfig, manifest: Manifest, folder: Path, store: Store) -> Snapshot | None:
    """What `pinned` gives where the store holds all of the corpus. Writes nothing."""
    stated = {"manifest": manifest.digest, "store": store.files.uri}
    held, path = _note(folder), folder / SNAPSHOT
    if _says(held, stated, signal=True) and path.exists():
        return Snapshot.read(path)
    if not student.taught and _says(held, stated, signal=False):
        return None
    found: Snapshot = store.snapshot(_digests(manifest))
    return found


class Follower:
    """Tells a student on an open snapshot what the log gets.

    missing: ids of the units that have no shard yet, in plan order.
    Raises StoreError if the store is another one by now, or plans other units.
    """

    def __init__(self, store: Store, path: Path) -> None:
        self._store, self._path = store, path
        self._snapshot = Snapshot.read(path)
        self._told = ArrivalsWriter(arrivals_path(path))
        self.units = len(self._snapshot.units)
        held = self._snapshot.refs.keys() | self._told.refs.keys()
        self.missing = [unit.id for unit in self._snapshot.units if unit.id not in held]
        planned = set(store.planned().ids.astype(str).tolist())
        if self._snapshot.identity.id != store.identity.id or not planned.issuperset(self.missing):
            raise StoreError(
                f"store {store.uri} is not the one on which {path} was begun, or plans other units: put it back, or "
                f"remove {path.parent} to train this student anew"
            )

    def look(self) -> int:
        """Tell what is new; how many units are missing still."""
        refs = self._store.committed() if self.missing else {}
        self._told.tell(refs[unit] for unit in self.missing if unit in refs)
        self.missing = [unit for unit in self.missing if unit not in refs]
        return len(self.missing)

    def complete(self) -> None:
        """Write the snapshot as it is now that nothing is missing."""
        refs = {**self._snapshot.refs, **self._told.refs}
        units = self._snapshot.units
        whole = Snapshot(self._snapshot.uri, self._snapshot.identity, units, {u.id: refs[u.id] for u in units})
        pin(self._store.files, whole, self._path)
        whole.write(self._path)


def _write(store: Store, snapshot: Snapshot, folder: Path, stated: dict[str, str]) -> None:
    path = folder / SNAPSHOT
    pin(store.files, snapshot, path)  # before the snapshot is there: `stillroom gc` must not come between
    snapshot.write(path)
    LocalFiles(folder).write(NOTE, json.dumps(stated | {"signal": True}).encode())


def _keep_shares(
    student: StudentConfig, store: Store, snapshot: Path, held: dict[str, object] | None = None
) -> dict[str, str]:
    """The tail's shares beside the snapshot, where the student reads them; what the note says of them.

    held: the note of a student that has begun. It goes on with the shares it began with: a store that grew has another
    sample, of which a lost file cannot be made again. Raises UnsupportedSignal if the store has none, StoreError for
    another sample.
    """
    path = shares_path(snapshot)
    if not (student.distils and student.losses.signal == "topk+truth") or (held is not None and path.exists()):
        return {}
    sample = sample_digest(store)
    if held is not None and held.get(SAMPLE, sample) != sample:
        raise StoreError(
            f"{path} is gone, and store {store.uri} has another fidelity sample than when this student began: put the "
            f"file back, or remove {snapshot.parent} to train it anew"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shares(path, tail_shares_of(store))
    return {SAMPLE: sample}


def _says(held: dict[str, object] | None, stated: dict[str, str], *, signal: bool) -> bool:
    """Whether a student that began with this corpus and store left that note."""
    return held is not None and stated.items() | {("signal", signal)} <= held.items()


def _note(folder: Path) -> dict[str, object] | None:
    note = folder / NOTE
    if not note.exists():
        return None
    held: dict[str, object] = json.loads(note.read_text())
    return held


def _digests(manifest: Manifest) -> set[str]:
    return {s.decode() for s in manifest.index().sequences.tolist()}


def _lacking(uri: str, missing: Collection[str], manifest: Manifest) -> StoreError:
    return StoreError(
        f"store {uri} lacks {len(missing):,} units of the corpus {manifest.path}: run `stillroom teach` on this recipe "
        "first, or set train.read_through to train while it teaches"
    )
