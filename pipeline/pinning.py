"""Pinning: which shards a student trains on, fixed in its folder before it starts.

Enters: a recipe, its corpus and store. Leaves: `snapshot.parquet` and `pinned.json` in the student's folder, and a pin
in the store. Costs: 40 bytes a sequence.

Where teachers still write, the snapshot is open: all planned units are in it, and a `Follower` tells the student of
their shards as the log gets them. It is completed when the last one is there, and is then the snapshot that a run after
all teaching would have pinned.
"""

import json
from collections.abc import Collection
from pathlib import Path

from stillroom.pipeline.fidelity import require_described, require_supported
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.student.bindings import RESULT
from stillroom.pipeline.student.config import StudentConfig
from stillroom.storage.arrivals import ArrivalsWriter, arrivals_path
from stillroom.storage.care.pins import pin
from stillroom.storage.errors import StoreError
from stillroom.storage.files import Files, LocalFiles, open_files
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import IDENTITY, Store, open_store

SNAPSHOT, NOTE = "snapshot.parquet", "pinned.json"


def pinned(recipe: Recipe, student: StudentConfig, manifest: Manifest, folder: Path) -> Path | None:
    """The snapshot that this student trains on: the one it began with, unless the corpus has changed since, or another
    teacher's store lies in that place. None for a student of hard labels that began where there was no store.

    Raises IdentityMismatch for a store that the recipe does not describe, StoreError if it lacks a part of the corpus,
    UnsupportedSignal: nothing is pinned then.
    """
    path, files = folder / SNAPSHOT, open_files(recipe.store.path)
    stated = _stated(manifest, files)
    unchecked = student.taught and not (folder / RESULT).exists()
    store = open_store(recipe.store.path) if files.exists(IDENTITY) else None
    if unchecked and store:
        require_described(recipe, store)
    begun = _begun_on(folder, stated, store)
    if begun is not None:
        follower = Follower(store, path) if store and begun.open else None
        if follower is not None and follower.look():
            raise _lacking(files.uri, follower.missing, manifest)
        if unchecked and store:
            require_supported(recipe, student, store)
        if follower is not None:
            follower.complete()
        return path
    if not student.taught and (_says(folder, stated, signal=False) or store is None):
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
    _write(store, snapshot, folder, stated)
    return path


def pin_open(
    recipe: Recipe, student: StudentConfig, manifest: Manifest, folder: Path, store: Store, pending: Collection[str]
) -> Path | None:
    """As `pinned`, where the units `pending` of the corpus are planned and not scored yet. The student's fidelity is
    checked when they are, as the sample is spread over them."""
    path = folder / SNAPSHOT
    stated = _stated(manifest, store.files)
    require_described(recipe, store)
    begun = _begun_on(folder, stated, store)
    if begun is not None:
        if begun.open:
            Follower(store, path)  # raises where its units will never come
        return path
    if not student.taught and _says(folder, stated, signal=False):
        return None
    _write(store, store.snapshot(_digests(manifest), pending=pending), folder, stated)
    return path


def to_be_pinned(student: StudentConfig, manifest: Manifest, folder: Path, store: Store) -> Snapshot | None:
    """What `pinned` gives where the store holds all of the corpus. Writes nothing."""
    stated = _stated(manifest, store.files)
    begun = _begun_on(folder, stated, store)
    if begun is not None or (not student.taught and _says(folder, stated, signal=False)):
        return begun
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
    arrivals_path(path).unlink(missing_ok=True)  # of what was pinned before
    pin(store.files, snapshot, path)  # before the snapshot is there: `stillroom gc` must not come between
    snapshot.write(path)
    LocalFiles(folder).write(NOTE, json.dumps(stated | {"signal": True}).encode())


def _stated(manifest: Manifest, files: Files) -> dict[str, str]:
    """What a student's note says of corpus and store."""
    return {"manifest": manifest.digest, "store": files.uri}


def _begun_on(folder: Path, stated: dict[str, str], store: Store | None) -> Snapshot | None:
    """The snapshot that the student of this folder began with, on this corpus and this store. None: it has not begun,
    or the store that lies there now is of another teacher or signal. One that is out of reach is taken for the same."""
    path = folder / SNAPSHOT
    if not (_says(folder, stated, signal=True) and path.exists()):
        return None
    snapshot = Snapshot.read(path)
    return snapshot if store is None or snapshot.identity.id == store.identity.id else None


def _says(folder: Path, stated: dict[str, str], *, signal: bool) -> bool:
    """Whether the student of this folder left that note."""
    note = folder / NOTE
    return note.exists() and stated.items() | {("signal", signal)} <= json.loads(note.read_text()).items()


def _digests(manifest: Manifest) -> set[str]:
    return {s.decode() for s in manifest.index().sequences.tolist()}


def _lacking(uri: str, missing: Collection[str], manifest: Manifest) -> StoreError:
    return StoreError(
        f"store {uri} lacks {len(missing):,} units of the corpus {manifest.path}: run `stillroom teach` on this recipe "
        "first, or set train.read_through to train while it teaches"
    )
