"""The training stage, seen from outside: pin the store, write a job, run the student in a process of its own.

Enters: a recipe, its manifest and store. Leaves: `students/<name>/` with snapshot, job, log, checkpoints and export.
Costs: this process waits; the student's does the work, without Ray, without the log, without a teacher.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from stillroom.pipeline.console import Console
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.student.bindings import bindings_of, finished
from stillroom.pipeline.student.config import StudentConfig, StudentJob
from stillroom.storage.errors import StoreError, StudentError
from stillroom.storage.files import LocalFiles
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import open_store

INTERRUPTED = 130


def train_command(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """`stillroom train`: every student of the recipe, one after the other."""
    results = [train(recipe, student, console) for student in recipe.students]
    show_students(results, console)
    return {"students": results}


def student_folder(recipe: Recipe, student: StudentConfig) -> Path:
    return recipe.run_dir / "students" / student.name


def train(recipe: Recipe, student: StudentConfig, console: Console) -> dict[str, Any]:
    """Train one student, or find that it is trained; returns its `result.json`.

    Raises StoreError if the corpus or the store is not there, StudentError if the student's process fails (it has
    said why), KeyboardInterrupt if it was interrupted.
    """
    folder = student_folder(recipe, student)
    job = _job(recipe, student, folder)
    result = result_of(job)
    if result is None:
        path = folder / "job.json"
        LocalFiles(folder).write(path.name, job.model_dump_json(indent=2).encode())
        console.info(f"train: {student.name}")
        _run([sys.executable, "-m", "stillroom.pipeline.student", str(path)], student.name)
        result = result_of(job)
        if result is None:
            raise StudentError(f"student {student.name} ended without a result in {folder}")
    else:
        console.info(f"train: {student.name} is trained already, in {folder}")
    return result


def result_of(job: StudentJob) -> dict[str, Any] | None:
    """The result of a finished run of exactly this job, or None. Raises StudentError if the folder holds another."""
    snapshot = None if job.snapshot is None else Snapshot.read(job.snapshot)
    return finished(job, bindings_of(job, Manifest.open(job.manifest), snapshot))


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


def _job(recipe: Recipe, student: StudentConfig, folder: Path) -> StudentJob:
    manifest_path = recipe.run_dir / "corpus.parquet"
    return StudentJob(
        student=student,
        manifest=manifest_path,
        snapshot=_pin(recipe, student, Manifest.open(manifest_path), folder),
        run_dir=folder,
        tokenizer=recipe.run_dir / "tokenizer",
        teacher=_teacher_folder(recipe) if student.model.cut is not None else None,
    )


def _teacher_folder(recipe: Recipe) -> Path:
    from stillroom.workers.source import resolve_model

    return resolve_model(recipe.teacher.model)


def _pin(recipe: Recipe, student: StudentConfig, manifest: Manifest, folder: Path) -> Path | None:
    """The snapshot that this student trains on: the one it began with, unless the corpus has changed since."""
    path, note = folder / "snapshot.parquet", folder / "pinned.json"
    stated = {"manifest": manifest.digest, "store": recipe.store.path}
    if path.exists() and note.exists() and json.loads(note.read_text()) == stated:
        return path
    try:
        store = open_store(recipe.store.path)
    except StoreError:
        if student.losses.alpha == 0:
            return None
        raise
    digests = {s.decode() for s in manifest.index().sequences.tolist()}
    snapshot: Snapshot = store.snapshot(digests)
    snapshot.write(path)
    LocalFiles(folder).write(note.name, json.dumps(stated).encode())
    return path


def _run(command: list[str], name: str) -> None:
    """Run the student's process and wait. A Ctrl-C reaches it too, as the terminal signals the whole group; a
    SIGTERM to us is passed on. It writes its checkpoint, then both end."""
    process = subprocess.Popen(command)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    try:
        code = _wait(process)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0:
        how = f"was killed by signal {-code}" if code < 0 else f"stopped with exit code {code}"
        raise StudentError(f"student {name} {how}; the same command goes on from its last checkpoint")


def _wait(process: "subprocess.Popen[bytes]") -> int:
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The child has had the signal as well and is writing its checkpoint: leaving now would orphan it.
            continue
