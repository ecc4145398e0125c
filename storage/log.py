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
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from stillroom.storage.errors import StoreError, StoreFull
from stillroom.storage.records import Receipt, ShardRef
from stillroom.storage.s3 import SCHEME, Connection, Location, connect
from stillroom.storage.shard import parse_shard_path

T = TypeVar("T")

_APPLICATION = "stillroom"
_TOKEN = "stillroom.commit"
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

    def refs(self) -> dict[str, ShardRef]:
        """Committed shards by unit, as of now. Raises StoreError if the log cannot be read."""
        return self._place.call("read the commit log of", self._refs)

    def records(self) -> dict[str, int | None]:
        """How many sequences each committed file has by the log, by path; None where it does not say."""
        added = self._place.call("read the commit log of", self._added)
        return dict(zip(added["path"].to_pylist(), added["num_records"].to_pylist(), strict=True))

    def _added(self) -> pa.Table:
        try:
            self._table.update_incremental()
            return pa.table(self._table.get_add_actions(flatten=True))
        except (DeltaError, OSError) as error:
            if self._place.connection is not None:
                raise  # it may pass, and the caller tries again
            raise StoreError(_unreadable(self._place.uri, error)) from error

    def _refs(self) -> dict[str, ShardRef]:
        added = self._added()
        refs: dict[str, ShardRef] = {}
        for path, size in zip(added["path"].to_pylist(), added["size_bytes"].to_pylist(), strict=True):
            unit, sha256 = parse_shard_path(str(path))
            known = refs.get(unit)
            # Two files of one unit can only stem from a log edited by hand; the choice must not depend on order.
            if known is None or str(path) < known.path:
                refs[unit] = ShardRef(unit, str(path), sha256, int(size))
        return refs

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
            done = self._refs()
            if tried.landed(self._table):
                return tried.receipts
            fresh = [r for unit, r in pending.items() if unit not in done]
            if not fresh:
                return []
            version = self._table.transaction_version(_APPLICATION)
            tried.note(self._table.version(), fresh)
            try:
                self._append(fresh, tried.token, 0 if version is None else version + 1)
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
            paths = [path for path in self._added()["path"].to_pylist() if path in wanted]
            if not paths:
                return
            named.update((path, wanted[path]) for path in paths)
            version = self._table.transaction_version(_APPLICATION)
            actions = [_remove_action(wanted[path]) for path in paths]
            try:
                self._write(actions, uuid4().hex, 0 if version is None else version + 1)
            except CommitFailedError:
                time.sleep(random.uniform(0, min(0.02 * 2**attempt, 1.0)))
        raise StoreError(f"commit to {self._place.uri} lost {_ATTEMPTS} races; nothing is lost, run again")

    def _append(self, receipts: list[Receipt], token: str, version: int) -> None:
        self._write([_add_action(r) for r in receipts], token, version)

    def _write(self, actions: list[AddAction | RemoveAction], token: str, version: int) -> None:
        properties = CommitProperties(
            app_transactions=[Transaction(_APPLICATION, version)],
            custom_metadata={_TOKEN: token},
            # Ours is the retry loop: delta-rs would rebase onto the other commit without looking at its units.
            max_commit_retries=0,
        )
        self._table.create_write_transaction(
            actions,
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


def _unreadable(uri: str, error: Exception) -> str:
    return f"commit log of {uri} cannot be read: {_one_line(error)}"


def _uncommitted(uri: str, error: Exception) -> StoreError:
    line = _one_line(error)
    if "No space left on device" in line or "Disk quota exceeded" in line:  # deltalake gives text alone
        return StoreFull(f"no room for a commit to {uri}: free some space and run the same command again")
    return StoreError(f"commit to {uri} failed: {line}")


def _one_line(error: Exception) -> str:
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
