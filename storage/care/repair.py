"""Mends a store where that needs no person: what is broken stops counting, and is thereby queued to be scored again.

Enters: a store's URI. Leaves: a log that names good shards only, plans that name every one of them, and an account of
what was done. Costs: `verify`, and one or two commits.

    damaged, missing or wrong shard   dropped from the log; `stillroom teach` scores exactly its unit again, as what is
                                      pending is the corpus less the committed, and `stillroom generate` makes one of
                                      responses again. The file stays, for `stillroom gc`.
    log entry of wrong size or count  dropped and committed anew with what the file says
    damaged or lost plan              rebuilt from the shards' own sequences
    damaged fidelity sample           removed

A good shard is never touched. Every step leaves a store that is read as before, so a repair that was interrupted is
repeated from the start. Students that are pinned to a dropped shard fail when they come to it, and say what to do.
"""

import io
import re
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

import pyarrow.parquet as pq

from stillroom.storage import plans
from stillroom.storage.care.audit import Findings, Problem
from stillroom.storage.care.responses import ProgressCall
from stillroom.storage.care.verify import examine_any
from stillroom.storage.files import Files
from stillroom.storage.generations.store import GenerationStore, open_any
from stillroom.storage.log import CommitLog
from stillroom.storage.records import Receipt, ShardRef, Unit


def repair_store(uri: str, progress: ProgressCall | None = None) -> dict[str, Any]:
    """Verify a store of any kind, then mend what can be mended.

    Returns `verify_store`'s dictionary with `repaired` on every problem, and under `repair` what was done and what
    is to be made again. Raises what `verify_store` raises, and IdentityMismatch or FormatMismatch for a damaged
    identity file, which no repair can invent.
    """
    report = examine_any(open_any(uri), progress)
    done = _repair(report)
    found = report.as_dict()
    for shown, problem in zip(found["problems"], report.problems, strict=True):
        shown["repaired"] = problem.action is not None
    return found | {"repair": done, "problems_left": sum(p.action is None for p in report.problems)}


def _repair(report: Findings) -> dict[str, Any]:
    files = report.store.files
    # Plans before the log: a unit that the log names and no plan does is worse than one more plan.
    rebuilt = rebuild_plans(files, list(report.unplanned.values()), report.plans.damaged)
    log = CommitLog.open(report.store.uri)
    dropped = log.remove(_concerned(report.problems, "drop").values())
    corrected = _correct(log, report, {ref.path for ref in dropped})
    removed = [problem.file for problem in report.problems if problem.action == "remove"]
    for name in removed:
        files.delete(name)
    queued = [report.plans.units[ref.unit] for ref in dropped if ref.unit in report.plans.units]
    return {
        "units_dropped": sorted(ref.unit for ref in dropped),
        **_to_do(report, queued),
        # Their plan is lost with them: `teach` and `generate` find what they held in the corpus and the prompts.
        "units_of_unknown_size": len(dropped) - len(queued),
        "log_entries_corrected": corrected,
        "plans_rebuilt": rebuilt,
        "files_removed": removed,
    }


def _to_do(report: Findings, queued: Seq[Unit]) -> dict[str, int]:
    """What the units dropped are to their teacher."""
    sequences = sum(len(unit.sequences) for unit in queued)
    if isinstance(report.store, GenerationStore):
        return {
            "prompts_to_answer": sequences,
            "responses_to_generate": sequences * report.store.identity.decoding.n,
        }
    return {"sequences_to_score": sequences, "tokens_to_score": sum(sum(unit.tokens) for unit in queued)}


def _concerned(problems: Seq[Problem], action: str) -> dict[str, ShardRef]:
    return {p.ref.path: p.ref for p in problems if p.action == action and p.ref is not None}


def _correct(log: CommitLog, report: Findings, dropped: set[str]) -> int:
    """Commit the shards anew of which the log says something wrong; returns how many.

    A file cannot be dropped and added in one commit of a Delta log. Killed in between, the unit is one to be scored.
    """
    wrong = [ref for path, ref in _concerned(report.problems, "correct").items() if path not in dropped]
    sizes = {info.name: info.size_bytes for info in report.store.files.walk()} if wrong else {}
    receipts = []
    for ref in log.remove(wrong):
        unit = report.plans.units.get(ref.unit) or report.unplanned[ref.unit]
        shard = ShardRef(ref.unit, ref.path, ref.sha256, sizes[ref.path])
        receipts.append(Receipt(shard, len(unit.sequences), sum(unit.tokens), sum(unit.rows), batches=0, seconds=0.0))
    return len(log.commit(receipts))


def rebuild_plans(files: Files, units: Seq[Unit], damaged: Seq[str]) -> list[str]:
    """A plan of `units` in the place of the damaged or lost ones; returns its name, none where there is nothing to do.

    Plans hold units by rising digest of their first sequence (pipeline/plan.py), so a plan of which every unit is
    committed comes back as it was, under its own name. Units not committed are forgotten: the next teaching plans
    their sequences anew. The damaged files are removed last.
    """
    name = None
    if units:
        ordered = sorted(units, key=lambda unit: unit.sequences[0])
        name = _place(files, plans.plan_digest(ordered), damaged)
        sink = io.BytesIO()
        pq.write_table(plans.units_table(ordered), sink, compression="zstd", write_page_checksum=True)
        files.write(name, sink.getvalue())
    for old in damaged:
        if old != name:
            files.delete(old)
    return [name] if name else []


def _place(files: Files, digest: str, damaged: Seq[str]) -> str:
    """The name of a rebuilt plan: that of the damaged one it equals, or its number, or the first number missing, so
    that plans keep their order."""
    if any(digest in name for name in damaged):
        return next(name for name in damaged if digest in name)
    taken = set(_numbers(files.list(plans.FOLDER)))
    missing = (number for number in range(1, len(taken) + 2) if number not in taken)
    number = next(_numbers(damaged), None) or next(missing)
    return f"{plans.FOLDER}/{number:05d}-{digest}.parquet"


def _numbers(names: Seq[str]) -> Iterator[int]:
    for name in names:
        match = re.search(r"/(\d{5,})-", name)
        if match:
            yield int(match[1])
