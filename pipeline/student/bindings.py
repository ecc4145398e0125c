"""What a run is tied to, and whether it is already finished. Answered before torch is imported.

Enters: job, manifest, snapshot. Leaves: `Bindings`, the finished run's result, or StudentError. Costs: the manifest's
footer and the snapshot's list; no tensor, no model.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.pipeline.student.config import StudentConfig, StudentJob
from stillroom.pipeline.student.mix import sources_of
from stillroom.storage.errors import StudentError
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot

#: "config": `StudentConfig.numbers()`; "manifest", "snapshot": digests (None without a snapshot); "planned": of the
#: snapshot's units alone, by which a student is known that began before all of them were scored. "corpora": digests of
#: the manifests that phases name, by path; left out where none does. "base": of the weights under adapters, where there
#: are any, in what the student's process has written. "sources": (name, documents) of each source of the corpus, in
#: order, where they are mixed. "start": of the folder where the weights start, where it is known.
Bindings = dict[str, Any]

RESULT = "result.json"
EXPORT = "export"
LOG = "log.jsonl"


def bindings_of(job: StudentJob, manifest: Manifest, snapshot: Snapshot | None) -> Bindings:
    """All that must be the same for two runs to be one."""
    return _without_store(job.student, manifest, job.start) | {
        "snapshot": None if snapshot is None else snapshot.digest,
        "planned": None if snapshot is None else snapshot.planned_digest,
    }


def asked_now(held: Bindings, student: StudentConfig, manifest: Manifest, start: str | None) -> Bindings:
    """Bindings as far as they are known without the store; the rest is taken to be as `held` has it. start: see
    `StudentJob`."""
    rest = {key: held[key] for key in ("snapshot", "planned", "base") if key in held}
    return rest | _without_store(student, manifest, start)


def _without_store(student: StudentConfig, manifest: Manifest, start: str | None) -> Bindings:
    corpora = {str(path): Manifest.open(path).digest for path in student.corpora()}
    return {
        "config": student.numbers(),
        "manifest": manifest.digest,
        # Not in those of a release that had none.
        **({"corpora": corpora} if corpora else {}),
        **({"sources": [list(source) for source in sources_of(manifest)]} if student.mix else {}),
        **({"start": start} if start else {}),
    }


def require_same(stored: Bindings, asked: Bindings, where: object) -> None:
    """Raises StudentError naming each part in which what lies at `where` differs from what is asked for."""
    differing = differences(stored, asked)
    if differing:
        raise StudentError(
            f"{where} belongs to another run ({'; '.join(differing)}). Restore what it was trained with, or give this "
            "student a name of its own, or put this one aside: `stillroom run --redo`."
        )


def differences(stored: Bindings, asked: Bindings) -> list[str]:
    """Each part in which two runs differ, in words; none: they are one. A run and a dry run both go by this."""
    then, now = _flat(stored["config"]), _flat(asked["config"])
    differing = [
        f"{key}: {then.get(key)} there, {now.get(key)} asked"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    began_open = stored["snapshot"] is not None and stored["snapshot"] == asked.get("planned")
    differing += [
        f"{key}: {stored[key]} there, {asked[key]} now ({what} changed since)"
        for key, what in (("manifest", "the corpus"), ("snapshot", "the store's list of shards"))
        if stored[key] != asked[key] and not (key == "snapshot" and began_open)
    ]
    differing += [
        f"{key}: {stored[key]} there, {asked[key]} now ({what} changed)"
        for key, what in (("base", "the weights under the adapters"), ("start", "what model.from names"))
        if key in stored and key in asked and stored[key] != asked[key]
    ]
    if stored.get("sources") != asked.get("sources") and stored["config"].get("mix") == asked["config"].get("mix"):
        differing.append(f"sources: {stored.get('sources')} there, {asked.get('sources')} now (names of the corpus's)")
    there, now_there = stored.get("corpora", {}), asked.get("corpora", {})
    return differing + [
        f"{path}: {there[path]} there, {now_there[path]} now"
        for path in sorted(there.keys() & now_there.keys())
        if there[path] != now_there[path]
    ]


def _flat(config: dict[str, Any], within: str = "") -> dict[str, Any]:
    """Sections of sections as `losses.alpha`, phases as `phases.0.steps`, so that what differs is named and not all
    that lies beside it."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if value and isinstance(value, list) and all(isinstance(part, dict) for part in value):
            value = {str(at): part for at, part in enumerate(value)}
        found |= _flat(value, f"{within}{key}.") if value and isinstance(value, dict) else {f"{within}{key}": value}
    return found


def held_in(folder: Path) -> tuple[Path, Bindings] | None:
    """What a student's folder is bound to, and the file that says so: its result, or while it has none its newest
    checkpoint that can be read. None: nothing is begun. Raises StudentError for a result that is none."""
    if (folder / RESULT).exists():
        return folder / RESULT, read_result(folder / RESULT)["bindings"]
    for path in sorted((folder / "checkpoints").glob(f"step-{8 * '[0-9]'}/state.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged: a run passes over it as well
            bindings: Bindings = json.loads(path.read_text())["bindings"]
            bindings["config"], bindings["manifest"], bindings["snapshot"]
            return path.parent, bindings
    return None


def finished(job: StudentJob, bindings: Bindings) -> dict[str, Any] | None:
    """The result of this very run if it is complete: then nothing is left to do. Raises StudentError if the folder
    holds another finished run, or one that should be exported again and cannot be."""
    path = job.run_dir / RESULT
    if not path.exists():
        return None
    result = read_result(path)
    require_same(result["bindings"], bindings, path)
    if not (job.run_dir / EXPORT).is_dir():
        return None
    otherwise = exported_otherwise(job.run_dir, result, job.student)
    if otherwise is None:
        return result
    if not otherwise.possible:
        raise StudentError(f"{job.run_dir / EXPORT}: {otherwise.why}; set it back, or `stillroom run --redo`")
    return None


@dataclass(frozen=True)
class Otherwise:
    """A finished student whose weights were written in another type than is asked for. possible: whether they can be
    written again: the checkpoint is there from which they are."""

    why: str
    possible: bool


def exported_otherwise(folder: Path, result: dict[str, Any], student: StudentConfig) -> Otherwise | None:
    """None where the type is the one that is asked for, or that of an earlier release, which did not say."""
    there, asked = result.get("export_dtype", student.export_dtype), student.export_dtype
    if there == asked:
        return None
    steps = {result["steps"], *([result["best"]["step"]] if result.get("best") else [])}
    possible = all((folder / "checkpoints" / f"step-{step:08d}").is_dir() for step in steps)
    how = "it is exported again from its checkpoint" if possible else "the checkpoint that it is made from is gone"
    return Otherwise(f"export_dtype: {there} there, {asked} asked, and {how}", possible)


def read_result(path: Path) -> dict[str, Any]:
    """A `result.json`. Raises StudentError if it is none."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        result["bindings"]["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise StudentError(f"{path} cannot be read ({error}): remove it to export again") from error
    return result
