"""How far a run is, read from the files that it writes: from another terminal, or another machine that sees them.

Enters: a run's folder. Leaves: a line for each part of each stage, with rates, what is left and what it waits for.
Costs: a few small files and the end of each student's log; no torch, no teacher, nothing is locked or written.

A part is done, at work, stopped, or not begun. At work is what has written within `SILENCE_S`: a process on another
machine leaves no other sign.
"""

import json
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from stillroom.pipeline.progress_file import PROGRESS
from stillroom.pipeline.student.bindings import LOG, RESULT
from stillroom.storage.errors import StillroomError, StoreError
from stillroom.storage.files import open_files

#: Written by a recipe with stages: their names and folders, in order.
STAGES = "stages.json"
#: In a run's folder: its recipe with every field, by which `status` and `report` read the folder.
RESOLVED = "recipe.resolved.yaml"
#: Three heartbeats of a teacher, and a step and an evaluation of most students.
SILENCE_S = 60.0
#: Steps that a student's rate is taken over.
RECENT = 20


def status_command(run: str) -> dict[str, Any]:
    """`stillroom status`. Raises StoreError if the folder is no run's."""
    folder = Path(run)
    stages = folder / STAGES
    if stages.exists():
        listed = json.loads(stages.read_text())
        found = [(stage["name"], Path(stage["run_dir"])) for stage in listed["stages"]]
        parts = [{"stage": name, **part} for name, path in found for part in _parts(path)]
        return {"run": listed["recipe"], "state": _overall(parts), "parts": parts}
    if not (folder / RESOLVED).exists():
        raise StoreError(f"{run} is no run's folder: it has no {RESOLVED}, which the first command on a recipe writes")
    parts = _parts(folder)
    return {"run": _recipe(folder)["name"], "state": _overall(parts), "parts": parts}


def _overall(parts: list[dict[str, Any]]) -> str:
    states = [part["state"] for part in parts]
    if all(state == "done" for state in states):
        return "done"
    return "at work" if "at work" in states else "stopped" if "stopped" in states else "not begun"


def _recipe(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / RESOLVED).read_text(encoding="utf-8"))
    return found


def _parts(folder: Path) -> list[dict[str, Any]]:
    """Of one run. A stage that is not reached yet has one line."""
    if not (folder / RESOLVED).exists():
        return [{"part": "all", "state": "not begun"}]
    recipe = _recipe(folder)
    found = []
    if recipe.get("generate"):
        found.append({"part": "generate", **_teaching(recipe["generate"]["path"], recipe["name"], "generated")})
    corpus = folder / "corpus.parquet"
    found.append({"part": "corpus", "state": "done" if corpus.exists() else "not begun"})
    found.append({"part": "teach", **_teaching(recipe["store"]["path"], recipe["name"], "scored")})
    for student in recipe.get("students") or []:
        found.append({"part": f"train {student['name']}", **_training(folder / "students" / student["name"], student)})
    evaluated = (folder / "evaluation.json").exists() and all(p["state"] == "done" for p in found)
    found.append({"part": "evaluate", "state": "done" if evaluated else "not begun"})
    return found


def _teaching(uri: str, run: str, done: str) -> dict[str, Any]:
    """Of a store, by the progress file of who wrote to it last. done: what a unit is called there that is done."""
    try:
        files = open_files(str(uri))
        if not files.exists(PROGRESS):
            return {"state": "not begun"}
        return _stated(json.loads(files.read(PROGRESS)), run, done)
    except (KeyError, TypeError) as error:
        told = f"{type(error).__name__} {error}; teaching writes it anew"
        return {"state": "unknown", "waits_for": f"{uri}/{PROGRESS} is damaged: {told}"}
    except (StillroomError, ValueError) as error:
        return {"state": "unknown", "waits_for": f"{uri} cannot be read: {error}"}


def _stated(held: dict[str, Any], run: str, done: str) -> dict[str, Any]:
    """Of a progress file's contents. Raises KeyError, TypeError, ValueError for what is none."""
    units, actors = held["units"], held["actors"]
    age_s = (datetime.now(UTC) - datetime.fromisoformat(held["updated_at"])).total_seconds()
    state = {"done": "done", "stopped": "stopped"}.get(held["state"], "at work" if age_s < SILENCE_S else "stopped")
    found = {"state": state, "done": units[done], "of": units["planned"], "rate": _rate(held)}
    left_s = _left_s(held, units["pending"], units[done])
    if state == "at work":
        waits_for = _teachers(actors, units[done], done)
        found |= {"left_s": left_s, "waits_for": waits_for, "silent_s": round(max(age_s, 0.0), 1)}
    if held["run"] != run:
        found["waits_for"] = f"the store is written by run {held['run']}"
    if held.get("quarantined"):
        found["left_out"] = len(held["quarantined"])
    return found


def _rate(held: dict[str, Any]) -> str | None:
    if held.get("tokens_per_s"):
        return f"{held['tokens_per_s']:,.0f} tokens/s"
    if held.get("tokens_generated") and held["seconds"]:
        return f"{held['tokens_generated'] / held['seconds']:,.0f} tokens/s"
    return None


def _left_s(held: dict[str, Any], pending: int, done: int) -> float | None:
    return round(held["seconds"] / done * pending, 1) if done else None


def _teachers(actors: dict[str, int], finished: int, done: str) -> str:
    if actors["ready"] < actors["wanted"]:
        what = "engines to start (vLLM: 40 s is usual on a CPU)" if done == "generated" else "actors to start"
        return f"{actors['wanted'] - actors['ready']} of {actors['wanted']} {what}"
    return "" if finished else "the first unit"


def _training(folder: Path, student: dict[str, Any]) -> dict[str, Any]:
    total = _total(student)
    if (folder / RESULT).exists():
        result = json.loads((folder / RESULT).read_text())
        return {
            "state": "done",
            "done": result["steps"],
            "of": result["steps"],
            "kl": (result["after"] or {}).get("kl"),
        }
    log = folder / LOG
    if not log.exists():
        return {"state": "not begun", **({"of": total} if total else {})}
    steps, evaluation = _recent(log)
    silent_s = max(time.time() - log.stat().st_mtime, 0.0)
    state = "at work" if silent_s < SILENCE_S else "stopped"
    found: dict[str, Any] = {"state": state, "done": steps[-1]["step"] if steps else 0, "of": total}
    if steps:
        seconds = [record["tokens"] / record["tokens_per_s"] for record in steps if record["tokens_per_s"]]
        per_step = sum(seconds) / len(seconds) if seconds else 0.0
        found |= {"rate": f"{sum(r['tokens'] for r in steps) / max(sum(seconds), 1e-9):,.0f} tokens/s",
                  "loss": steps[-1]["loss"]}  # fmt: skip
        if state == "at work" and total:
            found["left_s"] = round(per_step * (total - steps[-1]["step"]), 1)
        waits = sum(record["data_wait"] for record in steps) / len(steps)
        if state == "at work":
            found["waits_for"] = f"data, {waits:.0%} of the time" if waits >= 0.02 else ""
    if state == "at work":
        found["silent_s"] = round(silent_s, 1)
    return found | ({"kl": evaluation["kl"]} if evaluation else {})


def _total(student: dict[str, Any]) -> int | None:
    phases = student.get("phases")
    return sum(phase["steps"] for phase in phases) if phases else student.get("steps")


def _recent(log: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The last steps and the last evaluation; a line that is half written is not there yet."""
    steps: deque[dict[str, Any]] = deque(maxlen=RECENT)
    evaluation = None
    with log.open(encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["kind"] == "step":
                steps.append(record)
            else:
                evaluation = record
    return list(steps), evaluation
