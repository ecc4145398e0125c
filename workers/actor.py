"""A teacher in a Ray actor: unit → score → encode → shard → receipt. The one file that imports ray.

Enters: a `TeacherSpec`, the identity of the store and its URI; then units with their sequences. Leaves: shards in the
store's folder, and receipts; no signal travels through Ray. Costs: a teacher's memory per actor; it writes, and
commits nothing: that is the driver's.
"""

import time
from collections.abc import Sequence as Seq
from typing import Any

import ray

from stillroom.storage.errors import BadLogits, IdentityMismatch
from stillroom.storage.files import open_files
from stillroom.storage.identity import Identity
from stillroom.storage.records import Receipt, Sequence, Unit
from stillroom.storage.shard import write_shard
from stillroom.workers.teacher import Teacher, TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher


class TeacherActor:
    """Scores units one at a time. A plain class: `remote_actor` makes it an actor.

    The teacher is loaded by the first call, not by the constructor: what a Ray actor's constructor raises comes to
    the driver as a dead actor, what a method raises as itself.
    """

    def __init__(self, spec: TeacherSpec, identity: Identity, store: str) -> None:
        self._spec, self._identity, self._store = spec, identity, store
        self._loaded: Teacher | None = None

    def ready(self) -> dict[str, Any]:
        """Load the teacher; returns what shifts its rows within the noise band.

        Raises TeacherError if it cannot be loaded, IdentityMismatch if it is not the one of the store: another node's
        folder may hold other weights under the same name.
        """
        return self._teacher().provenance([])

    def _teacher(self) -> Teacher:
        if self._loaded is None:
            teacher = TorchTeacher(self._spec)
            self._require_identity(teacher.identity_parts())
            self._loaded = teacher
        return self._loaded

    def _require_identity(self, parts: dict[str, Any]) -> None:
        found = Identity(teacher=self._identity.teacher, signal=self._identity.signal, **parts).parts()
        asked = self._identity.parts()
        differing = [f"{key}: store {asked[key]}, loaded {found[key]}" for key in asked if asked[key] != found[key]]
        if differing:
            raise IdentityMismatch(
                f"the teacher in {self._spec.folder} is not the one of store {self._store} ({'; '.join(differing)}). "
                "Every node must hold the same model folder: copy it anew, or put it on shared storage."
            )

    def score_unit(self, unit: Unit, sequences: Seq[Sequence]) -> Receipt:
        """Score a unit and write its shard. Doing it twice on the same machine gives the same file.

        sequences: the unit's, in its order. Raises what `ready` raises, BadLogits naming the unit and its sequences,
            StoreFull, StoreError.
        """
        teacher = self._teacher()
        started = time.perf_counter()
        try:
            blocks = teacher.score(sequences, k=self._identity.signal.k)
        except BadLogits as error:
            raise BadLogits(f"unit {unit.id}: {error}") from error
        provenance = teacher.provenance(sequences)
        shard = write_shard(open_files(self._store), self._identity, unit, sequences, blocks, provenance)
        return Receipt(
            shard=shard,
            sequences=len(sequences),
            tokens=sum(unit.tokens),
            rows=sum(unit.rows),
            batches=len(teacher.batches(sequences)),
            seconds=time.perf_counter() - started,
        )

    def release(self) -> None:
        """Free the device. The driver then ends the process with `ray.kill`; another call would load anew."""
        if self._loaded is not None:
            self._loaded.release()
            self._loaded = None


def remote_actor(**options: Any) -> Any:
    """`TeacherActor` as a Ray actor class: `remote_actor(num_cpus=1).remote(spec, identity, store)`.

    options: of `ray.remote`, e.g. num_cpus, num_gpus, max_restarts, max_task_retries, runtime_env. Ray's own defaults
        are no restarts and no retries.
    """
    return ray.remote(**options)(TeacherActor) if options else ray.remote(TeacherActor)
