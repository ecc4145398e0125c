"""The commit log: a Delta table that names the shards that count, in a folder or in a bucket.

Enters: `ShardRef`s of files already written. Leaves: the set of committed ones. Costs: about 15 commits a second;
100,000 files in one commit take 2.7 s, so commit in batches.

A unit's shard is done when, and only when, the log names it. Every commit sets the transaction version of one
application id, which makes it a compare-and-swap: of two writers that commit at once one is refused, reloads, drops
the units that the other has committed, and tries again. Which of two equal shards wins does not matter: rows are
bit-equal, or within the noise band where the machines differ. In a bucket the log entry is a PUT that must not
replace (If-None-Match), which the server must honour: AWS S3 does, and SeaweedFS, the one tested.

The answer to a commit may be lost on its way. So every commit carries a token of its own, and after any failure the log
is read again and searched for it before anything is tried again.

This is the only file that imports deltalake; a student never does.
"""

import json
import random
import re
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from stillroom.storage.errors import StoreError, StoreFull
from stillroom.storage.records import Receipt, ShardRef
from stillroom.storage.refs import Refs, State, is_state_text, plus, state_text
from stillroom.storage.remote.s3 import SCHEME, Connection, Location, connect

T = TypeVar("T")

_APPLICATION = "stillroom"
_TOKEN, _STATE = "stillroom.commit", "stillroom.state"
_ATTEMPTS = 200


class CommitLog:
    """The log of one store. One handle per process; not shared between threads."""

    def __init__(self, table: DeltaTable, place: "_Place") -> None:
        self._table, self._place = table, place

    @staticmethod
    def create(uri: str, schema: pa.Schema) -> "CommitLog":
        """An empty log at `uri` of shards with these columns, or the one already there.

        Raises StoreError if it cannot be made.
        """
        place = _Place.of(uri)

        def make() -> DeltaTable:
            return DeltaTable.create(place.uri, schema, mode="ignore", storage_options=place.options())

        try:
            return CommitLog(place.call("make the commit log of", make, patient=True), place)
        except CommitFailedError:
            return CommitLog.open(uri)  # another founder was faster, or our own answer was lost
        except (DeltaError, OSError) as error:
            raise StoreError(f"commit log of {place.uri} cannot be made: {_one_line(error)}") from error

    @staticmethod
    def open(uri: str) -> "CommitLog":
        """Raises StoreError if there is none or it cannot be read."""
        place = _Place.of(uri)
        try:
            return CommitLog(place.call("read the commit log of", place.table), place)
        except TableNotFoundError as error:
            raise StoreError(
                f"{place.uri} has no commit log: it is no store, or its _delta_log folder was removed"
            ) from error
        except (DeltaError, OSError) as error:
            raise StoreError(_unreadable(place.uri, error)) from error

    def refs(self) -> Refs:
        """Committed shards by unit, as of now. Raises StoreError if the log cannot be read."""
        return self._reading(self._named).once()

    def require_whole(self) -> None:
        """Raises StoreError where the log does not name what its last commit says that it names.

        An entry of a Delta log has no checksum: a flipped bit in the word "add" takes a shard out of it, and nobody
        sees that anything is missing. Commits of other programs, and of older releases, say nothing, and then nothing
        is known.
        """
        if self._reading(self._whole):
            return
        raise StoreError(
            f"commit log of {self._place.uri} names other shards than its last commit says, so an entry was damaged: "
            "`stillroom verify` on the store says which; put back a copy of it, or run `stillroom teach` (for "
            "generations `stillroom generate`) on the recipe, which makes again what is no longer named"
        )

    def _whole(self) -> bool:
        state = self._named().state()
        last = self._table.history(1)
        said = last[0].get(_STATE) if last else None
        if not isinstance(said, str) or not is_state_text(said):
            return True
        return said == state_text(state)

    def records(self) -> dict[str, int | None]:
        """How many sequences each committed file has by the log, by path; None where it does not say."""
        added = self._reading(self._added)
        return dict(zip(added["path"].to_pylist(), added["num_records"].to_pylist(), strict=True))

    def _reading(self, action: Callable[[], T]) -> T:
        """All that is read of the log comes through here: entries are parsed when they are first looked at."""
        try:
            return self._place.call("read the commit log of", action)
        except (DeltaError, OSError) as error:
            raise StoreError(_unreadable(self._place.uri, error)) from error

    def _added(self) -> pa.Table:
        self._table.update_incremental()
        return pa.table(self._table.get_add_actions(flatten=True))

    def _named(self) -> Refs:
        added = self._added()
        try:
            return Refs.of(added["path"], added["size_bytes"].to_numpy())
        except StoreError as error:
            raise StoreError(f"commit log of {self._place.uri} was damaged: {error}") from error

    def commit(self, receipts: Iterable[Receipt]) -> list[Receipt]:
        """Commit those receipts whose units are not committed yet, in one commit; returns them."""
        pending = {r.shard.unit: r for r in receipts}
        if not pending:
            return []
        tried = _Tried(token=uuid4().hex)
        try:
            return self._place.call("commit to", lambda: self._commit(pending, tried), patient=True)
        except (DeltaError, OSError) as error:
            raise _uncommitted(self._place.uri, error) from error

    def _commit(self, pending: dict[str, Receipt], tried: "_Tried") -> list[Receipt]:
        for attempt in range(_ATTEMPTS):
            named = self._named()
            if tried.landed(self._table):
                return tried.receipts
            done = named.once()
            fresh = [r for unit, r in pending.items() if unit not in done]
            if not fresh:
                return []
            version = self._table.transaction_version(_APPLICATION)
            tried.note(self._table.version(), fresh)
            try:
                state = plus(named.state(), _refs_of(r.shard for r in fresh).state())
                self._write([_add_action(r) for r in fresh], tried.token, 0 if version is None else version + 1, state)
            except CommitFailedError:
                time.sleep(random.uniform(0, min(0.02 * 2**attempt, 1.0)))
                continue
            return fresh
        raise StoreError(f"commit to {self._place.uri} lost {_ATTEMPTS} races; nothing is lost, run again")

    def remove(self, shards: Iterable[ShardRef]) -> list[ShardRef]:
        """Drop these files from the log, in one commit; returns those that it named when called.

        By file and not by unit: a unit that was scored again in the meantime keeps its new shard. The files stay.
        """
        wanted = {ref.path: ref for ref in shards}
        named: dict[str, ShardRef] = {}
        if not wanted:
            return []
        try:
            self._place.call("commit to", lambda: self._remove(wanted, named), patient=True)
        except (DeltaError, OSError) as error:
            raise _uncommitted(self._place.uri, error) from error
        return list(named.values())

    def _remove(self, wanted: dict[str, ShardRef], named: dict[str, ShardRef]) -> None:
        """Said again it does nothing, so a lost answer needs no token to look for."""
        for attempt in range(_ATTEMPTS):
            now = self._named()
            paths = [path for path in now.paths() if path in wanted]
            if not paths:
                return
            named.update((path, wanted[path]) for path in paths)
            version = self._table.transaction_version(_APPLICATION)
            actions = [_remove_action(wanted[path]) for path in paths]
            try:
                state = now.without(set(paths)).state()
                self._write(actions, uuid4().hex, 0 if version is None else version + 1, state)
            except CommitFailedError:
                time.sleep(random.uniform(0, min(0.02 * 2**attempt, 1.0)))
        raise StoreError(f"commit to {self._place.uri} lost {_ATTEMPTS} races; nothing is lost, run again")

    def _write(self, actions: Seq[AddAction | RemoveAction], token: str, version: int, state: State) -> None:
        """state: what the log names once this is in it. It is the next entry or none, so that is known before."""
        properties = CommitProperties(
            app_transactions=[Transaction(_APPLICATION, version)],
            custom_metadata={_TOKEN: token, _STATE: state_text(state)},
            # Ours is the retry loop: delta-rs would rebase onto the other commit without looking at its units.
            max_commit_retries=0,
        )
        self._table.create_write_transaction(
            list(actions),
            mode="append",
            schema=self._table.schema(),
            commit_properties=properties,
            post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
        )


@dataclass(frozen=True)
class _Place:
    """uri: as the delta table is opened. connection: None for a local folder."""

    uri: str
    connection: Connection | None

    @staticmethod
    def of(uri: str) -> "_Place":
        return _Place(Location.parse(uri).uri, connect()) if uri.startswith(SCHEME) else _Place(uri, None)

    def options(self) -> dict[str, str] | None:
        return self.connection.settings.storage_options() if self.connection else None

    def table(self) -> DeltaTable:
        return DeltaTable(self.uri, storage_options=self.options())

    def call(self, doing: str, action: Callable[[], T], *, patient: bool = False) -> T:
        try:
            return self._call(doing, action, patient=patient)
        except BaseException as error:
            # What Rust could not foresee. It derives from BaseException, and no one above would catch it.
            if type(error).__name__ != "PanicException":
                raise
            raise StoreError(f"cannot {doing} {self.uri}: {_one_line(error)}; the log was damaged") from error

    def _call(self, doing: str, action: Callable[[], T], *, patient: bool) -> T:
        if self.connection is None:
            return action()
        passing, errors = (TableNotFoundError, CommitFailedError), (OSError, DeltaError)
        return self.connection.call(doing, self.uri, action, patient=patient, passing=passing, errors=errors)


@dataclass
class _Tried:
    """What a commit attempted so far: its answer may be lost while it stands in the log."""

    token: str
    since: int | None = None
    receipts: list[Receipt] = field(default_factory=list)

    def note(self, version: int, receipts: list[Receipt]) -> None:
        self.since = version if self.since is None else self.since
        self.receipts = receipts

    def landed(self, table: DeltaTable) -> bool:
        """Whether the log, as `table` has it now, holds our token."""
        if self.since is None or table.version() == self.since:
            return False
        return any(entry.get(_TOKEN) == self.token for entry in table.history(table.version() - self.since))


def _refs_of(shards: Iterable[ShardRef]) -> Refs:
    shards = list(shards)
    return Refs.of(pa.chunked_array([[s.path for s in shards]], pa.string()), np.array([s.size_bytes for s in shards]))


def _unreadable(uri: str, error: Exception) -> str:
    return f"commit log of {uri} cannot be read: {_one_line(error)}"


def _uncommitted(uri: str, error: Exception) -> StoreError:
    line = _one_line(error)
    if "No space left on device" in line or "Disk quota exceeded" in line:  # deltalake gives text alone
        return StoreFull(f"no room for a commit to {uri}: free some space and run the same command again")
    return StoreError(f"commit to {uri} failed: {line}")


def _one_line(error: BaseException) -> str:
    """Without deltalake's colours and arrows."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).replace("↳", ":").split())


def _remove_action(ref: ShardRef) -> RemoveAction:
    return RemoveAction(
        path=ref.path,
        data_change=True,
        deletion_timestamp=int(time.time() * 1000),
        size=ref.size_bytes,
        partition_values={},
    )


def _add_action(receipt: Receipt) -> AddAction:
    stats: dict[str, Any] = {"numRecords": receipt.sequences}
    return AddAction(
        path=receipt.shard.path,
        size=receipt.shard.size_bytes,
        partition_values={},
        modification_time=int(time.time() * 1000),
        data_change=True,
        stats=json.dumps(stats),
    )
