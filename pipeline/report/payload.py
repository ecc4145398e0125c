"""What the token viewer is given: documents, rows and texts as compact JSON.

Enters: documents, the students' answers, the texts of ids. Leaves: a JSON-able dictionary. Costs: about 100 bytes a
token for the teacher and for each student.

    name, students: their names, kl_of: which of them have a KL
    texts: {id: text}, of the ids that occur
    documents: title, heldout, shown, tokens, ids [T], bare [indices of ids without a row],
               entropy [R], top [R][id, p, id, p …], students [{kl [R] or null, top [R]}]

Probabilities p are in 1/10,000, rounded; entropies and KL in nats to three digits.
"""

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.pipeline.report.answers import Answers
from stillroom.pipeline.report.documents import Document
from stillroom.pipeline.report.teacher import TOP, TeacherRows

#: Bytes that all tokens of a page may take, and bytes of a row for each model, for the budget of tokens.
TEXT_BYTES, ROW_BYTES = 1_600_000, 105

#: Tokens shown at most, whatever the budget: a student is to be asked about each.
MOST_TOKENS = 6000


def tokens_shown(students: int, groups: int = 1) -> int:
    """How many tokens one group's documents may show. students: of the page; groups: runs or stores on it."""
    return max(256, min(MOST_TOKENS, TEXT_BYTES // (ROW_BYTES * (1 + students))) // max(groups, 1))


def viewer(
    name: str, documents: Seq[Document], answers: dict[str, Answers], texts: dict[int, str] | None
) -> dict[str, Any]:
    """See the module's text. texts: None where the store has no table: ids stand for themselves."""
    used: set[int] = set()
    shown, row = [], 0
    for document in documents:
        teacher = TeacherRows.concatenate([window.teacher for window in document.windows])
        part = slice(row, row + len(teacher))
        row = part.stop
        entry = _document(document, teacher)
        entry["students"] = [_student(found, part) for found in answers.values()]
        used.update(entry["ids"])
        for tops in (entry["top"], *(s["top"] for s in entry["students"])):
            used.update(i for top in tops for i in top[::2])
        shown.append(entry)
    return {
        "name": name,
        "students": list(answers),
        "kl_of": [n for n, found in answers.items() if np.isfinite(found.kl).any()],
        "texts": {str(i): (texts or {}).get(i, f"⟨{i}⟩") for i in sorted(used)},
        "documents": shown,
    }


def _document(document: Document, teacher: TeacherRows) -> dict[str, Any]:
    bare, at = [], 0
    for window in document.windows:
        if window.start == 0:
            bare.append(at)
            at += 1
        at += window.stop - window.start
    entropy = np.round(teacher.entropy, 3).tolist() if teacher.ids.shape[1] else [None] * len(teacher)
    return {
        "title": document.title,
        "heldout": document.heldout,
        "shown": len(document.ids),
        "tokens": document.tokens,
        "ids": document.ids.tolist(),
        "bare": bare,
        "entropy": entropy,
        "top": _tops(teacher.ids[:, :TOP], teacher.probabilities[:, :TOP])
        if teacher.ids.shape[1]
        else entropy_less(teacher),
    }


def entropy_less(teacher: TeacherRows) -> list[list[int]]:
    """No ids at any row: a store of layers or attention maps alone."""
    return [[] for _ in range(len(teacher))]


def _student(found: Answers, part: slice) -> dict[str, Any]:
    kl = found.kl[part]
    return {
        "kl": [round(float(value), 3) for value in kl] if np.isfinite(kl).all() else None,
        "top": _tops(found.ids[part], found.probabilities[part]),
    }


def _tops(ids: NDArray[Any], probabilities: NDArray[Any]) -> list[list[int]]:
    shares = np.round(probabilities * 10_000).astype(int)
    return [
        [int(value) for i, p in zip(row, share, strict=True) if i >= 0 for value in (i, p)]
        for row, share in zip(ids.tolist(), shares.tolist(), strict=True)
    ]
