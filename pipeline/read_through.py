"""Read-through: a student trains while teachers still write, and ends as one that came after them.

Enters: a recipe with `train.read_through`. Leaves: what training leaves. Costs: a look at the log every two seconds.

    run      teaching in this process ─► log ─► follower thread ─► arrivals.jsonl ─► student's process beside
    train    a `teach` elsewhere ──────► log ─► this process ────► arrivals.jsonl ─► student's process beside

The units are those of the plan, so order, packs and steps are known before anything is scored; teachers score units in
the order in which the first student's epoch 0 opens them. As training takes packs from 64 units in turn, a student
reads on when the next 64 are there: of 640 units it costs a tenth of the training's time beyond the slower of both, of
6,400 a hundredth, and of 64 or fewer there is nothing to gain. Where teaching ends without a unit, this process ends
the student and says why.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from stillroom.pipeline.console import Console, format_duration
from stillroom.pipeline.devices import only_gpus, teachers_gpus
from stillroom.pipeline.fidelity import require_supported
from stillroom.pipeline.pinning import Follower, pin_open
from stillroom.pipeline.plan import make_plan
from stillroom.pipeline.process import TEACHING, is_held, only_one
from stillroom.pipeline.progress_file import PROGRESS
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.student.bindings import RESULT
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student_process import StudentProcess
from stillroom.pipeline.train import job_on, manifest_path, show_students, start, student_folder, train, trained
from stillroom.storage.errors import StillroomError, StoreError, TeacherError
from stillroom.storage.files import open_files
from stillroom.storage.manifest import Manifest
from stillroom.storage.order import LANES
from stillroom.storage.store import IDENTITY, Store, open_store

INTERVAL_S = 2.0
#: Without a sign of life for so long, a line says so.
QUIET_S = 60.0


def train_beside(
    recipe: Recipe,
    student: StudentConfig,
    manifest: Manifest,
    store: Store,
    teaching: Callable[[], None],
    console: Console,
) -> dict[str, Any]:
    """Teach and train at once; the student's result.

    teaching: scores what the store lacks of the corpus, in this process. It is called even where nothing lacks.
    Raises what teaching raises, with the student at a checkpoint; what `train` raises; RecipeError if both would share
    a GPU.
    """
    folder, seed = student_folder(recipe, student), recipe.students[0].seed
    plan = make_plan(manifest, store, unit_tokens=recipe.store.unit_tokens, seed=seed)
    path = None
    if plan.pending and not (folder / RESULT).exists():
        gpus = teachers_gpus(recipe, student)
        path = pin_open(recipe, student, manifest, folder, store, {unit.id for unit in plan.pending})
    if path is None:
        teaching()
        return train(recipe, student, console)
    console.info(
        f"train: {student.name} starts beside the teachers; {len(plan.pending):,} of its units are not scored yet"
    )
    if len(plan.pending) < 4 * LANES:
        console.notice(
            f"train: the order of training goes through {LANES} units at a time: with {len(plan.pending):,} to score "
            "there is little to gain from training beside the teachers (at most 1.02 times the speed at 64, 1.35 at "
            "128, 1.82 at 640)"
        )
    job = job_on(recipe, student, path)
    process = start(recipe, job, console, beside=True)
    with _ended_with_us(process):
        with only_gpus(gpus), _Telling(store.uri, Follower(open_store(recipe.store.path), path), process, student):
            teaching()
        _complete(recipe, student, Follower(open_store(recipe.store.path), path), store)
    process.wait()
    return trained(recipe, job, console)


def _complete(recipe: Recipe, student: StudentConfig, follower: Follower, store: Store) -> None:
    """All is committed: the student may end. Raises UnsupportedSignal if it should never have begun."""
    if follower.look():
        raise StoreError(
            f"student {student.name} waits for {len(follower.missing):,} units that are not in {store.uri} though the "
            f"teaching is done, the first is {follower.missing[0]}: run the same command again"
        )
    if student.taught:
        require_supported(recipe, student, store)
    follower.complete()


class _ended_with_us:  # noqa: N801 - reads as a statement
    """A student that works beside is at a checkpoint when the block is left by an error."""

    def __init__(self, process: StudentProcess) -> None:
        self._process = process

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if not self._process.ended:
                self._process.stop()
            with suppress(StillroomError, KeyboardInterrupt):
                self._process.wait()


class _Telling:
    """Follows the log in a thread while the block runs. An error there is met again at the end, where it counts."""

    def __init__(self, uri: str, follower: Follower, process: StudentProcess, student: StudentConfig) -> None:
        self._uri, self._follower, self._process, self._name = uri, follower, process, student.name
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="stillroom-follower", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        said = False
        while not self._done.is_set():
            began = time.monotonic()
            with suppress(StillroomError):
                self._follower.look()
            if self._process.ended and not said:
                said = True
                print(
                    f"notice: student {self._name} has ended before its units are scored; the teaching goes on, and "
                    "why is said at its end",
                    file=sys.stderr,
                    flush=True,
                )
            # A log of a million shards takes its time: at most a twentieth of it here.
            self._done.wait(max(INTERVAL_S, 20 * (time.monotonic() - began)))


def follow_command(recipe: Recipe, console: Console) -> dict[str, Any]:
    """`stillroom train` with read_through: every student of the recipe, while `stillroom teach` runs elsewhere."""
    signs = Signs(recipe, console)
    while not manifest_path(recipe).exists():
        if is_held(recipe.run_dir, TEACHING):  # a `teach` in the same folder is just about to write it
            signs.require_life(news=False, missing=[])
            time.sleep(INTERVAL_S)
            continue
        with only_one(recipe.run_dir, (TEACHING,)):
            Sources(recipe, console).manifest()
    results = [_train_following(recipe, student, console) for student in recipe.students]
    show_students(results, console)
    return {"students": results}


def _train_following(recipe: Recipe, student: StudentConfig, console: Console) -> dict[str, Any]:
    manifest, folder = Manifest.open(manifest_path(recipe)), student_folder(recipe, student)
    if (folder / RESULT).exists():
        return train(recipe, student, console)
    signs = Signs(recipe, console)
    store, pending = _planned(recipe, manifest, signs)
    path = pin_open(recipe, student, manifest, folder, store, pending) if pending else None
    if path is None:
        return train(recipe, student, console)
    follower = Follower(store, path)
    follower.look()
    console.info(
        f"train: {len(follower.missing):,} of {follower.units:,} units are not scored yet; following {store.uri}"
    )
    job = job_on(recipe, student, path)
    process = start(recipe, job, console, beside=True)
    with _ended_with_us(process):
        before = len(follower.missing) + 1
        while missing := follower.look():
            if process.ended:
                break
            signs.require_life(news=missing < before, missing=follower.missing)
            before = missing
            time.sleep(INTERVAL_S)
        else:
            _complete(recipe, student, follower, store)
    process.wait()
    return trained(recipe, job, console)


def _planned(recipe: Recipe, manifest: Manifest, signs: "Signs") -> tuple[Store, set[str]]:
    """The store and the units that are still to be scored, once `stillroom teach` has founded and planned it."""
    while True:
        if open_files(recipe.store.path).exists(IDENTITY):
            store = open_store(recipe.store.path)
            seed = recipe.students[0].seed
            plan = make_plan(manifest, store, unit_tokens=recipe.store.unit_tokens, seed=seed, save=False)
            pending = {unit.id for unit in plan.pending}
            if pending <= set(store.planned().ids.astype(str).tolist()):
                return store, pending
        signs.require_life(news=False, missing=[])
        time.sleep(INTERVAL_S)


class Signs:
    """Whether anybody teaches: commits, and the progress file, which a teaching run writes every ten seconds.

    It is compared with itself, never with a clock: the teachers' machine may have another time. clock: seconds.
    """

    def __init__(self, recipe: Recipe, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._patience_s = open_files(recipe.store.path), recipe.train.patience_s
        self._console, self._clock = console, clock
        self._last, self._said = clock(), False
        self._trouble = ""
        self._body: bytes | None = None
        self._body = self._read()

    def require_life(self, *, news: bool, missing: list[str]) -> None:
        """news: there was a commit. missing: ids of the units that are waited for.

        Raises TeacherError where a teaching run has ended and left out one of them, or after the patience.
        """
        body, now = self._read(), self._clock()
        if body != self._body:
            self._body, news = body, True
            self._require_not_left_out(missing)
        if news:
            self._last, self._said = now, False
            return
        quiet = now - self._last
        if quiet >= QUIET_S and not self._said:
            self._said = True
            limit = "for ever" if self._patience_s is None else f"for {format_duration(self._patience_s)} in all"
            self._console.notice(
                f"train: no sign of teachers at {self._files.uri} for {format_duration(quiet)} "
                f"(state: {self._state().get('state', 'none')}{self._trouble}); waiting {limit} (train.patience_s)"
            )
        if self._patience_s is not None and quiet >= self._patience_s:
            raise TeacherError(
                f"nobody has taught at {self._files.uri} for {format_duration(quiet)} (train.patience_s), and "
                f"{len(missing) or 'all'} units are waited for: run `stillroom teach` on this recipe; the same command "
                f"goes on from the student's checkpoint{self._trouble}"
            )

    def _require_not_left_out(self, missing: list[str]) -> None:
        state = self._state()
        out = {unit["unit"]: unit["cause"] for unit in state.get("quarantined", [])}
        found = sorted(out.keys() & set(missing))
        if state.get("state") == "done" and found:
            raise TeacherError(
                f"the teaching at {self._files.uri} is done and left out {len(found)} units that are waited for, the "
                f"first is {found[0]}: {out[found[0]]}; mend or remove its documents and run `stillroom teach` again"
            )

    def _state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self._body or b"{}")
        except ValueError:
            return {}
        return state

    def _read(self) -> bytes | None:
        self._trouble = ""
        try:
            return self._files.read(PROGRESS) if self._files.exists(PROGRESS) else None
        except StillroomError as error:  # it may pass; the patience is for that, too
            self._trouble = f"; the store cannot be read: {error}"
            return self._body  # which is no sign of life
