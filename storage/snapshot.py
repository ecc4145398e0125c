"""A pinned view of a store: all that a student needs to know of it, in one file of its own.

Enters: a store. Leaves: identity, root and, unit by unit, path, digest and sequences. Costs: about 40 bytes a
sequence. A training run reads no log: what it trains on is fixed when it starts, and resumes from the same list.

Where teachers still write, the units are fixed and some shards are to come: such a snapshot is open. What the student
is bound to is then the list of units; their shards are told as they are committed (arrivals.py), and when the last one
is there the file is written again, complete, as it would have been from the start.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.files import LocalFiles
from stillroom.storage.identity import Identity
from stillroom.storage.plans import units_table
from stillroom.storage.records import ShardRef, Unit, digest128
from stillroom.storage.shard import parse_shard_path
from stillroom.storage.units import read_units

VERSION = 1
#: Of an open one, which an older release must not take for a damaged one.
OPEN_VERSION = 2
_KEY, _DIGEST_KEY = "stillroom.snapshot", "stillroom.snapshot.digest"


@dataclass(frozen=True)
class Snapshot:
    """Pinned shards.

    uri: the store's root. units: in plan order. refs: by unit id; those of all units, of fewer in an open one.
    """

    uri: str
    identity: Identity
    units: tuple[Unit, ...]
    refs: dict[str, ShardRef]

    @property
    def open(self) -> bool:
        """Whether shards are to come."""
        return len(self.refs) < len(self.units)

    @cached_property
    def digest(self) -> str:
        """32 hex digits over the paths, which hold the files' own digests; of an open one `planned_digest`."""
        if self.open:
            return self.planned_digest
        return digest128(b"stillroom.snapshot.1", *(self.refs[u.id].path.encode() for u in self.units))

    @cached_property
    def planned_digest(self) -> str:
        """32 hex digits over identity and units, which are the same before and after the shards are there."""
        units = (u.id.encode() for u in self.units)
        return digest128(b"stillroom.snapshot.planned.1", self.identity.id.encode(), *units)

    def units_of(self, sequences: Iterable[str]) -> list[str]:
        """Ids of the units that hold sequences of these digests, in plan order: for messages, all units are looked
        through. A digest that no unit holds, as of a corpus without signal, adds none."""
        wanted = set(sequences)
        return [unit.id for unit in self.units if not wanted.isdisjoint(unit.sequences)]

    def write(self, path: Path) -> None:
        """One Parquet file, whole or not at all."""
        header = {
            "version": OPEN_VERSION if self.open else VERSION,
            "uri": self.uri,
            "identity": json.loads(self.identity.to_json()),
            "shards": {
                u.id: [self.refs[u.id].path, self.refs[u.id].sha256, self.refs[u.id].size_bytes]
                for u in self.units
                if u.id in self.refs
            },
        }
        text = json.dumps(header).encode()
        # Page checksums do not cover the footer, where this lies.
        table = units_table(self.units).replace_schema_metadata({_KEY: text, _DIGEST_KEY: digest128(text)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        LocalFiles(path.parent).write(path.name, memoryview(sink.getvalue()))

    @staticmethod
    def read(path: Path) -> "Snapshot":
        """Raises StoreError naming the file if it cannot be read or is of another version."""
        try:
            units, metadata = read_units(path.read_bytes(), str(path))
            text, stated = metadata[_KEY.encode()], metadata[_DIGEST_KEY.encode()]
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise StoreError(f"snapshot {path} cannot be read: {' '.join(str(error).split())}") from error
        if digest128(text) != stated.decode(errors="replace"):
            raise CorruptShard(f"snapshot {path} is damaged: its header does not have the digest stated")
        try:
            return _of_header(json.loads(text), tuple(units), path)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StoreError(f"snapshot {path} has a header that cannot be read: {error!r}") from error


def _of_header(header: dict[str, Any], units: tuple[Unit, ...], path: Path) -> Snapshot:
    if header["version"] not in (VERSION, OPEN_VERSION):
        raise StoreError(f"snapshot {path} is of version {header['version']}, this release reads {VERSION}")
    refs = {unit: ShardRef(unit, *fields) for unit, fields in header["shards"].items()}
    planned = {u.id for u in units}
    if not (refs.keys() < planned if header["version"] == OPEN_VERSION else refs.keys() == planned):
        raise CorruptShard(f"snapshot {path} is damaged: it names {len(refs)} shards and plans {len(units)} units")
    if any(parse_shard_path(ref.path) != (ref.unit, ref.sha256) for ref in refs.values()):
        raise CorruptShard(f"snapshot {path} is damaged: it names a file that is not its unit's shard")
    return Snapshot(header["uri"], Identity.from_json(json.dumps(header["identity"])), units, refs)
