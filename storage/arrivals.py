"""Shards that an open snapshot still lacks, told one by one as they are committed.

Enters: `ShardRef`s from whoever follows the log. Leaves: the same, to a student that has no log. Costs: about 190 bytes
a shard, and a stat to see that nothing is new.

    arrivals.jsonl    beside the snapshot; one line a shard: [unit, path, sha256, bytes]

One process appends, any number read. A line counts when its newline is there; what a killed writer left of a line is
cut off by the next one. What stands in it stays: a student that goes on reads the shards that it began on.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.records import ShardRef
from stillroom.storage.shard import parse_shard_path


def arrivals_path(snapshot: Path) -> Path:
    """Of the snapshot at this path."""
    return snapshot.with_name("arrivals.jsonl")


class Arrivals:
    """A reader's view; `refs` grows with each `look`. Not shared between threads without a lock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self.refs: dict[str, ShardRef] = {}

    def look(self) -> list[ShardRef]:
        """What has been told since the last look. Raises CorruptShard for a line that names no shard."""
        try:
            if self._path.stat().st_size <= self._read:
                return []
            with self._path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot read {self._path}: {error.strerror}") from error
        whole = data[: data.rfind(b"\n") + 1]
        found = [_parse(line, self._path) for line in whole.splitlines()]
        self._read += len(whole)
        self.refs.update((ref.unit, ref) for ref in found)
        return found


class ArrivalsWriter(Arrivals):
    """The one that appends. What earlier runs told is in `refs` at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.look()
        if path.exists():
            os.truncate(path, self._read)

    def tell(self, refs: Iterable[ShardRef]) -> None:
        """Append those that are not told yet."""
        fresh = [ref for ref in refs if ref.unit not in self.refs]
        if not fresh:
            return
        lines = "".join(json.dumps([r.unit, r.path, r.sha256, r.size_bytes]) + "\n" for r in fresh).encode()
        try:
            with self._path.open("ab") as file:
                file.write(lines)
        except OSError as error:
            with suppress(OSError):  # half a line
                os.truncate(self._path, self._read)
            raise StoreError(f"cannot write {self._path}: {error.strerror}") from error
        self._read += len(lines)
        self.refs.update((ref.unit, ref) for ref in fresh)


def _parse(line: bytes, path: Path) -> ShardRef:
    try:
        unit, name, sha256, size = json.loads(line)
        if parse_shard_path(name) != (unit, sha256):
            raise ValueError("it names a file that is not its unit's shard")
        return ShardRef(unit, name, sha256, int(size))
    except (ValueError, TypeError, AttributeError, StoreError) as error:
        raise CorruptShard(f"{path} is damaged: {error}; remove it, and the same command writes it anew") from error
