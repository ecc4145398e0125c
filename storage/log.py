"""The commit log: a Delta table that names the shards that count.

Enters: `ShardRef`s of files already written. Leaves: the set of committed ones. Costs: about 15 commits a second;
100,000 files in one commit take 2.7 s, so commit in batches.

A unit's shard is done when, and only when, the log names it. Every commit sets the transaction version of one
application id, which makes it a compare-and-swap: of two writers that commit at once one is refused, reloads, drops
the units that the other has committed, and tries again. Which of two equal shards wins does not matter: rows are
bit-equal, or within the noise band where the machines differ.

This is the only file that imports deltalake; a student never does.
"""

import json
import random
import re
import time
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction

from stillroom.storage.errors import StoreError, StoreFull
from stillroom.storage.records import Receipt, ShardRef
from stillroom.storage.schema import shard_schema
from stillroom.storage.shard import parse_shard_path

_APPLICATION = "stillroom"
_ATTEMPTS = 200


class CommitLog:
    """The log of one store. One handle per process; not shared between threads."""

    def __init__(self, table: DeltaTable) -> None:
        self._table = table

    @staticmethod
    def create(uri: str, gap_step: float | None) -> "CommitLog":
        """An empty log at `uri`, or the one already there. Raises StoreError if it cannot be made."""
        try:
            return CommitLog(DeltaTable.create(uri, shard_schema(gap_step), mode="ignore"))
        except CommitFailedError:
            return CommitLog.open(uri)  # another founder was faster
        except (DeltaError, OSError) as error:
            raise StoreError(f"commit log of {uri} cannot be made: {_one_line(error)}") from error

    @staticmethod
    def open(uri: str) -> "CommitLog":
        """Raises StoreError if there is none or it cannot be read."""
        try:
            return CommitLog(DeltaTable(uri))
        except TableNotFoundError as error:
            raise StoreError(
                f"{uri} has no commit log: it is no store, or its _delta_log folder was removed"
            ) from error
        except (DeltaError, OSError) as error:
            raise StoreError(_unreadable(uri, error)) from error

    def refs(self) -> dict[str, ShardRef]:
        """Committed shards by unit, as of now. Raises StoreError if the log cannot be read."""
        try:
            self._table.update_incremental()
            added = pa.table(self._table.get_add_actions(flatten=True))
        except (DeltaError, OSError) as error:
            raise StoreError(_unreadable(self._table.table_uri, error)) from error
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
        for attempt in range(_ATTEMPTS):
            done = self.refs()
            fresh = [r for unit, r in pending.items() if unit not in done]
            if not fresh:
                return []
            version = self._table.transaction_version(_APPLICATION)
            try:
                self._append(fresh, 0 if version is None else version + 1)
            except CommitFailedError:
                time.sleep(random.uniform(0, min(0.02 * 2**attempt, 1.0)))
                continue
            except (DeltaError, OSError) as error:
                raise _uncommitted(self._table.table_uri, error) from error
            return fresh
        raise StoreError(f"commit to {self._table.table_uri} lost {_ATTEMPTS} races; nothing is lost, run again")

    def _append(self, receipts: list[Receipt], version: int) -> None:
        properties = CommitProperties(
            app_transactions=[Transaction(_APPLICATION, version)],
            # Ours is the retry loop: delta-rs would rebase onto the other commit without looking at its units.
            max_commit_retries=0,
        )
        self._table.create_write_transaction(
            [_add_action(r) for r in receipts],
            mode="append",
            schema=self._table.schema(),
            commit_properties=properties,
            post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
        )


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
