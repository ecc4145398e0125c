"""Is every committed byte what was committed, and is every row what the contract says?

Enters: a store's URI. Leaves: a report with a list of problems, empty if all is well. Costs: one read of the store,
one row group of it in memory at a time; about 300,000 tokens/s a core at k = 64 (reading alone: 600,000).

What each problem is and who can mend it stands with it; storage/care/repair.py mends what needs no person.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stillroom.storage.care.audit import (
    LOG,
    REPAIR,
    Plans,
    Problem,
    audit_plans,
    log_problems,
    sha256_of,
    side_problems,
)
from stillroom.storage.care.checks import Agreement, signal_problem
from stillroom.storage.errors import CorruptShard, FormatMismatch, IdentityMismatch, StoreError
from stillroom.storage.files import Files, open_files
from stillroom.storage.log import CommitLog
from stillroom.storage.records import ShardRef, Unit
from stillroom.storage.schema import shard_schema
from stillroom.storage.shard import FOLDER, ShardReader, signal_codec
from stillroom.storage.store import IDENTITY, Store, open_store

ProgressCall = Callable[[int, int], None]

RESCORE = f"{REPAIR} and `stillroom teach` on the recipe score its unit again"


def verify_store(uri: str, progress: ProgressCall | None = None) -> dict[str, Any]:
    """Read everything that is committed and check it.

    Digests and page checksums of shards, plans and side files; the log against the files; sequences against their
    digests and the plans; finite logits by falling rank, distinct ids inside the vocabulary, a tail that is a
    log-partition; and the alignment: over the whole store the agreement of stored top-1 with the text must peak where
    row t meets token t + 1.

    progress: called with (shards done, shards in all). Returns a dictionary with `problems`, a list of
    {shard or file, problem, remedy}, and what was counted; `alignment` is None where there is nothing to compare.
    Raises FormatMismatch where there is no store, StoreError where the log, a plan or a side file cannot be reached.
    """
    files = open_files(str(uri))
    if not files.exists(IDENTITY):
        open_store(uri)  # says so
    try:
        return examine(open_store(uri), progress).as_dict()
    except (IdentityMismatch, FormatMismatch) as error:
        remedy = "put back a copy of it; every student's snapshot.parquet holds one, under `identity` of its metadata"
        return _unopened(files, [Problem(IDENTITY, str(error), remedy)])
    except StoreError as error:
        entries = list(log_problems(files, []))
        if not entries:
            raise
        return _unopened(files, [*entries, Problem(LOG, str(error), "see the entries of it")])


@dataclass
class Report:
    """What was found.

    unplanned: units of good shards that no healthy plan names, as the shards have them. rows, sequences: of the shards
    that could be read to their end.
    """

    store: Store
    plans: Plans
    refs: Mapping[str, ShardRef]
    problems: list[Problem] = field(default_factory=list)
    unplanned: dict[str, Unit] = field(default_factory=dict)
    agreement: Agreement = field(default_factory=Agreement)
    sequences: int = 0
    rows: int = 0
    uncommitted_files: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "store": self.store.uri,
            "shards": len(self.refs),
            # Not a problem: a run that was stopped leaves them, and so does a repair.
            "units_planned_not_committed": len(self.plans.units.keys() - self.refs.keys()),
            "sequences": self.sequences,
            "rows": self.rows,
            "alignment": self.agreement.shares(),
            "uncommitted_files": self.uncommitted_files,
            "problems": [problem.as_dict() for problem in self.problems],
        }


def examine(store: Store, progress: ProgressCall | None = None) -> Report:
    """`verify_store` of a store that is open, for those who act on what it finds."""
    sizes = {info.name: info.size_bytes for info in store.files.walk() if info.name.startswith(FOLDER + "/")}
    report = Report(store, audit_plans(store.files), store.committed())
    report.problems += report.plans.problems
    report.problems += side_problems(store.files, store.identity)
    decodable = _decodable(store)
    columns = shard_schema(signal_codec(store.files, store.identity)).names if decodable else []
    report.problems += log_problems(store.files, columns)
    records = CommitLog.open(store.uri).records()
    for number, (_, ref) in enumerate(sorted(report.refs.items()), start=1):
        shard = _Shard(store, ref, sizes.get(ref.path), records.get(ref.path), report)
        report.problems += shard.problems() if decodable else shard.digest_problems()
        if progress:
            progress(number, len(report.refs))
    if not report.problems:  # else it is explained
        report.problems += _state_problems(store)
    report.problems += _alignment_problems(report)
    named = {ref.path for ref in report.refs.values()}
    report.uncommitted_files = len([name for name in sizes if name not in named and not name.endswith(".tmp")])
    return report


@dataclass
class _Shard:
    """size_bytes: of the file, None where there is none. records: its sequences by the log, None where it is silent."""

    store: Store
    ref: ShardRef
    size_bytes: int | None
    records: int | None
    report: Report

    def problems(self) -> Iterator[Problem]:
        """All that is wrong with the file, its rows, and what log and plans say of it."""
        if self.size_bytes is None:
            yield self._problem("the log names it, and it is not in the store", "drop")
            return
        try:
            sequences, rows = yield from self._read()
        except CorruptShard as error:
            yield self._problem(str(error), "drop")
            return
        except FormatMismatch as error:  # every shard may be so for another release: no reason to drop one
            remedy = "read the store with the release that wrote it, or teach into another store.path"
            yield Problem(self.ref.path, str(error), remedy, None, self.ref)
            return
        except StoreError as error:  # no permission, no network: that says nothing of what is in it
            remedy = "see that the file can be reached, and run the same command again"
            yield Problem(self.ref.path, str(error), remedy, None, self.ref)
            return
        self.report.sequences += sequences
        self.report.rows += rows
        if self.ref.size_bytes != self.size_bytes or self.records != sequences:
            yield self._problem(
                f"the log has {self.ref.size_bytes:,} bytes and {_count(self.records)} sequences, the file "
                f"{self.size_bytes:,} and {sequences:,}",
                "correct",
                f"{REPAIR} corrects the log",
            )
        if self.ref.unit not in self.report.plans.units:
            yield self._problem(
                "no saved plan names this unit", "replan", f"{REPAIR} writes a plan from the shards' own sequences"
            )

    def digest_problems(self) -> Iterator[Problem]:
        """Of a file that cannot be decoded, as the store lacks its calibration."""
        if self.size_bytes is None:
            yield self._problem("the log names it, and it is not in the store", "drop")
        elif sha256_of(self.store.files, self.ref.path) != self.ref.sha256:
            yield self._problem("its sha256 is not the one committed: the file was damaged or replaced", "drop")

    def _read(self) -> Any:
        """A generator of the rows' problems; returns (sequences, rows)."""
        identity = self.store.identity
        reader = ShardReader(self.store.files, self.ref, identity)
        digests: list[str] = []
        tokens: list[int] = []
        contexts: list[int] = []
        bad: list[str] = []
        for group in range(reader.groups):
            for stored in reader.read_group(group):
                sequence, signal = stored.sequence, stored.signal
                assert signal is not None
                problem = signal_problem(signal, identity.signal, identity.vocabulary)
                if problem:
                    bad.append(f"sequence {sequence.digest}: {problem}")
                self.report.agreement.add(sequence, signal)
                digests.append(sequence.digest)
                tokens.append(len(sequence.input_ids))
                contexts.append(sequence.context)
        if bad:
            yield self._problem(bad[0] + (f" (and {len(bad) - 1:,} more of its sequences)" if bad[1:] else ""), "drop")
        unit = Unit(tuple(digests), tuple(tokens), tuple(contexts))
        if unit.id != self.ref.unit:
            yield self._problem("its token ids do not give the digests of the planned sequences", "drop")
        elif reader.digests() != digests:
            yield self._problem("its column `sequence` does not hold the digests of its token ids", "drop")
        elif unit.id not in self.report.plans.units and not bad:
            self.report.unplanned[unit.id] = unit
        elif self.report.plans.units.get(unit.id, unit) != unit:
            remedy = f"move the plan that names this unit out of _stillroom/plans, and {REPAIR} rebuilds it"
            yield self._problem("a saved plan gives its sequences other lengths than they have", None, remedy)
        return len(digests), sum(unit.rows)

    def _problem(self, text: str, action: Any, remedy: str = RESCORE) -> Problem:
        return Problem(self.ref.path, text, remedy, action, self.ref)


def _count(records: int | None) -> str:
    return "an unknown number of" if records is None else f"{records:,}"


def _decodable(store: Store) -> bool:
    """Whether there is a codec; where not, `side_problems` has said why."""
    try:
        signal_codec(store.files, store.identity)
    except StoreError:
        return False
    return True


def _state_problems(store: Store) -> Iterator[Problem]:
    """Shards that the log no longer names, of which no entry by itself says that it was damaged."""
    try:
        CommitLog.open(store.uri).require_whole()
    except StoreError as error:
        remedy = "put back a copy of the log; without one, `stillroom teach` scores again what it no longer names"
        yield Problem(LOG, str(error), remedy)


def _alignment_problems(report: Report) -> Iterator[Problem]:
    problem = report.agreement.problem()
    if problem:
        remedy = (
            "`stillroom verify STORE --rescore 4` tells which it is: if the teacher says the same again, it is the "
            "teacher; if not, teach into another store.path"
        )
        yield Problem("all", problem, remedy)


def _unopened(files: Files, problems: list[Problem]) -> dict[str, Any]:
    """The report of a store whose identity or log cannot be read: which shards count, or of what, nobody knows."""
    return {
        "store": files.uri,
        "shards": 0,
        "sequences": 0,
        "rows": 0,
        "alignment": None,
        "uncommitted_files": 0,
        "problems": [problem.as_dict() for problem in problems],
    }
