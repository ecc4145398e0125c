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
    """Loads the teacher once and scores units one at a time. A plain class: `remote_actor` makes it an actor.

    Raises TeacherError if the teacher cannot be loaded, IdentityMismatch if it is not the one of the store: another
    node's folder may hold other weights under the same name.
    """

    def __init__(self, spec: TeacherSpec, identity: Identity, store: str) -> None:
        self._identity = identity
        self._files = open_files(store)
        self._teacher: Teacher = TorchTeacher(spec)
        loaded = Identity(teacher=identity.teacher, signal=identity.signal, **self._teacher.identity_parts())
        asked, found = identity.parts(), loaded.parts()
        differing = [f"{key}: store {asked[key]}, loaded {found[key]}" for key in asked if asked[key] != found[key]]
        if differing:
            raise IdentityMismatch(
                f"the teacher in {spec.folder} is not the one of store {store} ({'; '.join(differing)}). "
                "Every node must hold the same model folder: copy it anew, or put it on shared storage."
            )

    def ready(self) -> dict[str, Any]:
        """Returns once the teacher is loaded: what shifts its rows within the noise band."""
        return self._teacher.provenance([])

    def score_unit(self, unit: Unit, sequences: Seq[Sequence]) -> Receipt:
        """Score a unit and write its shard. Doing it twice on the same machine gives the same file.

        sequences: the unit's, in its order. Raises BadLogits naming the unit and its sequences, StoreFull, StoreError.
        """
        started = time.perf_counter()
        try:
            blocks = self._teacher.score(sequences, k=self._identity.signal.k)
        except BadLogits as error:
            raise BadLogits(f"unit {unit.id}: {error}") from error
        provenance = self._teacher.provenance(sequences)
        shard = write_shard(self._files, self._identity, unit, sequences, blocks, provenance)
        return Receipt(
            shard=shard,
            sequences=len(sequences),
            tokens=sum(unit.tokens),
            rows=sum(unit.rows),
            batches=len(self._teacher.batches(sequences)),
            seconds=time.perf_counter() - started,
        )

    def release(self) -> None:
        """Free the device; the actor scores nothing afterwards. The driver then ends the process with `ray.kill`."""
        self._teacher.release()


def remote_actor(**options: Any) -> Any:
    """`TeacherActor` as a Ray actor class: `remote_actor(num_cpus=1).remote(spec, identity, store)`.

    options: of `ray.remote`, e.g. num_cpus, num_gpus, max_restarts, max_task_retries, runtime_env. Ray's own defaults
        are no restarts and no retries.
    """
    return ray.remote(**options)(TeacherActor) if options else ray.remote(TeacherActor)
