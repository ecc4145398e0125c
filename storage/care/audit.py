"""The files beside the shards, checked: the log's entries, the plans, the side files named by their digest.

Enters: a store's files, of any kind of store. Leaves: `Problem`s, and which units the healthy plans hold; `Findings`,
what a report has of every kind. Costs: one read of those files; of the output head, the only large one, 16 MB are in
memory at a time.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Literal

from stillroom.storage import plans
from stillroom.storage.calibration import calibration_path, load_calibration
from stillroom.storage.catalog.stores import FIDELITY, kept_fidelity
from stillroom.storage.catalog.uses import account_files, check_account_file
from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.fidelity.truth import FOLDER as TRUTH
from stillroom.storage.files import Files, content_digest
from stillroom.storage.identity import Identity
from stillroom.storage.log import CommitLog
from stillroom.storage.records import ShardRef, Unit
from stillroom.storage.shard import parse_shard_path
from stillroom.storage.store import UnitStore

SIDE, LOG = "_stillroom", "_delta_log"

#: What `repair` does about a problem: drop a shard from the log, correct what the log says of it, rebuild a plan,
#: remove a file that nothing needs; None where only a person can do something.
Action = Literal["drop", "correct", "replan", "remove"]

_CHUNK_BYTES = 16 << 20
_ENTRY = re.compile(LOG + r"/(\d{20})\.json")
_CHECKPOINT = re.compile(LOG + r"/(\d{20})\.checkpoint.*\.parquet")
#: What each action of a Delta log must have, by its protocol (delta-io/delta, PROTOCOL.md, "Actions"). Tables like ours
#: have no others.
_ACTIONS: dict[str, tuple[str, ...]] = {
    "add": ("path", "partitionValues", "size", "modificationTime", "dataChange"),
    "remove": ("path", "dataChange"),
    "metaData": ("id", "format", "schemaString", "partitionColumns"),
    "protocol": ("minReaderVersion", "minWriterVersion"),
    "txn": ("appId", "version"),
    "commitInfo": (),
    "domainMetadata": (),
}

#: Of a shard's columns and their elements, in Delta's words.
_TYPES = ("string", "integer", "short", "byte", "long", "float", "double", "binary")

#: Of the stage that fills a store of logits, and one of generations.
SCORES_AGAIN, WRITES_AGAIN = "`stillroom teach` scores again", "`stillroom generate` makes again"


def repair_of(uri: str) -> str:
    """The command, for a remedy."""
    return f"`stillroom verify {uri} --repair`"


@dataclass(frozen=True)
class Problem:
    """file: relative to the root, or "all". ref: of the shard concerned."""

    file: str
    problem: str
    remedy: str
    action: Action | None = None
    ref: ShardRef | None = None

    def as_dict(self) -> dict[str, str]:
        """Shards, and what concerns all of them, under `shard`; every other file under `file`."""
        kind = "shard" if self.ref is not None or self.file == "all" else "file"
        return {kind: self.file, "problem": self.problem, "remedy": self.remedy}


@dataclass
class Plans:
    """units: of all healthy plans, by id. damaged: names of the others. problems: one for each of those."""

    units: dict[str, Unit] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Findings:
    """What was found in a store of any kind.

    unplanned: units of good shards that no healthy plan names, as the shards have them.
    """

    store: UnitStore
    plans: Plans
    refs: Mapping[str, ShardRef]
    problems: list[Problem] = field(default_factory=list)
    unplanned: dict[str, Unit] = field(default_factory=dict)
    uncommitted_files: int = 0

    #: Which kind, for those who read the report.
    kind = "signal"

    def counted(self) -> dict[str, Any]:
        """What was read, in the words of the kind; JSON-able."""
        return {}

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "store": self.store.uri,
            "kind": self.kind,
            "shards": len(self.refs),
            # Not a problem: a run that was stopped leaves them, and so does a repair.
            "units_planned_not_committed": len(self.plans.units.keys() - self.refs.keys()),
            **self.counted(),
            "uncommitted_files": self.uncommitted_files,
            "problems": [problem.as_dict() for problem in self.problems],
        }


def audit_plans(files: Files, planned_anew: str = "planned anew by `stillroom teach`") -> Plans:
    """Every plan by itself, so that one damaged file hides no other. Raises StoreError if one cannot be reached."""
    found = Plans()
    for name in files.list(plans.FOLDER):
        if not re.fullmatch(plans.NAME, name):
            continue
        try:
            found.units.update((unit.id, unit) for unit in plans.load_plan(files, name))
        except CorruptShard as error:
            found.damaged.append(name)
            remedy = f"{repair_of(files.uri)} rebuilds it from the shards; units not done yet are {planned_anew}"
            found.problems.append(Problem(name, str(error), remedy, "replan"))
    return found


def log_problems(files: Files, columns: Seq[str], again: str = SCORES_AGAIN) -> Iterator[Problem]:
    """Entries that are no Delta actions, that name no shard, or that are missing between others.

    delta-rs passes over what it does not know, so that a flipped bit in the word "add" silently takes a shard out.
    columns: of a shard; the schema that other readers go by must have them. again: what makes lost units anew.
    """
    names = files.list(LOG)
    entries = {int(match[1]): match[0] for name in names if (match := _ENTRY.fullmatch(name))}
    checkpoints = [int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    remedy = f"put back a copy of this file; without one, {again} what the log no longer names"
    if entries:
        expected = range(min(entries) if checkpoints and min(checkpoints) <= min(entries) else 0, max(entries))
        for version in sorted(set(expected) - entries.keys()):
            yield Problem(f"{LOG}/{version:020d}.json", "this entry of the log is missing", remedy)
    for _, name in sorted(entries.items()):
        lines = files.read(name).splitlines()
        if not lines:  # delta-rs takes it for a commit of nothing
            yield Problem(name, "this entry of the log is empty: it was cut off", remedy)
        for number, line in enumerate(lines, start=1):
            problem = _action_problem(line, columns)
            if problem:
                yield Problem(name, f"line {number}: {problem}", remedy)


def _action_problem(line: bytes, columns: Seq[str]) -> str | None:
    try:
        action = json.loads(line)
        (kind,) = action
        content = action[kind]
        if kind not in _ACTIONS:
            return f"{kind!r} is no action of a Delta log"
        lacking = [name for name in _ACTIONS[kind] if content.get(name) is None]
        if lacking:
            return f"its {kind} has no {', '.join(lacking)}"
        if kind in ("add", "remove"):
            parse_shard_path(content["path"])
        if kind == "metaData":
            return _schema_problem(json.loads(content["schemaString"])["fields"], columns)
    except (ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        return f"not an action of a Delta log ({' '.join(str(error).split())})"
    return None


def _schema_problem(fields: list[dict[str, Any]], columns: Seq[str]) -> str | None:
    for column in fields:
        kind = column["type"]
        if not {"name", "nullable", "metadata"} <= column.keys():
            return f"column {column.get('name')} of its schema lacks a name, nullable or metadata"
        flat = {"type", "elementType", "containsNull"}
        if isinstance(kind, dict):
            kind = kind["elementType"] if kind["type"] == "array" and kind.keys() == flat else None
        if kind not in _TYPES:
            return f"column {column['name']} of its schema is of no type that a shard has"
    found = [column["name"] for column in fields]
    if columns and found != list(columns):
        return f"it states columns {', '.join(found)}; shards have {', '.join(columns)}"
    return None


def state_problems(store: UnitStore, again: str = SCORES_AGAIN) -> Iterator[Problem]:
    """Shards that the log no longer names, of which no entry by itself says that it was damaged."""
    try:
        CommitLog.open(store.uri).require_whole()
    except StoreError as error:
        yield Problem(LOG, str(error), f"put back a copy of the log; without one, {again} what it no longer names")


def entry_problem(ref: ShardRef, size_bytes: int, records: int | None, found: int, words: str, uri: str) -> Problem:
    """The log has other numbers of a good shard than its file. records: by the log, None where it is silent; found: in
    the file; words: what they count."""
    counted = "an unknown number of" if records is None else f"{records:,}"
    return Problem(
        ref.path,
        f"the log has {ref.size_bytes:,} bytes and {counted} {words}, the file {size_bytes:,} and {found:,}",
        f"{repair_of(uri)} corrects the log",
        "correct",
        ref,
    )


def leftovers(sizes: Mapping[str, int], refs: Mapping[str, ShardRef]) -> int:
    """How many files lie beside the shards that the log names, temporary ones left out. sizes: of files by name."""
    named = {ref.path for ref in refs.values()}
    return len([name for name in sizes if name not in named and not name.endswith(".tmp")])


def side_problems(files: Files, identity: Identity) -> Iterator[Problem]:
    """Side files whose content is not what their name says, and the one that the identity asks for.

    Raises StoreError if one cannot be reached.
    """
    hidden = identity.signal.hidden
    needed = calibration_path(hidden.calibration) if hidden and hidden.calibration else None
    yield from digest_problems(files, needed)
    if needed:
        if not files.exists(needed):
            problem = "the calibration that the identity names is not there: no hidden state can be read"
            yield Problem(needed, problem, _side_remedy(needed, needed))
        else:
            try:
                load_calibration(files, str(hidden and hidden.calibration))
            except CorruptShard as error:
                if "sha256" not in str(error):  # that has been said
                    yield Problem(needed, str(error), _side_remedy(needed, needed))
    heads = [name for name in files.list(SIDE) if "/head-" in name]
    if len(heads) > 1:
        yield Problem(heads[1], f"there are {len(heads)} output heads, expected one", _side_remedy(heads[1], needed))
    for name in files.list(TRUTH):
        stated = content_digest(name)
        if stated and sha256_of(files, name) != stated:
            remedy = f"{repair_of(files.uri)} removes it; fidelity is then measured at the positions that are left"
            yield Problem(name, "its sha256 is not the one in its name: it was damaged", remedy, "remove")
    yield from account_problems(files)


def account_problems(files: Files) -> Iterator[Problem]:
    """What was measured, taught and used, where it is not what its own digest says: rows are right without it."""
    damaged = "it is not what its digest says: it was damaged"
    try:
        kept_fidelity(files)
    except CorruptShard:
        yield Problem(FIDELITY, damaged, "remove it, and `stillroom teach` on the recipe measures anew")
    for name in account_files(files):
        try:
            check_account_file(files, name)
        except CorruptShard:
            yield Problem(name, damaged, "put back a copy of it, or remove it, and what it says is no longer counted")


def digest_problems(files: Files, needed: str | None = None) -> Iterator[Problem]:
    """Side files whose content is not what their name says. needed: the calibration, if there is one."""
    for name in files.list(SIDE):
        stated = content_digest(name)
        found = stated and sha256_of(files, name)
        if found != stated:
            yield Problem(name, "its sha256 is not the one in its name: it was damaged", _side_remedy(name, needed))


def _side_remedy(name: str, needed: str | None) -> str:
    if name == needed:
        return "put back a copy of it; without one the hidden part is lost, and the corpus is to be taught anew"
    if "head" in name:
        return "remove it if it is damaged, and run `stillroom teach` on the recipe, which writes it from the teacher"
    return "put back a copy of it, or remove it"


def sha256_of(files: Files, name: str) -> str:
    """Of a file's content, read piece by piece. Raises StoreError if there is no such file."""
    found = hashlib.sha256()
    with files.open(name) as source:
        while chunk := source.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()
