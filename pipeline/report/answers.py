"""What each student says to the text that the page shows: asked once, kept in the run's folder.

Enters: documents and a run's students. Leaves: `report/<student>.npz` and its arrays. Costs: a process for each student
that was not asked about this text with these weights before.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.pipeline.console import Console
from stillroom.pipeline.measured import weights_of
from stillroom.pipeline.report.documents import Document, Window
from stillroom.pipeline.report.teacher import TOP, TeacherRows
from stillroom.storage.errors import StoreError
from stillroom.storage.files import LocalFiles
from stillroom.storage.records import digest128

#: In the run's folder.
FOLDER = "report"


@dataclass(frozen=True, eq=False)
class Answers:
    """A student's rows on all windows of all documents, in their order.

    ids: int32 [R, TOP]; probabilities: float32 [R, TOP]; kl: float32 [R], nats, NaN where it is not known.
    """

    ids: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    kl: NDArray[np.float32]


def ask(
    run: dict[str, Any], documents: Seq[Document], *, vocabulary: int, has_kl: bool, console: Console
) -> dict[str, Answers]:
    """By student's name, of those that have an export. One that cannot be asked is left out, with a sentence in the
    run's `missing` and a notice."""
    windows = [window for document in documents for window in document.windows]
    found: dict[str, Answers] = {}
    for student in run["students"]:
        if student["export"] is None or not windows:
            continue
        try:
            found[student["name"]] = _ask(run, student, windows, vocabulary, has_kl, console)
        except _CannotSay as error:
            sentence = (
                f"Student {student['name']} could not be asked about the text, the token viewer lacks it: {error}"
            )
            run["missing"].append(sentence)
            console.notice(f"report: {sentence}")
    return found


class _CannotSay(Exception):
    """The last line of what its process said."""


def _ask(
    run: dict[str, Any], student: dict[str, Any], windows: list[Window], vocabulary: int, has_kl: bool, console: Console
) -> Answers:
    request = request_of(windows)
    folder, kept = Path(student["export"]), Path(run["folder"]).absolute() / FOLDER / f"{student['name']}.npz"
    stated = kept.with_suffix(".json")
    weights = weights_of(folder)
    text = digest128(b"stillroom.report.1", *(array.tobytes() for _, array in sorted(request.items())))
    of = {"weights": weights, "text": text, "top": TOP, "kl": has_kl}
    if not (kept.is_file() and stated.is_file() and _same(stated, of)):
        console.info(f"report: asking {student['name']} about {sum(w.stop - w.start for w in windows):,} tokens")
        with tempfile.TemporaryDirectory(prefix="stillroom-report-") as scratch:
            np.savez(Path(scratch) / "request.npz", **request)  # type: ignore[arg-type]
            answer = Path(scratch) / "answer.npz"
            _run(
                {
                    "folder": str(folder),
                    "device": (run["recipe"].get("teacher") or {}).get("device") or "auto",
                    "trust_remote_code": bool((run["recipe"].get("teacher") or {}).get("trust_remote_code")),
                    "vocabulary": vocabulary,
                    "request": str(Path(scratch) / "request.npz"),
                    "answer": str(answer),
                    "has_kl": has_kl,
                }
            )
            data = answer.read_bytes()
            try:
                files = LocalFiles(kept.parent)
                files.write(kept.name, data)
                files.write(stated.name, json.dumps(of).encode())
            except StoreError as error:  # someone else's run may be read and not written
                console.notice(f"report: what {student['name']} said is not kept: {error}")
            return _read(answer)
    return _read(kept)


def _same(stated: Path, of: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(stated.read_text()) == of)
    except (OSError, ValueError):
        return False


def _read(path: Path) -> Answers:
    with np.load(path) as held:
        return Answers(held["ids"], held["probabilities"], held["kl"])


def _run(request: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stillroom.pipeline.report.student"],
        input=json.dumps(request), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise _CannotSay((done.stderr.strip().splitlines() or ["no message"])[-1])


def request_of(windows: Seq[Window]) -> dict[str, NDArray[Any]]:
    """Windows as flat arrays: ids end to end with their lengths, rows start … stop − 1 of each, and the teacher's kept
    ids int32 [R, K], logits float32 [R, K] and tail_lse float32 [R] at these rows."""
    teacher = TeacherRows.concatenate([window.teacher for window in windows])
    return {
        "ids": np.concatenate([window.sequence.input_ids for window in windows]).astype(np.int32),
        "lengths": np.array([len(window.sequence.input_ids) for window in windows], np.int64),
        "starts": np.array([window.start for window in windows], np.int64),
        "stops": np.array([window.stop for window in windows], np.int64),
        "kept": teacher.ids,
        "logits": teacher.logits,
        "tail_lse": teacher.tail_lse,
    }
