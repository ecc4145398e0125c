"""Questions about a store: what is in it, how faithful is it, what does the teacher say at a position.

Enters: a URI. Leaves: JSON-able dictionaries. Costs: log and plans, one listing of the
store, at most 64 shard footers for the columns' sizes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from stillroom.storage.catalog.footers import columns_of, footer_of
from stillroom.storage.catalog.stores import kept_fidelity, reuse_of, summary
from stillroom.storage.catalog.stores import list_stores as list_stores  # part of what this module offers
from stillroom.storage.catalog.views import texts_of
from stillroom.storage.errors import StoreError
from stillroom.storage.records import Sequence, ShardRef, TopK
from stillroom.storage.store import Store, open_store

#: Footers read for the size of each column; more would only slow down a store of a million shards.
_SAMPLED_SHARDS = 64

#: Unit ids shown, to have one for `--unit`.
_SHOWN_UNITS = 5


def inspect_store(uri: str, unit: str | None = None, *, positions: int = 64) -> dict[str, Any]:
    """A store in numbers; with `unit` (an id or its beginning) that unit's sequences, position by position."""
    store = open_store(uri)
    if unit is not None:
        return _unit(store, unit, positions)
    refs = store.committed()
    found = summary(store)
    found |= _on_disk(store, refs, found["tokens"])
    found["first_units"] = sorted(refs)[:_SHOWN_UNITS]
    found["identity_parts"] = store.identity.parts()
    found["columns_bytes_per_token"] = _column_sizes(store, list(refs.values())[:_SAMPLED_SHARDS])
    found["columns_sampled_shards"] = min(len(refs), _SAMPLED_SHARDS)
    if refs:
        reader = store.reader(next(iter(refs.values())))
        found["provenance_of_first_shard"] = reader.footer["provenance"]
        if "logit" in reader.footer:
            found["logit"] = reader.footer["logit"]
    found |= _fidelity(store)
    found["reuse"] = reuse_of(store, found["tokens"])
    return found


def _on_disk(store: Store, refs: Mapping[str, ShardRef], tokens: int) -> dict[str, Any]:
    """All files of the store by what they are, leftovers of stopped writers too.

    bytes_per_token_without_sample_and_head: the fidelity sample and the output head do not grow with the store.
    """
    held = {ref.path for ref in refs.values()}
    sizes = dict.fromkeys(("shards", "leftover_shards", "log", "plans", "fidelity_sample", "output_head", "other"), 0)
    for info in store.files.walk():
        kind = ("shards" if info.name in held else "leftover_shards") if info.name.startswith("shards/") else "other"
        kind = next((name for beginning, name in _KINDS.items() if info.name.startswith(beginning)), kind)
        sizes[kind] += info.size_bytes
    apart = sizes["fidelity_sample"] + sizes["output_head"]
    return {
        "on_disk": {f"{name}_bytes": size for name, size in sizes.items()},
        "bytes_per_token_without_sample_and_head": round((sum(sizes.values()) - apart) / tokens, 2) if tokens else None,
    }


_KINDS = {
    "_delta_log/": "log",
    "_stillroom/plans/": "plans",
    "_stillroom/truth/": "fidelity_sample",
    "_stillroom/head-": "output_head",
}


def _fidelity(store: Store) -> dict[str, Any]:
    """What was measured, as tables: by tier and temperature, and the teacher against itself."""
    held = kept_fidelity(store.files)
    if held is None:
        return {"fidelity": None}
    noise = held["noise"] or {}
    return {
        "reference_student": held["reference_student"],
        "fidelity": held["rows"],
        "noise_positions": noise.get("positions"),
        "noise_max_logit_difference": noise.get("max_logit_difference"),
        "noise_band": noise.get("rows", []),
    }


def _column_sizes(store: Store, refs: list[ShardRef]) -> dict[str, float]:
    sizes: dict[str, int] = {}
    tokens = 0
    for ref in refs:
        for name, column in columns_of(footer_of(store, ref)):
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
            tokens += column.num_values if name == "input_ids" else 0
    return {name: round(size / max(tokens, 1), 2) for name, size in sizes.items()}


def _unit(store: Store, unit: str, positions: int) -> dict[str, Any]:
    refs = store.committed()
    matches = [u for u in refs if u.startswith(unit)]
    if len(matches) != 1:
        raise StoreError(f"store {store.uri}: {len(matches)} committed units begin with {unit!r}, expected one")
    rows, texts = [], texts_of(store.files)
    for stored in store.reader(refs[matches[0]]):
        assert stored.signal is not None
        topk = stored.signal.topk
        rows.append(
            {
                "sequence": stored.sequence.digest,
                "context": stored.sequence.context,
                "tokens": len(stored.sequence.input_ids),
                "positions": _positions(stored.sequence, topk, positions, texts) if topk else [],
            }
        )
    return {"store": store.uri, "unit": matches[0], "path": refs[matches[0]].path, "sequences": rows}


def _positions(sequence: Sequence, topk: TopK, limit: int, texts: list[str] | None) -> list[dict[str, Any]]:
    """The first `limit` positions: the token read, and the teacher's five best next ones at T = 1, as text too where
    the store has a table of tokens."""
    ids, first = sequence.input_ids, sequence.first_position
    logits = topk.logits.astype(np.float64)
    tail = topk.tail_lse[:, -1].astype(np.float64)
    total = np.logaddexp(np.logaddexp.reduce(logits, axis=1), tail)
    return [
        {
            "position": first + row,
            "id": int(ids[first + row]),
            **({"text": texts[ids[first + row]]} if texts else {}),
            "top_ids": topk.ids[row, : min(topk.kept[row], 5)].tolist(),
            **({"top_texts": [texts[i] for i in topk.ids[row, : min(topk.kept[row], 5)]]} if texts else {}),
            "top_probabilities": np.round(np.exp(logits[row, : min(topk.kept[row], 5)] - total[row]), 4).tolist(),
            "tail_probability": round(float(np.exp(tail[row] - total[row])), 4),
        }
        for row in range(min(len(topk), limit))
    ]
