"""Which files of a store a student still needs, though the log may not name them any more.

Enters: a snapshot and where its file lies. Leaves: one small JSON file in the store for each student that is pinned to
it. Costs: 19 bytes a shard.

    _stillroom/pins/<digest>.json    snapshot, path and host of its file, and 16 digits of each shard's sha256

A snapshot lies in its student's folder, which the store does not know; so whoever pins says so here. A pin is over
when its snapshot's file is gone, or is another by now. Whether a file on another machine is gone nobody here can tell:
such a pin holds until its file in _stillroom/pins is removed by hand.
"""

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.files import Files
from stillroom.storage.records import digest128
from stillroom.storage.snapshot import Snapshot

FOLDER = "_stillroom/pins"
_NAME = re.compile(FOLDER + r"/[0-9a-f]{32}\.json")

#: Of each sha256. Two files of equal first 64 bits would be spared both.
_DIGITS = 16


@dataclass(frozen=True)
class Pin:
    """snapshot: its digest. path: of its file, absolute. host: where that is. shards: beginnings of their sha256."""

    snapshot: str
    path: str
    host: str
    shards: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the pin's file: one for each snapshot file, so that pinning anew replaces what it pinned before."""
        return f"{FOLDER}/{digest128(b'stillroom.pin.1', self.host.encode(), self.path.encode())}.json"

    def is_over(self, host: str) -> bool:
        """Whether nobody can need it any more, as far as this host can tell."""
        path = Path(self.path)
        try:
            if not path.exists():
                return self.host == host
            return Snapshot.read(path).digest != self.snapshot
        except (OSError, StoreError):  # it is there, and cannot be read now: no evidence that it is over
            return False


def this_host() -> str:
    return socket.gethostname()


def pin(files: Files, snapshot: Snapshot, path: Path) -> str:
    """Say in the store that the snapshot at `path` needs its shards; returns the pin's name.

    Call it before the snapshot is written: the other way round `gc` could run in between. (It spares young pins.)
    Raises StoreError if the store cannot be written.
    """
    shards = tuple(sorted(short(ref.sha256) for ref in snapshot.refs.values()))
    made = Pin(snapshot.digest, str(path.absolute()), this_host(), shards)
    files.write(made.name, json.dumps(asdict(made)).encode())
    return made.name


def is_pin(name: str) -> bool:
    """Whether a file of the store is a pin, by its name."""
    return _NAME.fullmatch(name) is not None


def short(sha256: str) -> str:
    """A shard's digest as pins hold it."""
    return sha256[:_DIGITS]


def load_pins(files: Files) -> Iterator[tuple[str, Pin]]:
    """All pins with their names. Raises CorruptShard for one that cannot be read: what it held is then not known."""
    for name in files.list(FOLDER):
        if not is_pin(name):
            continue
        try:
            fields = json.loads(files.read(name))
            found = Pin(fields["snapshot"], fields["path"], fields["host"], tuple(fields["shards"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptShard(
                f"pin {files.uri}/{name} cannot be read ({' '.join(str(error).split())}), and which shards its student "
                "needs is not known: remove it if that student is done, else train it on, which writes it anew"
            ) from error
        yield name, found
