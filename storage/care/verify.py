"""Is every committed byte what was committed, and is every row what the contract says?

Enters: a store's URI. Leaves: a report with a list of problems, empty if all is well. Costs: one read of the store,
one row group of it in memory at a time; about 300,000 tokens/s a core at k = 64 (reading alone: 600,000).

What each problem is and who can mend it stands with it; storage/care/repair.py mends what needs no person.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from stillroom.storage.care.audit import (
    LOG,
    Findings,
    Problem,
    audit_plans,
    entry_problem,
    leftovers,
    log_problems,
    repair_of,
    sha256_of,
    side_problems,
    state_problems,
)
from stillroom.storage.care.checks import Agreement, signal_problem
from stillroom.storage.care.responses import ProgressCall, examine_generations
from stillroom.storage.errors import CorruptShard, FormatMismatch, IdentityMismatch, NoStore, StoreError
from stillroom.storage.files import GENERATIONS_MARK, Files, open_files
from stillroom.storage.generations.store import GenerationStore, holds_generations, open_any
from stillroom.storage.log import CommitLog
from stillroom.storage.records import ShardRef, Unit
from stillroom.storage.schema import shard_schema
from stillroom.storage.shard import FOLDER, ShardReader, signal_codec
from stillroom.storage.store import IDENTITY, Store


def verify_store(uri: str, progress: ProgressCall | None = None) -> dict[str, Any]:
    """Read everything that is committed and check it, in a store of any kind (of generations: care/responses.py).

    Digests and page checksums of shards, plans and side files; the log against the files; sequences against their
    digests and the plans; finite logits by falling rank, distinct ids inside the vocabulary, a tail that is a
    log-partition; and the alignment: over the whole store the agreement of stored top-1 with the text must peak where
    row t meets token t + 1.

    progress: called with (shards done, shards in all). Returns a dictionary with `problems`, a list of
    {shard or file, problem, remedy}, and what was counted; `alignment` is None where there is nothing to compare.
    Raises NoStore where there is none, StoreError where the log, a plan or a side file cannot be reached.
    """
    files = open_files(str(uri))
    try:
        return examine_any(open_any(uri), progress).as_dict()
    except NoStore:
        raise
    except (IdentityMismatch, FormatMismatch) as error:
        return _unopened(files, [_identity_problem(files, error)])
    except StoreError as error:
        entries = list(log_problems(files, []))
        if not entries:
            raise
        return _unopened(files, [*entries, Problem(LOG, str(error), "see the entries of it")])


def examine_any(store: Store | GenerationStore, progress: ProgressCall | None = None) -> Findings:
    """`verify_store` of a store that is open, for those who act on what it finds."""
    return examine_generations(store, progress) if isinstance(store, GenerationStore) else examine(store, progress)


@dataclass
class Report(Findings):
    """rows, sequences: of the shards that could be read to their end."""

    store: Store
    agreement: Agreement = field(default_factory=Agreement)
    sequences: int = 0
    rows: int = 0

    def counted(self) -> dict[str, Any]:
        return {"sequences": self.sequences, "rows": self.rows, "alignment": self.agreement.shares()}


def examine(store: Store, progress: ProgressCall | None = None) -> Report:
    """`examine_any` of a store of logits."""
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
        report.problems += state_problems(store)
    report.problems += _alignment_problems(report)
    report.uncommitted_files = leftovers(sizes, report.refs)
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
            yield entry_problem(self.ref, self.size_bytes, self.records, sequences, "sequences", self.store.uri)
        if self.ref.unit not in self.report.plans.units:
            remedy = f"{repair_of(self.store.uri)} writes a plan from the shards' own sequences"
            yield self._problem("no saved plan names this unit", "replan", remedy)

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
            repair = repair_of(self.store.uri)
            remedy = f"move the plan that names this unit out of _stillroom/plans, and {repair} rebuilds it"
            yield self._problem("a saved plan gives its sequences other lengths than they have", None, remedy)
        return len(digests), sum(unit.rows)

    def _problem(self, text: str, action: Any, remedy: str | None = None) -> Problem:
        rescore = f"{repair_of(self.store.uri)} and `stillroom teach` on the recipe score its unit again"
        return Problem(self.ref.path, text, remedy or rescore, action, self.ref)


def _decodable(store: Store) -> bool:
    """Whether there is a codec; where not, `side_problems` has said why."""
    try:
        signal_codec(store.files, store.identity)
    except StoreError:
        return False
    return True


def _alignment_problems(report: Report) -> Iterator[Problem]:
    problem = report.agreement.problem()
    if problem:
        remedy = (
            f"`stillroom verify {report.store.uri} --rescore 4` tells which it is: if the teacher says the same again, "
            "it is the teacher; if not, teach into another store.path"
        )
        yield Problem("all", problem, remedy)


def _identity_problem(files: Files, error: StoreError) -> Problem:
    if holds_generations(files):
        remedy = "put back a copy of it; without one remove it, and `stillroom generate` on the recipe writes it anew"
        return Problem(GENERATIONS_MARK, str(error), remedy)
    remedy = "put back a copy of it; every student's snapshot.parquet holds one, under `identity` of its metadata"
    return Problem(IDENTITY, str(error), remedy)


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
