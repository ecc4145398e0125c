"""Questions about stores: what is there, what is in it, what does the teacher say at a position.

Enters: a URI. Leaves: JSON-able dictionaries. Costs: log and plans; at most 64 shard footers for the columns' sizes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import CorruptShard, StillroomError, StoreError
from stillroom.storage.records import ShardRef, TopK
from stillroom.storage.store import IDENTITY, Store, open_store

#: Footers read for the size of each column; more would only slow down a store of a million shards.
_SAMPLED_SHARDS = 64

#: Unit ids shown, to have one for `--unit`.
_SHOWN_UNITS = 5


def list_stores(root: str) -> list[dict[str, Any]]:
    """Stores at or below a folder, one dictionary each, by path. A store that cannot be read carries `error`.

    Raises StoreError if there is no such folder.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise StoreError(f"{root} is no folder")
    found = []
    for identity in sorted(folder.glob(f"**/{IDENTITY}")):
        uri = str(identity.parent.parent)
        try:
            found.append(_summary(open_store(uri)))
        except StillroomError as error:
            found.append({"store": uri, "error": str(error)})
    return found


def inspect_store(uri: str, unit: str | None = None, *, positions: int = 64) -> dict[str, Any]:
    """A store in numbers; with `unit` (an id or its beginning) that unit's sequences, position by position."""
    store = open_store(uri)
    if unit is not None:
        return _unit(store, unit, positions)
    refs = store.committed()
    summary = _summary(store)
    summary["first_units"] = sorted(refs)[:_SHOWN_UNITS]
    summary["identity_parts"] = store.identity.parts()
    summary["columns_bytes_per_token"] = _column_sizes(store, list(refs.values())[:_SAMPLED_SHARDS])
    summary["columns_sampled_shards"] = min(len(refs), _SAMPLED_SHARDS)
    if refs:
        reader = store.reader(next(iter(refs.values())))
        summary["provenance_of_first_shard"] = reader.footer["provenance"]
        summary["logit"] = reader.footer["logit"]
    return summary


def _summary(store: Store) -> dict[str, Any]:
    refs = store.committed()
    planned = {u.id: u for u in store.planned()}
    units = [planned[i] for i in refs if i in planned]
    tokens = sum(sum(u.tokens) for u in units)
    shard_bytes = sum(ref.size_bytes for ref in refs.values())
    identity = store.identity
    return {
        "store": store.uri,
        "identity": identity.id,
        "teacher": identity.teacher,
        "dtype": identity.dtype,
        "signal": {"tier": "topk", **identity.signal.as_dict()},
        "vocabulary": identity.vocabulary,
        "shards": len(refs),
        "sequences": sum(len(u.sequences) for u in units),
        "tokens": tokens,
        "rows": sum(sum(u.rows) for u in units),
        "bytes": shard_bytes,
        "bytes_per_token": round(shard_bytes / tokens, 2) if tokens else None,
        "units_planned_not_committed": len(planned.keys() - refs.keys()),
    }


def _column_sizes(store: Store, refs: list[ShardRef]) -> dict[str, float]:
    sizes: dict[str, int] = {}
    tokens = 0
    for ref in refs:
        metadata = _footer(store, ref)
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                name = column.path_in_schema.partition(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
                tokens += column.num_values if name == "input_ids" else 0
    return {name: round(size / max(tokens, 1), 2) for name, size in sizes.items()}


def _footer(store: Store, ref: ShardRef) -> pq.FileMetaData:
    try:
        return pq.read_metadata(store.files.open(ref.path))
    except (pa.ArrowException, OSError) as error:
        where = f"{store.uri}/{ref.path}"
        raise CorruptShard(f"{where} is no Parquet file: {error}; run `stillroom verify {store.uri}`") from error


def _unit(store: Store, unit: str, positions: int) -> dict[str, Any]:
    refs = store.committed()
    matches = [u for u in refs if u.startswith(unit)]
    if len(matches) != 1:
        raise StoreError(f"store {store.uri}: {len(matches)} committed units begin with {unit!r}, expected one")
    rows = []
    for stored in store.reader(refs[matches[0]]):
        assert stored.topk is not None
        rows.append(
            {
                "sequence": stored.sequence.digest,
                "context": stored.sequence.context,
                "tokens": len(stored.sequence.input_ids),
                "positions": _positions(
                    stored.sequence.input_ids, stored.sequence.first_position, stored.topk, positions
                ),
            }
        )
    return {"store": store.uri, "unit": matches[0], "path": refs[matches[0]].path, "sequences": rows}


def _positions(ids: Any, first: int, topk: TopK, limit: int) -> list[dict[str, Any]]:
    """The first `limit` positions: the token read, and the teacher's five best next ones at T = 1."""
    logits = topk.logits.astype(np.float64)
    tail = topk.tail_lse[:, -1].astype(np.float64)
    total = np.logaddexp(np.logaddexp.reduce(logits, axis=1), tail)
    return [
        {
            "position": first + row,
            "id": int(ids[first + row]),
            "top_ids": topk.ids[row, :5].tolist(),
            "top_probabilities": np.round(np.exp(logits[row, :5] - total[row]), 4).tolist(),
            "tail_probability": round(float(np.exp(tail[row] - total[row])), 4),
        }
        for row in range(min(len(topk), limit))
    ]
