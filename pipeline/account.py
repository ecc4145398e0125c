"""What a run enters in its store's account (storage/catalog/uses.py): what teaching took, and who learned from it.

Enters: receipts as they are committed; a trained student. Leaves: one small file in the store for each teaching run and
each student. Costs: one small write at each commit, and one when a student is done.
"""

import json
import time
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

from stillroom.pipeline.console import Console
from stillroom.pipeline.student.bindings import RESULT, read_result
from stillroom.pipeline.student.config import StudentConfig, StudentJob, teaching_part
from stillroom.storage.catalog.uses import TaughtRun, Use, has_use, record_taught, record_use, utc_now, utc_of
from stillroom.storage.errors import StillroomError
from stillroom.storage.files import Files, open_files
from stillroom.storage.identity import Identity
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Receipt, SignalSpec, digest128
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import IDENTITY


class TeachingAccount:
    """One teaching run's entry. It is written at each commit, so that a killed run is accounted for as well.

    Make it before the actors start: the time that loading takes is theirs too. clock: seconds.
    """

    def __init__(self, files: Files, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._run, self._clock = files, run, clock
        self._key, self._began = uuid4().hex, clock()
        self._receipts = self._sequences = self._tokens = self._actors = 0
        self._seconds, self._device = 0.0, "unknown"

    def start(self, actors: list[dict[str, Any]]) -> None:
        """actors: what each said of itself when it was ready (`TeacherActor.ready`)."""
        self._actors = len(actors)
        self._device = ", ".join(sorted({str(actor.get("device", "unknown")) for actor in actors})) or "unknown"

    def add(self, receipts: Iterable[Receipt]) -> None:
        """Of a commit. Units that another writer had committed count as well: they were worked for. Raises StoreFull,
        StoreError."""
        for receipt in receipts:
            self._receipts += 1
            self._sequences += receipt.sequences
            self._tokens += receipt.tokens
            self._seconds += receipt.seconds
        held = TaughtRun(
            run=self._run,
            finished_at=utc_now(),
            units=self._receipts,
            sequences=self._sequences,
            tokens=self._tokens,
            actor_seconds=round(self._seconds, 3),
            wall_s=round(self._clock() - self._began, 3),
            actors=max(self._actors, 1),
            device=self._device,
        )
        record_taught(self._files, self._key, held)


def enter_use(store: str, run: str, job: StudentJob, console: Console) -> bool:
    """Enter a trained student in the account of the store that taught it; whether there was something to enter.

    store: its URI. run: the recipe's name. Called again, also after the run's folder was moved, it does nothing: the
    key is the digest of what the result says of the training. A student of hard labels used no teacher. A store that
    cannot be written, such as one for which there are only a reader's keys, costs a notice and not the student.
    """
    if job.snapshot is None or not job.student.taught:
        return False
    path = job.run_dir / RESULT
    try:
        result = read_result(path)
        # Exported again in another type it is the same training; without that field these are the bytes as written.
        training = {name: value for name, value in result.items() if name != "export_dtype"}
        key = digest128(b"stillroom.use.1", (json.dumps(training, indent=2) + "\n").encode())
        files = open_files(store)
        if not files.exists(IDENTITY) or has_use(files, key):
            return False
        snapshot = Snapshot.read(job.snapshot)
        if Identity.from_json(files.read(IDENTITY).decode()).id != snapshot.identity.id:
            return False  # another store lies there by now
        return record_use(files, key, _use(run, job, snapshot, result, utc_of(path.stat().st_mtime)))
    except StillroomError as error:
        console.notice(f"student {job.student.name} is trained, but the store's account does not have it: {error}")
        return False


def _taught_by(student: StudentConfig, signal: SignalSpec) -> str:
    if student.distils:
        return teaching_part(student.losses.signal, signal)
    return " + ".join(sorted({name for features in student.all_features() for name in features.parts()}))


def _use(run: str, job: StudentJob, snapshot: Snapshot, result: dict[str, Any], finished_at: str) -> Use:
    index = Manifest.open(job.manifest).index()
    training = ~index.heldout
    tokens = int(index.tokens[training].sum())
    return Use(
        student=job.student.name,
        run=run,
        finished_at=finished_at,
        signal=_taught_by(job.student, snapshot.identity.signal),
        # Of a schedule the highest.
        temperature=max(job.student.temperatures(), default=1.0),
        sequences=int(training.sum()),
        tokens=result["tokens"],
        trained_positions=result["trained_positions"],
        steps=result["steps"],
        epochs=round(result["tokens"] / tokens, 3) if tokens else None,
    )
