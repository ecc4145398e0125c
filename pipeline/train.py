"""The training stage, seen from outside: pin the store, write a job, run the student in a process of its own.

Enters: a recipe, its manifest and store. Leaves: `students/<name>/` with snapshot, job, log, checkpoints and export.
Costs: this process waits; the student's does the work, without Ray, without the log, without a teacher.
"""

import sys
from pathlib import Path
from typing import Any

from stillroom.pipeline.account import enter_use
from stillroom.pipeline.console import Console
from stillroom.pipeline.console import format_number as number
from stillroom.pipeline.pinning import pinned
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.student.bindings import (
    EXPORT,
    RESULT,
    asked_now,
    bindings_of,
    finished,
    held_in,
    require_same,
)
from stillroom.pipeline.student.config import StudentConfig, StudentJob, student_window
from stillroom.pipeline.student.curriculum import other_corpus, phase_steps
from stillroom.pipeline.student.features.maps import resolve
from stillroom.pipeline.student.mix import Mix
from stillroom.pipeline.student_process import StudentProcess
from stillroom.storage.errors import StoreError, StudentError
from stillroom.storage.files import LocalFiles
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot


def train_command(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """`stillroom train`: every student of the recipe, one after the other."""
    if recipe.train.read_through:
        from stillroom.pipeline.read_through import follow_command

        return follow_command(recipe, console)
    if not manifest_path(recipe).exists():
        if any(student.taught for student in recipe.students):
            raise StoreError(f"{manifest_path(recipe)} is not there yet: run `stillroom teach` on this recipe first")
        Sources(recipe, console).manifest()  # hard labels alone need the text, and no teacher
    if recipe.train.side_by_side > 1:
        from stillroom.pipeline.side_by_side import train_together

        results = train_together(recipe, recipe.students, console)
    else:
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
    job = job_of(recipe, student)
    if result_of(job) is None:
        start(recipe, job, console).wait()
    else:
        console.info(f"train: {student.name} is trained already, in {job.run_dir}")
    return trained(recipe, job, console)


def start(
    recipe: Recipe,
    job: StudentJob,
    console: Console,
    *,
    beside: bool = False,
    environment: dict[str, str] | None = None,
) -> StudentProcess:
    """Write a job down and start its process; the arguments are `StudentProcess`'s."""
    if job.teacher is not None:
        job = job.model_copy(update={"teacher": _teacher_folder(recipe)})
    path = job.run_dir / "job.json"
    LocalFiles(job.run_dir).write(path.name, job.model_dump_json(indent=2).encode())
    console.info(f"train: {job.student.name}")
    command = [sys.executable, "-m", "stillroom.pipeline.student", str(path)]
    return StudentProcess(command, job.student.name, beside=beside, environment=environment)


def trained(recipe: Recipe, job: StudentJob, console: Console) -> dict[str, Any]:
    """The result of a job whose process has ended well. Raises StudentError if there is none."""
    result = result_of(job)
    if result is None:
        raise StudentError(f"student {job.student.name} ended without a result in {job.run_dir}")
    # Also of one that was trained before: its store may have been out of reach then, or we killed.
    enter_use(recipe.store.path, recipe.name, job, console)
    return result


def require_possible(recipe: Recipe, student: StudentConfig, manifest: Manifest, sources: Sources) -> None:
    """Raises StudentError, TokenizerMismatch, RecipeError, or UnsupportedSignal for the layers it learns from, for a
    student that its process would refuse, as far as configs and tokenizers tell: said before the teacher has worked
    for it."""
    from stillroom.pipeline.student.lora import require_peft
    from stillroom.pipeline.student.model import check_student, student_shape

    if (student_folder(recipe, student) / RESULT).exists():
        return
    if student.lora:
        require_peft()
    window = student_window(student, manifest.meta.window)
    for path in student.corpora():
        other_corpus(path, manifest, window)
    if student.mix:  # what epochs hold is not known yet: the run itself looks at every step
        Mix.of(student.mix, manifest, phase_steps(student) or student.steps or 1000)
    teacher = sources.teacher_folder if student.model.cut is not None else None
    check_student(
        student.model,
        teacher=teacher,
        tokenizer=sources.tokenizer,
        expected_tokenizer=manifest.meta.tokenizer,
        vocabulary=manifest.meta.vocabulary,
    )
    for features in student.all_features():
        resolve(features, sources.identity().signal, student_shape(student.model, teacher=teacher))


def require_untouched(recipe: Recipe, student: StudentConfig, manifest: Manifest) -> None:
    """Raises StudentError if the student is trained or begun already, on other text or by other numbers: said before
    the teacher has worked for it."""
    found = held_in(student_folder(recipe, student))
    if found:
        path, held = found
        require_same(held, asked_now(held, student, manifest, start_of(student)), path)


def result_of(job: StudentJob) -> dict[str, Any] | None:
    """The result of a finished run of exactly this job, or None. Raises StudentError if the folder holds another."""
    snapshot = None if job.snapshot is None else Snapshot.read(job.snapshot)
    result = finished(job, bindings_of(job, Manifest.open(job.manifest), snapshot))
    # Where it is now: the run's folder may have been moved.
    return None if result is None else result | {"export": str(job.run_dir / EXPORT)}


def student_line(result: dict[str, Any]) -> dict[str, Any]:
    """One student's line of the summary; a corpus without held-out documents leaves the measures null, as a result
    of an earlier release does those that it did not measure."""
    line = {key: result[key] for key in ("name", "parameters", "layers", "steps", "trained_positions", "seconds")}
    for when in ("before", "after"):
        found = result[when] or {}
        line |= {
            f"kl_{when}": found.get("kl"),
            f"top1_{when}": found.get("top1"),
            f"top5_{when}": found.get("top5"),
            f"teacher_mass_{when}": found.get("teacher_mass"),
            f"student_mass_{when}": found.get("student_mass"),
            f"ppl_{when}": found.get("perplexity"),
            **{
                f"ppl_{kind}_{when}": found[f"perplexity_{kind}"]
                for kind in ("teacher_text", "ground_truth")
                if f"perplexity_{kind}" in found
            },
            f"ece_{when}": found.get("ece"),
        }
    return line | {
        "seconds_waited": result.get("seconds_waited"),
        "best_step": (result.get("best") or {}).get("step"),
        "notices": result.get("notices", []),
        **({"mix": result["mix"]} if "mix" in result else {}),
        "export": result["export"],
    }


def show_students(results: list[dict[str, Any]], console: Console) -> None:
    """The table of all students, before → after training."""

    def change(line: dict[str, Any], key: str, digits: int) -> str:
        before, after = line[f"{key}_before"], line[f"{key}_after"]
        return "" if before is None or after is None else f"{number(before, digits)} → {number(after, digits)}"

    lines = [student_line(result) for result in results]
    console.table(
        ["student", "layers", "steps", "held-out KL to the teacher (nats)", "top-1 agreement", "perplexity"],
        [[s["name"], str(s["layers"]), str(s["steps"]), *(change(s, *measure) for measure in _SHOWN)] for s in lines],
        title="students on the held-out documents, before → after training",
    )


_SHOWN = (("kl", 3), ("top1", 3), ("ppl", 2))


def job_of(recipe: Recipe, student: StudentConfig) -> StudentJob:
    """What the student's process is to do. Raises StoreError if the corpus or the store is not there, or not all."""
    manifest = Manifest.open(manifest_path(recipe))
    return job_on(recipe, student, pinned(recipe, student, manifest, student_folder(recipe, student)))


def job_on(recipe: Recipe, student: StudentConfig, snapshot: Path | None) -> StudentJob:
    """The same on a snapshot that is pinned already."""
    return StudentJob(
        student=student,
        manifest=manifest_path(recipe),
        snapshot=snapshot,
        run_dir=student_folder(recipe, student),
        tokenizer=recipe.run_dir / "tokenizer",
        # As the recipe has it: a finished student is found without the teacher's files.
        teacher=Path(recipe.teacher.model) if student.model.cut is not None else None,
        start=start_of(student),
        processes=recipe.train.processes,
        rank_timeout_s=recipe.train.rank_timeout_s,
    )


def start_of(student: StudentConfig) -> str | None:
    """Digest of the folder in which the student's weights start; None for a cut, a hub's id, and a folder that is not
    there (a finished student is found without it). Hashed once, then remembered by size and time of change."""
    folder = Path(student.model.from_ or "")
    if student.model.from_ is None or not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return None
    from stillroom.workers.digests import model_digests
    from stillroom.workers.source import cache_folder

    return "-".join(model_digests(folder, cache_dir=cache_folder()))


def _teacher_folder(recipe: Recipe) -> Path:
    from stillroom.workers.source import resolve_model

    return resolve_model(recipe.teacher.model)
