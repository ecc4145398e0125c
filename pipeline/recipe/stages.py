"""Stages, presets and defaults for students, laid out before a recipe is validated: what is written once, said once.

Enters: a `Document`. Leaves: a plain recipe's document for each stage. Costs: a copy of the values.

    preset:            a recipe of ours, under all that this one says
    student_defaults:  under each of the students
    stages:            a list; each lies over the rest of the recipe, and is a plain recipe then

Mappings are merged key by key; lists and values replace what lies under them. A stage's folder is `stages/NAME` in the
run's. Its teacher may be a student of an earlier stage, `teacher: {stage: NAME, student: NAME}`: that is the folder
into which it is exported. Stages whose teacher and signal are written alike share one store, the first one's.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from stillroom.pipeline.recipe.document import Document, KeyPath, dotted, nearest, parse_document, shown
from stillroom.storage.errors import RecipeError

STAGES, PRESET, DEFAULTS = "stages", "preset", "student_defaults"
#: Keys of a recipe that are laid out before it is validated, with what they mean.
LAYOUT = {
    PRESET: "A recipe of ours that lies under this one: {presets}. What this one says goes over it, key by key.",
    DEFAULTS: "Fields that each of the students has unless it says otherwise.",
    STAGES: "Parts of the run, one after the other: each has a name, and lies over the rest of the recipe. Its teacher "
    "may be a student of an earlier stage: teacher: {stage: NAME, student: NAME}.",
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class StageDocument:
    """A stage as a plain recipe. name: empty for a recipe without stages. taught_by: (stage, student) of its teacher,
    where that is a student of this recipe."""

    name: str
    document: Document
    taught_by: tuple[str, str] | None = None


def presets() -> list[str]:
    """Names of those that there are."""
    folder = resources("stillroom.pipeline.recipe") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The preset as written. Raises RecipeError naming those that there are."""
    if name not in presets():
        raise RecipeError(f"there is no preset {name}{nearest(name, presets())}; there are {', '.join(presets())}")
    return (resources("stillroom.pipeline.recipe") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def stage_documents(document: Document) -> list[StageDocument]:
    """One for each stage, in the order in which they run; one without a name where the recipe has no stages.

    Raises RecipeError for stages that are no list of named mappings, and a teacher that is no earlier stage's student.
    """
    document = _with_preset(document)
    if STAGES not in document.data:
        return [StageDocument("", _with_defaults(document))]
    stages = document.data[STAGES]
    if not isinstance(stages, list) or not stages:
        raise _refusal(document, (STAGES,), f"expected a list of stages, each with a name, got {shown(stages)}")
    base = {key: value for key, value in document.data.items() if key != STAGES}
    run_dir = Path(str(base.get("run_dir") or Path("runs") / str(base.get("name", ""))))
    found: list[StageDocument] = []
    for number, stage in enumerate(stages):
        name = _name_of(document, number, [earlier.name for earlier in found])
        data = merged(base, {key: value for key, value in stage.items() if key != "name"})
        data |= {
            "name": f"{base.get('name', '')}.{name}",
            "run_dir": str(stage.get("run_dir", run_dir / STAGES / name)),
        }
        data["teacher"], taught_by = _teacher(document, number, data.get("teacher"), found)
        data["store"] = _store(data, stage, name, found)
        found.append(StageDocument(name, _with_defaults(_moved(document, data, number)), taught_by))
    return found


def merged(under: Any, over: Any) -> Any:
    """What `over` says, and of `under` what it leaves out.

    >>> merged({"a": {"b": 1, "c": [1, 2]}, "d": 3}, {"a": {"c": [4]}, "e": None})
    {'a': {'b': 1, 'c': [4]}, 'd': 3, 'e': None}
    """
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {key: merged(under[key], value) if key in under else value for key, value in over.items()}


def _with_preset(document: Document) -> Document:
    if PRESET not in document.data:
        return document
    name = document.data[PRESET]
    if name not in presets():
        hint = nearest(str(name), presets())
        raise _refusal(document, (PRESET,), f"expected one of {', '.join(presets())}, got {shown(name)}{hint}")
    below = parse_document(preset_text(name), f"preset {name}").data
    return replace(document, data=merged(below, {k: v for k, v in document.data.items() if k != PRESET}))


def _with_defaults(document: Document) -> Document:
    """`student_defaults` put under each student, and taken out."""
    if DEFAULTS not in document.data:
        return document
    defaults, students = document.data[DEFAULTS], document.data.get("students")
    if not isinstance(defaults, dict | None):
        raise _refusal(document, (DEFAULTS,), f"expected fields of a student, got {shown(defaults)}")
    data = {key: value for key, value in document.data.items() if key != DEFAULTS}
    if isinstance(students, list):
        data["students"] = [merged(defaults or {}, student) for student in students]
    return replace(document, data=data)


def _name_of(document: Document, number: int, before: list[str]) -> str:
    stage, path = document.data[STAGES][number], (STAGES, number)
    if not isinstance(stage, dict):
        raise _refusal(document, path, f"expected a mapping with a name, got {shown(stage)}")
    name = stage.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _refusal(document, (*path, "name"), f"expected letters, digits, dots, dashes, got {shown(name)}")
    if name in before:
        raise _refusal(document, (*path, "name"), f"expected a different name for each stage, got {name} twice")
    return name


def _teacher(
    document: Document, number: int, teacher: Any, before: list[StageDocument]
) -> tuple[Any, tuple[str, str] | None]:
    """The teacher's section, and whose student it is."""
    if not isinstance(teacher, dict) or not {"stage", "student"} & teacher.keys():
        return teacher, None
    path: KeyPath = (STAGES, number, "teacher")
    stages, wanted = {stage.name: stage for stage in before}, teacher.get("stage")
    if wanted not in stages:
        there = f"one of {', '.join(stages)}" if stages else "a later stage: nothing comes before this one"
        raise _refusal(document, (*path, "stage"), f"expected an earlier stage, {there}, got {shown(wanted)}")
    data = stages[wanted].document.data
    students = data.get("students")
    names = [str(s.get("name")) for s in students if isinstance(s, dict)] if isinstance(students, list) else []
    student = teacher.get("student", names[0] if len(names) == 1 else None)
    if not isinstance(wanted, str) or not isinstance(student, str) or student not in names:
        listed = ", ".join(names) or "none"
        raise _refusal(
            document, (*path, "student"), f"expected a student of stage {wanted} ({listed}), got {shown(student)}"
        )
    rest = {key: value for key, value in teacher.items() if key not in ("stage", "student")}
    return rest | {"model": str(Path(data["run_dir"], "students", student, "export"))}, (wanted, student)


def _store(data: dict[str, Any], stage: dict[str, Any], name: str, before: Iterable[StageDocument]) -> Any:
    """The section of the store: a folder given for all of them has one for each teacher and signal."""
    store = data.get("store") or {}
    own = stage.get("store")
    if not isinstance(store, dict) or (isinstance(own, dict) and own.get("path")):
        return store
    for earlier in before:
        if all(earlier.document.data.get(key) == data.get(key) for key in ("teacher", "signal")):
            return store | {"path": earlier.document.data["store"]["path"]}
    given = store.get("path")
    return store | {"path": f"{str(given).rstrip('/')}/{name}" if given else str(Path(data["run_dir"], "store"))}


def _moved(document: Document, data: dict[str, Any], number: int) -> Document:
    """The stage's document: its keys stand where the stage has them, else where the recipe does."""
    above = (STAGES, number)

    def own(paths: Iterable[KeyPath]) -> dict[KeyPath, KeyPath]:
        return {path[2:]: path for path in paths if path[:2] == above and len(path) > 2}

    lines = {path: line for path, line in document.lines.items() if path[:1] != (STAGES,)}
    lines |= {path: document.lines[given] for path, given in own(document.lines).items()}
    given = {path for path in document.given if path[:1] != (STAGES,)} | own(document.given).keys()
    return replace(document, data=data, lines=lines, given=frozenset(given))


def _refusal(document: Document, path: KeyPath, words: str) -> RecipeError:
    return RecipeError(f"{document.where(path)}: {dotted(path)}: {words}")
