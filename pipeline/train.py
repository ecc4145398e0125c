"""The training stage, seen from outside: pin the store, write a job, run the student in a process of its own.

Enters: a recipe, its manifest and store. Leaves: `students/<name>/` with snapshot, job, log, checkpoints and export.
Costs: this process waits; the student's does the work, without Ray, without the log, without a teacher.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from stillroom.pipeline.account import enter_use
from stillroom.pipeline.console import Console
from stillroom.pipeline.fidelity import require_described, require_supported
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.student.bindings import EXPORT, RESULT, bindings_of, finished, read_result, require_same
from stillroom.pipeline.student.config import StudentConfig, StudentJob, student_window
from stillroom.pipeline.student.parent import VARIABLE
from stillroom.storage import errors
from stillroom.storage.care.pins import pin
from stillroom.storage.errors import StillroomError, StoreError, StudentError
from stillroom.storage.files import LocalFiles, open_files
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import IDENTITY, open_store

INTERRUPTED = 130


def train_command(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """`stillroom train`: every student of the recipe, one after the other."""
    if not manifest_path(recipe).exists():
        if any(student.losses.alpha for student in recipe.students):
            raise StoreError(f"{manifest_path(recipe)} is not there yet: run `stillroom teach` on this recipe first")
        Sources(recipe, console).manifest()  # hard labels alone need the text, and no teacher
    results = [train(recipe, student, console) for student in recipe.students]
    show_students(results, console)
    return {"students": results}


def manifest_path(recipe: Recipe) -> Path:
    return recipe.run_dir / "corpus.parquet"


def student_folder(recipe: Recipe, student: StudentConfig) -> Path:
    return recipe.run_dir / "students" / student.name


def train(recipe: Recipe, student: StudentConfig, console: Console) -> dict[str, Any]:
    """Train one student, or find that it is trained; returns its `result.json`.

    Raises StoreError if the corpus or the store is not there, UnsupportedSignal if the store does not support the
    student's loss within the recipe's bound, StudentError if the student's process fails (it has
    said why), KeyboardInterrupt if it was interrupted.
    """
    folder = student_folder(recipe, student)
    job = job_of(recipe, student)
    result = result_of(job)
    if result is None:
        if job.teacher is not None:
            job = job.model_copy(update={"teacher": _teacher_folder(recipe)})
        path = folder / "job.json"
        LocalFiles(folder).write(path.name, job.model_dump_json(indent=2).encode())
        console.info(f"train: {student.name}")
        _run([sys.executable, "-m", "stillroom.pipeline.student", str(path)], student.name)
        result = result_of(job)
        if result is None:
            raise StudentError(f"student {student.name} ended without a result in {folder}")
    else:
        console.info(f"train: {student.name} is trained already, in {folder}")
    # Also of one that was trained before: its store may have been out of reach then, or we killed.
    enter_use(recipe.store.path, recipe.name, job, console)
    return result


def require_possible(recipe: Recipe, student: StudentConfig, manifest: Manifest, sources: Sources) -> None:
    """Raises StudentError, TokenizerMismatch or RecipeError for a student that its process would refuse, as far as
    configs and tokenizers tell: said before the teacher has worked for it."""
    from stillroom.pipeline.student.model import check_student

    if (student_folder(recipe, student) / RESULT).exists():
        return
    student_window(student, manifest.meta.window)
    check_student(
        student.model,
        teacher=sources.teacher_folder if student.model.cut is not None else None,
        tokenizer=sources.tokenizer,
        expected_tokenizer=manifest.meta.tokenizer,
        vocabulary=manifest.meta.vocabulary,
    )


def require_untouched(recipe: Recipe, student: StudentConfig, manifest: Manifest) -> None:
    """Raises StudentError if the student is trained already, on another corpus or by other numbers: said before the
    teacher has worked for it."""
    path = student_folder(recipe, student) / RESULT
    if path.exists():
        held = read_result(path)["bindings"]
        require_same(held, {**held, "config": student.numbers(), "manifest": manifest.digest}, path)


def result_of(job: StudentJob) -> dict[str, Any] | None:
    """The result of a finished run of exactly this job, or None. Raises StudentError if the folder holds another."""
    snapshot = None if job.snapshot is None else Snapshot.read(job.snapshot)
    result = finished(job, bindings_of(job, Manifest.open(job.manifest), snapshot))
    # Where it is now: the run's folder may have been moved.
    return None if result is None else result | {"export": str(job.run_dir / EXPORT)}


def student_line(result: dict[str, Any]) -> dict[str, Any]:
    """One student's line of the summary; a corpus without held-out documents leaves the measures null."""
    line = {key: result[key] for key in ("name", "parameters", "layers", "steps", "trained_positions", "seconds")}
    for when in ("before", "after"):
        found = result[when] or {}
        line |= {
            f"kl_{when}": found.get("kl"),
            f"top1_{when}": found.get("top1"),
            f"ppl_{when}": found.get("perplexity"),
            f"ece_{when}": found.get("ece"),
        }
    return line | {"export": result["export"]}


def show_students(results: list[dict[str, Any]], console: Console) -> None:
    """The table of all students, before → after training."""

    def change(line: dict[str, Any], key: str, digits: int) -> str:
        before, after = line[f"{key}_before"], line[f"{key}_after"]
        return "" if before is None or after is None else f"{before:,.{digits}f} → {after:,.{digits}f}"

    lines = [student_line(result) for result in results]
    console.table(
        ["student", "layers", "steps", "held-out KL to the teacher (nats)", "top-1 agreement", "perplexity"],
        [[s["name"], str(s["layers"]), str(s["steps"]), *(change(s, *measure) for measure in _SHOWN)] for s in lines],
        title="students on the held-out documents, before → after training",
    )


_SHOWN = (("kl", 3), ("top1", 3), ("ppl", 2))


def job_of(recipe: Recipe, student: StudentConfig) -> StudentJob:
    """What the student's process is to do. Raises StoreError if the corpus or the store is not there."""
    folder, path = student_folder(recipe, student), manifest_path(recipe)
    return StudentJob(
        student=student,
        manifest=path,
        snapshot=_pin(recipe, student, Manifest.open(path), folder),
        run_dir=folder,
        tokenizer=recipe.run_dir / "tokenizer",
        # As the recipe has it: a finished student is found without the teacher's files.
        teacher=Path(recipe.teacher.model) if student.model.cut is not None else None,
    )


def _teacher_folder(recipe: Recipe) -> Path:
    from stillroom.workers.source import resolve_model

    return resolve_model(recipe.teacher.model)


def _pin(recipe: Recipe, student: StudentConfig, manifest: Manifest, folder: Path) -> Path | None:
    """The snapshot that this student trains on: the one it began with, unless the corpus has changed since. None for
    a student of hard labels that began where there was no store.

    Raises IdentityMismatch for a store that the recipe does not describe, StoreError if it lacks a part of the corpus,
    UnsupportedSignal: nothing is pinned then.
    """
    path, note = folder / "snapshot.parquet", folder / "pinned.json"
    files = open_files(recipe.store.path)
    stated = {"manifest": manifest.digest, "store": files.uri}
    held = json.loads(note.read_text()) if note.exists() else None
    unchecked = student.losses.alpha > 0 and not (folder / RESULT).exists()
    store = open_store(recipe.store.path) if files.exists(IDENTITY) else None
    if unchecked and store:
        require_described(recipe, store)
    if held == stated | {"signal": True} and path.exists():
        if unchecked and store:
            require_supported(recipe, student, store)
        return path
    if student.losses.alpha == 0 and (held == stated | {"signal": False} or not files.exists(IDENTITY)):
        LocalFiles(folder).write(note.name, json.dumps(stated | {"signal": False}).encode())
        return None
    store = store or open_store(recipe.store.path)
    digests = {s.decode() for s in manifest.index().sequences.tolist()}
    snapshot: Snapshot = store.snapshot(digests)
    lacking = len(digests.difference(*(u.sequences for u in snapshot.units)))
    if lacking:
        raise StoreError(
            f"store {files.uri} lacks {lacking:,} of the corpus's {len(digests):,} sequences: run `stillroom teach` on "
            "this recipe first"
        )
    if unchecked:
        require_supported(recipe, student, store)  # a student that is refused must not hold on to shards
    pin(files, snapshot, path)  # before the snapshot is there: `stillroom gc` must not come between
    snapshot.write(path)
    LocalFiles(folder).write(note.name, json.dumps(stated | {"signal": True}).encode())
    return path


def _run(command: list[str], name: str) -> None:
    """Run the student's process and wait. A Ctrl-C reaches it too, as the terminal signals the whole group; a
    SIGTERM to us is passed on. It writes its checkpoint, then both end. It ends as well if we are killed.

    Raises the error that the process met, StudentError if it could not say.
    """
    reading, writing = os.pipe()
    environment = os.environ | {VARIABLE: f"{os.getpid()}:{writing}"}
    # Its stdout is our stderr: ours is for the result alone.
    process = subprocess.Popen(command, stdout=2, pass_fds=(writing,), env=environment)
    os.close(writing)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    try:
        code = _wait(process)
    finally:
        signal.signal(signal.SIGTERM, previous)
        with os.fdopen(reading, encoding="utf-8") as pipe:
            told = pipe.read()
    # By the signal itself where a further Ctrl-C came while the process was already leaving.
    if code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if told:
        raise _error(told, name)
    if code != 0:
        how = f"was killed by signal {-code}" if code < 0 else f"stopped with exit code {code}"
        raise StudentError(f"student {name} {how}; the same command goes on from its last checkpoint")


def _error(told: str, name: str) -> StillroomError:
    """What the student's process said, as the error that it was there."""
    words = json.loads(told)
    kind: type[StillroomError] = getattr(errors, words["kind"])
    return kind(f"student {name}: {words['message']}")


def _wait(process: "subprocess.Popen[bytes]") -> int:
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The child has had the signal as well and is writing its checkpoint: leaving now would orphan it.
            continue
