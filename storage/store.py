"""A store: committed shards of one identity under one root.

Enters: a URI, and an identity where it is new. Leaves: plans, commits, snapshots, stored sequences. Costs: opening
reads the identity and the log; nothing else is touched until asked for.

    <root>/_stillroom/identity.json    what the numbers are
    <root>/_stillroom/plans/           which sequence belongs to which unit
    <root>/_delta_log/                 which shards count
    <root>/shards/                     the shards
    <root>/_stillroom/calibration-…    the channels' scales of an int8 hidden part, named by its digest
"""

from collections.abc import Callable, Container, Iterable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TypeVar

from stillroom.storage import plans
from stillroom.storage.errors import FormatMismatch, IdentityMismatch, NoStore, StoreError
from stillroom.storage.files import GENERATIONS_MARK, STORE_MARK, Files, open_files
from stillroom.storage.identity import Identity
from stillroom.storage.log import CommitLog
from stillroom.storage.records import Receipt, ShardRef, Unit
from stillroom.storage.refs import Refs
from stillroom.storage.schema import shard_schema
from stillroom.storage.shard import FOLDER as SHARDS
from stillroom.storage.shard import ShardReader, StoredSequence, signal_codec
from stillroom.storage.snapshot import Snapshot

#: The file that makes a folder a store: what its numbers are.
IDENTITY = STORE_MARK

#: Bytes; one has about a thousand.
_LARGEST_IDENTITY = 2**20

Held = TypeVar("Held")


class UnitStore:
    """What every store has, whatever its shards hold: plans of units, and a log of those that are done."""

    def __init__(self, files: Files, log: CommitLog) -> None:
        self.files = files
        self._log = log

    @property
    def uri(self) -> str:
        return self.files.uri

    def committed(self) -> Refs:
        """Committed shards by unit id, as the log has them now."""
        return self._log.refs()

    def commit(self, receipts: Iterable[Receipt]) -> list[Receipt]:
        """Make written shards count, each unit once; returns the receipts that this call made count."""
        return self._log.commit(receipts)

    def planned(self) -> plans.Units:
        """Units of all saved plans, oldest first, committed or not."""
        return plans.load_plans(self.files)

    def save_plan(self, units: Seq[Unit]) -> None:
        """Keep a plan. It is written before its first unit is scored, so that a resume follows it."""
        plans.save_plan(self.files, units)


class Store(UnitStore):
    """Of logits. Made by `open_store` or `create_store`."""

    def __init__(self, files: Files, identity: Identity, log: CommitLog) -> None:
        super().__init__(files, log)
        self.identity = identity

    def snapshot(self, sequences: Container[str] | None = None, *, pending: Container[str] = ()) -> Snapshot:
        """Pin what is committed now, or of that the units that hold any of `sequences`.

        pending: ids of planned units that are still to be scored, and are part of it: the snapshot is open then.

        Raises StoreError where the log names a unit that no plan has, or was damaged.
        """
        self._log.require_whole()
        refs = self.committed()
        units = tuple({u.id: u for u in self.planned() if u.id in refs or u.id in pending}.values())
        if sum(u.id in refs for u in units) != len(refs):
            unknown = sorted(set(refs) - {u.id for u in units})
            raise StoreError(
                f"store {self.uri}: the log has {len(unknown)} units that no plan in _stillroom/plans names, "
                f"the first is {unknown[0]}; a plan file was lost"
            )
        if sequences is not None:
            units = tuple(u for u in units if any(s in sequences for s in u.sequences))
        return Snapshot(self.uri, self.identity, units, {u.id: refs[u.id] for u in units if u.id in refs})

    def reader(self, ref: ShardRef) -> ShardReader:
        """A verified reader of one shard."""
        return ShardReader(self.files, ref, self.identity)

    def sequences(self) -> Iterator[StoredSequence]:
        """Every committed sequence, by unit id. Raises StoreError where the log was damaged, CorruptShard."""
        self._log.require_whole()
        for _, ref in sorted(self.committed().items()):
            yield from self.reader(ref)


def open_store(uri: str) -> Store:
    """Open a store that exists.

    Raises NoStore if there is none of logits at `uri`, IdentityMismatch or FormatMismatch if its identity file is
    damaged, StoreError if the log cannot be read.
    """
    files = open_files(str(uri))
    if not files.exists(IDENTITY):
        if files.exists(GENERATIONS_MARK):
            raise NoStore(
                f"{files.uri} holds generations, a teacher's responses, and no signal: `stillroom inspect {files.uri}` "
                "says what is there"
            )
        missing = "://" not in files.uri and not Path(files.uri).is_dir()
        there = "there is no such folder" if missing else f"it has no {IDENTITY}"
        raise NoStore(f"{files.uri} is no store: {there}; `stillroom ls FOLDER` lists the stores under a folder")
    return Store(files, read_identity(files, IDENTITY, Identity.from_json), CommitLog.open(files.uri))


def create_store(uri: str, identity: Identity) -> Store:
    """Open the store at `uri`, or found it.

    Raises IdentityMismatch, naming the parts that differ, if another identity lives there; StoreError if it has
    shards but no log.
    """
    files = open_files(str(uri))
    if files.exists(IDENTITY):
        held = read_identity(files, IDENTITY, Identity.from_json)
        held.require_equal(identity, files.uri)
        identity = held  # of the format that the store was founded in, which its shards state
        if files.list(SHARDS):
            # Shards without a log are a damaged store: an empty log in its place would score everything again.
            return Store(files, identity, CommitLog.open(files.uri))
    else:
        files.write(IDENTITY, identity.to_json().encode())
    log = CommitLog.create(files.uri, shard_schema(signal_codec(files, identity)))
    held = read_identity(files, IDENTITY, Identity.from_json)  # another founder may have been a moment later
    held.require_equal(identity, files.uri)
    return Store(files, held, log)


def read_identity(files: Files, mark: str, parse: Callable[[str], Held]) -> Held:
    """The identity file `mark` of a store of any kind. parse: its JSON's text → the identity.

    Raises IdentityMismatch, FormatMismatch naming the file, where it is damaged or of another format; StoreError.
    """
    try:
        source = files.open(mark)
        if source.size() > _LARGEST_IDENTITY:
            raise ValueError(f"{source.size():,} bytes, at most {_LARGEST_IDENTITY:,} are one")
        return parse(source.read().decode())
    except (IdentityMismatch, FormatMismatch) as error:
        raise type(error)(f"{files.uri}/{mark}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatMismatch(f"{files.uri}/{mark} cannot be read ({error}): the file was damaged") from error
