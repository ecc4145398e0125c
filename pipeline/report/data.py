"""A run's folder as plain numbers. A pure function of its files: a chain's stages can be gathered one by one.

Enters: the folder of `stillroom run`, in whatever state. Leaves: a JSON-able dictionary, and in it what is missing, in
words. Costs: the student's logs, about 400 bytes a step, and the corpus manifest's footer; no shard is read.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.report.spent import corpus_s, evaluation_s, generation
from stillroom.pipeline.run_status import RESOLVED, STAGES
from stillroom.pipeline.student.bindings import EXPORT, RESULT
from stillroom.storage.errors import StillroomError, UsageError
from stillroom.storage.files import open_files
from stillroom.storage.manifest import Manifest
from stillroom.storage.store import IDENTITY

#: Points of a curve at most; of a longer log each point is the mean of as many steps as needed.
POINTS = 300

#: What is drawn of a step's record.
STEP_CURVES = ("loss", "kd", "ce", "temperature", "alpha", "lr")
EVALUATION_CURVES = ("kl", "top1", "perplexity")


def run_folders(folder: Path) -> list[Path]:
    """The run itself, or the stages of a chain (`stages/NAME/`) that have begun, in the chain's order; where that is
    not told, in the order in which they were begun.

    Raises UsageError where there is neither.
    """
    stages = [path.parent for path in folder.glob(f"stages/*/{RESOLVED}")]
    own = [folder] if (folder / RESOLVED).is_file() else []
    order = {name: at for at, name in enumerate(_stages(folder))}
    found = own + sorted(
        stages, key=lambda path: (order.get(path.name, len(order)), (path / RESOLVED).stat().st_mtime_ns, path.name)
    )
    if not found:
        raise UsageError(
            f"{folder} is no run: it has no {RESOLVED}; give the folder that the recipe's run_dir names, or for a "
            "store `stillroom inspect STORE --html FILE`"
        )
    return found


def gather_chain(folder: Path) -> dict[str, Any] | None:
    """Of a chain: name, students (of its summary, one row for each student of all stages), missing (sentences). None of
    a plain run."""
    listed, summary = _json(folder / STAGES), _json(folder / "summary.json")
    if summary is not None and not isinstance(summary.get("stages"), list):
        summary = None
    if listed is None and summary is None:
        return None
    name = str((summary or {}).get("recipe") or (listed or {}).get("recipe") or folder.name)
    waiting = [stage for stage in _stages(folder) if not (folder / "stages" / stage / RESOLVED).is_file()]
    missing = [f"Stage {stage} has not begun." for stage in waiting]
    if summary is None:
        missing.append("The chain has not ended (no summary.json): its stages are not compared.")
    rows = [row for row in (summary or {}).get("students") or [] if isinstance(row, dict)]
    return {"name": name, "students": rows, "missing": missing}


def _stages(folder: Path) -> list[str]:
    """Names of a chain's stages in order, where its run has told them."""
    listed = (_json(folder / STAGES) or {}).get("stages") or []
    return [str(stage["name"]) for stage in listed if isinstance(stage, dict) and "name" in stage]


def teacher_shown(model: str) -> str:
    """Of a student of an earlier stage its stage and name, as in the table that compares stages; else the model.

    >>> teacher_shown("runs/chain/stages/half/students/small/export"), teacher_shown("org/model")
    ('half/small', 'org/model')
    """
    found = re.search(r"(?:^|/)stages/([^/]+)/students/([^/]+)/export/?$", model)
    return f"{found[1]}/{found[2]}" if found else model


def gather_run(folder: Path) -> dict[str, Any]:
    """Keys: name, folder, recipe (as resolved), summary and evaluation or None, evaluation_s, generation, corpus,
    ledger, students, store (a URI that opens, or None), missing (sentences). Raises UsageError if the recipe cannot be
    read."""
    recipe = _recipe(folder / RESOLVED)
    missing: list[str] = []
    summary = _json(folder / "summary.json")
    evaluation = _json(folder / "evaluation.json")
    students = [_student(folder, asked, missing) for asked in recipe.get("students") or []]
    if not students:
        missing.append("The recipe has no students: there are no curves, and the token viewer shows the teacher alone.")
    if evaluation is None:
        missing.append("Not evaluated yet (no evaluation.json): there is no table of teacher and students.")
    if summary is None:
        missing.append("The run has not ended (no summary.json): numbers are of what is there so far.")
    store = find_store(folder, recipe, summary)
    if store is None:
        missing.append("The store is not there (not taught yet, or moved): nothing of the teacher can be shown.")
    return {
        # A chain's stages may all have the chain's name.
        "name": folder.name if folder.parent.name == "stages" else str(recipe.get("name") or folder.name),
        "folder": str(folder),
        "recipe": recipe,
        "summary": summary,
        "evaluation": evaluation,
        "evaluation_s": evaluation_s(folder, [str(m.get("name")) for m in (evaluation or {}).get("models") or []]),
        "generation": generation(folder, recipe, missing),
        "corpus": _corpus(folder / "corpus.parquet", missing),
        "ledger": ledger_rows(Ledger(folder / "ledger.jsonl").entries(), [s["name"] for s in students]),
        "students": students,
        "store": store,
        "missing": missing,
    }


def _recipe(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no recipe: it holds {type(found).__name__}, expected a mapping")
    return found


def _json(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def find_store(folder: Path, recipe: dict[str, Any], summary: dict[str, Any] | None) -> str | None:
    """The run's store, also where the run's folder was moved with the store in it."""
    path = str((recipe.get("store") or {}).get("path") or "")
    candidates = [str(summary["store"])] if summary and summary.get("store") else []
    candidates += [path] if path else []
    run_dir = str(recipe.get("run_dir") or "")
    with suppress(ValueError):
        candidates.append(str(folder / Path(path).relative_to(run_dir)))
    for uri in candidates:
        with suppress(StillroomError, OSError):
            files = open_files(uri)
            if files.exists(IDENTITY):
                return files.uri
    return None


def _corpus(path: Path, missing: list[str]) -> dict[str, Any] | None:
    try:
        meta = Manifest.open(path).meta
    except StillroomError:
        missing.append("The corpus is not read yet (no corpus.parquet): there are no documents to show.")
        return None
    counts = meta.counts
    return {
        "bytes": path.stat().st_size,
        "wall_s": corpus_s(path.parent, meta.rows_digest),
        "window": meta.window,
        "documents": counts.get("documents"),
        "heldout_documents": counts.get("heldout_documents"),
        "sequences": meta.rows,
        "tokens": counts.get("tokens"),
    }


def ledger_rows(entries: Iterable[dict[str, Any]], students: Iterable[str]) -> list[dict[str, Any]]:
    """What the teacher did on behalf of each student, those first who cost nothing too; "" is a run without students.

    The second student's row of zeros is what a store is for.
    """
    columns = ("units_scored", "teacher_batches", "tokens_scored", "bytes_written", "wall_s")
    rows: dict[str, dict[str, Any]] = {name: dict.fromkeys(columns, 0) for name in students}
    for entry in entries:
        row = rows.setdefault(str(entry.get("on_behalf_of", "")), dict.fromkeys(columns, 0))
        for column in columns:
            row[column] += entry.get(column) or 0
    return [{"on_behalf_of": name, **row} for name, row in rows.items()]


def _student(folder: Path, asked: dict[str, Any], missing: list[str]) -> dict[str, Any]:
    name = str(asked.get("name"))
    place = folder / "students" / name
    steps, evaluations = read_log(place / "log.jsonl")
    result = _json(place / RESULT)
    export = place / EXPORT
    there = result is not None and (export / "config.json").is_file()
    if not steps and result is None:
        missing.append(f"Student {name} has not begun to train.")
    elif result is None:
        done, total = steps[-1].get("step"), asked.get("steps")
        missing.append(f"Student {name} is not trained to its end: step {done} of {total or 'those of its epochs'}.")
    elif not there:
        missing.append(f"Student {name} has no export: the token viewer lacks it.")
    curves = {key: thin(points_of(steps, key)) for key in STEP_CURVES}
    curves |= {key: points_of(evaluations, key) for key in EVALUATION_CURVES}
    return {
        "name": name,
        "steps": len(steps),
        "skipped_steps": sum(bool(step.get("skipped")) for step in steps),
        "result": result,
        "export": str(export) if there else None,
        "export_bytes": sum(p.stat().st_size for p in export.glob("*.safetensors")) if there else None,
        "temperature": (asked.get("losses") or {}).get("temperature"),
        "curves": {key: points for key, points in curves.items() if points},
        "steps_per_point": max(1, -(-len(steps) // POINTS)),
    }


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(steps, evaluations) of a student's log; a line that a kill has torn is passed over."""
    found: dict[str, list[dict[str, Any]]] = {"step": [], "evaluation": []}
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                found[record["kind"]].append(record)
    return found["step"], sorted(found["evaluation"], key=lambda record: int(record["step"]))


def points_of(records: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) where there is a number."""
    return [(int(r["step"]), float(r[key])) for r in records if isinstance(r.get(key), int | float)]


def thin(points: list[tuple[int, float]], limit: int = POINTS) -> list[tuple[int, float]]:
    """At most `limit` points: the mean of consecutive ones, at the last one's step.

    >>> thin([(1, 1.0), (2, 3.0), (3, 5.0)], 2)
    [(2, 2.0), (3, 5.0)]
    """
    each = -(-len(points) // limit) if points else 1
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
