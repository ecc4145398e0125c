"""What the stages around teaching and training took: generation, corpus, evaluation.

Enters: a run's folder. Leaves: plain numbers; what earlier releases did not write down is None, never 0. Costs: a few
small files; of generation one read of the table of verdicts.
"""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

from stillroom.pipeline.corpus.verdicts import KEPT, read_verdicts
from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.measured import FOLDER
from stillroom.pipeline.quality.judge import REASONS
from stillroom.pipeline.recipe.schema import VERDICTS
from stillroom.storage.errors import StillroomError


def corpus_s(folder: Path, manifest: str) -> float | None:
    """Seconds in which the corpus of this digest was read; the last time, if it was more than once."""
    found = [entry.get("wall_s") for entry in Ledger(folder / "ledger.corpus.jsonl").entries()
             if entry.get("manifest") == manifest]  # fmt: skip
    return found[-1] if found else None


def evaluation_s(folder: Path, models: Iterable[str]) -> dict[str, Any]:
    """wall_s: seconds that measuring these models took, each in its own process, together, whatever run it was in; None
    if none is known. whole: whether every one of their measurements has its time.

    Kept by `pipeline.measured` as MODEL.json, and MODEL.WHAT.json for what else was measured of it.
    """
    total, untimed = 0.0, 0
    for path in {path for name in models for path in (folder / FOLDER).glob(f"{escape(name)}.*")}:
        with suppress(OSError, ValueError, AttributeError):
            wall_s = json.loads(path.read_text(encoding="utf-8")).get("wall_s")
            untimed += wall_s is None
            total += wall_s or 0.0
    return {"wall_s": total or None, "whole": not untimed}


def generation(folder: Path, recipe: dict[str, Any], missing: list[str]) -> dict[str, Any] | None:
    """What the generating stage made, over all commands of the run; None of a recipe without one.

    Counts of responses are None where they are not judged yet. tokens: of the responses judged; tokens_per_s: while
    generating, all engines together, their start left out.
    """
    if not recipe.get("generate"):
        return None
    ledger = Ledger(folder / "ledger.generate.jsonl")
    entries = ledger.entries()
    found: dict[str, Any] = {
        "responses": None, "kept": None, "tokens": None, "dropped": [],
        "units": sum(entry.get("units_scored") or 0 for entry in entries),
        "bytes": sum(entry.get("bytes_written") or 0 for entry in entries) if entries else None,
        "wall_s": sum(entry.get("wall_s") or 0.0 for entry in entries) if entries else None,
        "tokens_per_s": ledger.rows_per_s(),
    }  # fmt: skip
    try:
        table = read_verdicts(folder / VERDICTS)[0]
    except StillroomError as error:
        missing.append(f"The responses cannot be counted: {error}.".replace("..", "."))
        return found
    reasons = Counter(table["reason"].to_pylist())
    dropped = [*REASONS, *sorted(set(reasons) - {KEPT, *REASONS})]
    return found | {
        "responses": reasons.total(),
        "kept": reasons[KEPT],
        "tokens": sum(table["tokens"].to_pylist()),
        "dropped": [{"reason": reason, "responses": reasons[reason]} for reason in dropped if reasons[reason]],
    }
