"""A teacher in a Ray actor: unit → score (or generate) → encode → shard → receipt. The one file that imports ray.

Enters: a `TeacherSpec`, the identity of the store and its URI; then units with their sequences. Leaves: shards in the
store's folder, and receipts; no signal travels through Ray. Costs: a teacher's memory per actor, and the signals of two
units; it writes, and commits nothing: that is the driver's.

The teacher does not wait for the store: two calls run at once, of which one scores, and one encodes and writes. All
that the teacher computes runs in one thread of its own. OpenMP gives each thread that computes a team of workers, and
of two teams on as many cores as one has, even where the other is idle, the workers sleep between operations instead of
waiting for them: extraction took 460 µs a row instead of 180 (2 cores, V = 49,152).
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stillroom.storage.calibration import find_head, save_calibration
from stillroom.storage.errors import BadLogits, IdentityMismatch, StillroomError
from stillroom.storage.fidelity.truth import Truth, write_truth
from stillroom.storage.files import open_files
from stillroom.storage.generations.records import GenerationIdentity
from stillroom.storage.generations.shard import write_generations
from stillroom.storage.identity import Identity
from stillroom.storage.records import Float32, Receipt, Sequence, Signal, SignalSpec, Unit
from stillroom.storage.shard import write_shard
from stillroom.workers.generator import EngineDead, Generator, GeneratorSpec
from stillroom.workers.head import calibrate, save_head, steps_of
from stillroom.workers.ranks import Rank, RankedTeacher, join
from stillroom.workers.sanity import require_batch_free
from stillroom.workers.teacher import Teacher, TeacherSpec, TruthRequest
from stillroom.workers.torch_teacher import TorchTeacher

NO_TRUTH = TruthRequest()

#: Calls that an actor runs at once: one that scores, one that writes.
CALLS_AT_ONCE = 2

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Scored:
    """A unit's signal on its way to the store. started: when its scoring began, of `time.perf_counter`."""

    signals: list[Signal]
    truth: Truth | None
    provenance: dict[str, Any]
    planned: int
    started: float


class TeacherActor:
    """Scores units one at a time. A plain class: `remote_actor` makes it an actor.

    The teacher is loaded by the first call, not by the constructor: what a Ray actor's constructor raises comes to
    the driver as a dead actor, what a method raises as itself.
    """

    def __init__(self, spec: TeacherSpec, identity: Identity, store: str) -> None:
        self._spec, self._identity, self._store = spec, identity, store
        self._loaded: Teacher | None = None
        self._thread = ThreadPoolExecutor(1, "teacher")  # so it is for one call at a time, too

    def ready(self) -> dict[str, Any]:
        """Load the teacher; returns what shifts its rows within the noise band.

        Raises TeacherError if it cannot be loaded, IdentityMismatch if it is not the one of the store: another node's
        folder may hold other weights under the same name.
        """
        return self._in_its_thread(lambda: self._teacher().provenance([]))

    def _in_its_thread(self, work: Callable[[], Result]) -> Result:
        """Raises what it raises."""
        return self._thread.submit(work).result()

    def _teacher(self) -> Teacher:
        if self._loaded is None:
            teacher = TorchTeacher(self._spec) if self._spec.ranks == 1 else _ranked(self._spec)
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

    def probe(self, sequences: Seq[Sequence]) -> dict[str, Any]:
        """How far the teacher's rows depend on their batch, on one of this unit. Raises BatchDependent beyond
        rounding, BadLogits, what `ready` raises."""

        def probe() -> dict[str, Any]:
            teacher = self._teacher()
            found = require_batch_free(teacher, sequences, signal=self._identity.signal, dtype=self._spec.dtype)
            return found.as_dict()

        return self._in_its_thread(probe)

    def found(self, sequences: Seq[Sequence]) -> str:
        """Write what the hidden part of a new store needs beside the shards: the teacher's output head, and
        the calibration of its channels, measured on these sequences (int16: read off the head). Returns the
        calibration's digest, "" for none.

        Raises TeacherError if this architecture's head cannot be stored, StoreFull, StoreError, also for the head of
        another teacher.
        """
        return self._in_its_thread(lambda: self._found(sequences))

    def _found(self, sequences: Seq[Sequence]) -> str:
        teacher = self._teacher()
        assert isinstance(teacher, TorchTeacher)
        files = open_files(self._store)
        head = teacher.output_head()
        save_head(files, head)
        find_head(files)  # one of another teacher may lie there, whose store was never founded
        spec = self._identity.signal.hidden
        assert spec is not None
        if spec.dtype == "int16":
            return save_calibration(files, steps_of(head))
        if spec.dtype == "bfloat16":
            return ""
        scored = teacher.score(sequences, signal=SignalSpec(hidden=spec))
        hidden = np.concatenate([block.hidden for block in scored if block.hidden is not None])
        return save_calibration(files, calibrate(hidden, head.weight.float().cpu().numpy()))

    def score_unit(self, unit: Unit, sequences: Seq[Sequence], truth: TruthRequest = NO_TRUTH) -> Receipt:
        """Score a unit and write its shard. Doing it twice on the same machine gives the same file.

        sequences: the unit's, in its order. truth: positions whose logits are kept in full beside the
        shard. Raises what `ready` raises, BadLogits naming the unit and its sequences, StoreFull, StoreError.
        """
        scored = self._in_its_thread(lambda: self._score(unit, sequences, truth))
        files = open_files(self._store)
        if scored.truth is not None:
            write_truth(files, unit, scored.truth, self._identity)  # before the shard: it counts when the unit does
        shard = write_shard(files, self._identity, unit, sequences, scored.signals, scored.provenance)
        batches = len(scored.provenance["batch_shapes"])
        return Receipt(
            shard=shard,
            sequences=len(sequences),
            tokens=sum(unit.tokens),
            rows=sum(unit.rows),
            batches=batches,
            seconds=time.perf_counter() - scored.started,
            halved=batches - scored.planned,
        )

    def _score(self, unit: Unit, sequences: Seq[Sequence], truth: TruthRequest) -> _Scored:
        teacher = self._teacher()
        started = time.perf_counter()
        try:
            scored = teacher.score_with_truth(sequences, signal=self._identity.signal, positions=truth.positions)
            full = self._truth(teacher, sequences, truth, scored.truth) if truth.positions else None
        except BadLogits as error:
            raise BadLogits(f"unit {unit.id}: {error}") from error
        return _Scored(scored.signals, full, teacher.provenance(sequences), len(teacher.batches(sequences)), started)

    def _truth(
        self, teacher: Teacher, sequences: Seq[Sequence], request: TruthRequest, full: Mapping[str, Float32]
    ) -> Truth:
        """The unit's part of the fidelity sample. full: float32 [n, V] by sequence digest, of the unit's own pass."""
        twice: dict[str, Float32] = {}
        for sequence in sequences:
            if sequence.digest in request.alone:
                positions = {sequence.digest: request.positions[sequence.digest]}
                twice |= teacher.score_with_truth([sequence], signal=self._identity.signal, positions=positions).truth
        blocks = []
        for digest, logits in full.items():
            rows = np.arange(len(logits)) if digest in twice else np.zeros(0, np.int64)
            alone = twice.get(digest, logits[:0])
            positions_P = np.array(request.positions[digest], np.int32)
            blocks.append(Truth((digest,) * len(logits), positions_P, logits, alone, rows))
        return Truth.concatenate(blocks)

    def release(self) -> None:
        """Free the device. The driver then ends the process with `ray.kill`; another call would load anew."""
        self._in_its_thread(self._release)

    def _release(self) -> None:
        if self._loaded is not None:
            self._loaded.release()
            self._loaded = None


def remote_actor(**options: Any) -> Any:
    """`TeacherActor` as a Ray actor class: `remote_actor(num_cpus=1).remote(spec, identity, store)`.

    options: of `ray.remote`, e.g. num_cpus, num_gpus, max_restarts, max_task_retries, runtime_env. Ray's own defaults
        are no restarts and no retries.
    """
    return ray.remote(**{"max_concurrency": CALLS_AT_ONCE, **options})(TeacherActor)


def _ranked(spec: TeacherSpec) -> RankedTeacher:
    """Rank 0 of a teacher of several, in the first bundle of its placement group; the others get one each, and end with
    this process. Raises TeacherError."""
    group = ray.util.get_current_placement_group()
    assert group is not None
    assert len(group.bundle_specs) == spec.ranks
    with socket.socket() as free:
        free.bind(("", 0))
        address = f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
    others = []
    for rank in range(1, spec.ranks):
        resources = {name: amount for name, amount in group.bundle_specs[rank].items() if name not in ("CPU", "GPU")}
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        actor: Any = ray.remote(
            num_cpus=group.bundle_specs[rank].get("CPU", 0),
            num_gpus=group.bundle_specs[rank].get("GPU", 0),
            resources=resources,
            scheduling_strategy=strategy,
        )(Rank)
        others.append(actor.remote(spec, rank, address))
    loading = [other.load.remote() for other in others]

    def tell(method: str, *arguments: Any, **named: Any) -> Callable[[], None]:
        told = [other.follow.remote(method, *arguments, **named) for other in others]
        return lambda: _wait(told)

    join(spec, 0, address)
    teacher = RankedTeacher(spec, tell)
    _wait(loading)
    return teacher


def _wait(references: list[Any]) -> None:
    """Raises what another rank raised, as itself."""
    try:
        ray.get(references)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, StillroomError) else error) from error


class GeneratorActor:
    """Has a teacher write responses, one unit at a time. As `TeacherActor`, but in one thread: vLLM is for one."""

    def __init__(self, spec: GeneratorSpec, identity: GenerationIdentity, store: str) -> None:
        self._spec, self._identity, self._store = spec, identity, store
        self._loaded: Generator | None = None

    def ready(self) -> dict[str, Any]:
        """Start the engine; returns what it is. Raises TeacherError if it cannot be started, IdentityMismatch if the
        model is not the one of the store."""
        return self._generator().provenance()

    def _generator(self) -> Generator:
        if self._loaded is None:
            from stillroom.workers.vllm_generator import VllmGenerator  # a teacher that scores must not need it

            generator = VllmGenerator(self._spec, on_death=lambda: _end_process("its process is gone"))
            found = GenerationIdentity(
                teacher=self._identity.teacher, decoding=self._spec.decoding, **generator.identity_parts()
            )
            self._identity.require_equal(found, self._store)
            self._loaded = generator
        return self._loaded

    def score_unit(self, unit: Unit, prompts: Seq[Sequence], _: TruthRequest = NO_TRUTH) -> Receipt:
        """Have the unit's responses written, and write its shard. The pool knows units by this name.

        prompts: the unit's, in its order. The receipt's tokens are those of the prompts, its rows those generated, its
        batches the responses. An engine that died takes this process with it: Ray's answer to the driver is then a
        lost actor, where another call would reach the same dead engine. Raises TeacherError, StoreFull, StoreError.
        """
        generator = self._generator()
        started = time.perf_counter()
        try:
            responses = generator.generate(prompts)
        except EngineDead as error:
            _end_process(str(error))
        shard = write_generations(open_files(self._store), self._identity, unit, responses, generator.provenance())
        return Receipt(
            shard=shard,
            sequences=len(prompts),
            tokens=sum(unit.tokens),
            rows=sum(len(response.response_ids) for response in responses),
            batches=len(responses),
            seconds=time.perf_counter() - started,
        )

    def release(self) -> None:
        """As `TeacherActor.release`."""
        if self._loaded is not None:
            self._loaded.release()
            self._loaded = None


def _end_process(why: str) -> NoReturn:
    print(f"the engine is dead, and this actor ends with it: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def remote_generator(**options: Any) -> Any:
    """`GeneratorActor` as a Ray actor class: `remote_generator(num_gpus=1).remote(spec, identity, store)`."""
    return ray.remote(**options)(GeneratorActor)
