"""A store as plain numbers: what it holds, bytes by column, retained mass by k and T, the teacher's entropy.

Enters: a store. Leaves: a JSON-able dictionary. Costs: `inspect_store`, and the rows of units up to `ROWS` decoded once
(top-k: 30,000 rows a second of one core); a store of hidden states alone: `HIDDEN_ROWS` rows through the output head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.pipeline.report.teacher import entropy_of_topk, ks_up_to, mass_by_k, of_draws, of_full
from stillroom.storage.catalog.inspect import inspect_store
from stillroom.storage.records import Float32, Signal
from stillroom.storage.store import Store, open_store

#: Rows read at most. Above it units are left out, and the page says so.
ROWS = 120_000

#: Of a store of hidden states alone: each row is V · D products.
HIDDEN_ROWS = 2048

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)

#: Bins of the histogram.
_BINS = 40

HOW = {
    "topk": "from the kept ids and the slope of the stored tail curve, which counts every id of the vocabulary "
    "(within 0.04 nats of the full logits where measured)",
    "hidden": "exact, from the logits of the whole vocabulary, rebuilt from the stored hidden states",
    "sampled": "of the stored draws: too low, as ids that were not drawn count for nothing",
}


def gather_store(uri: str, *, rows: int = ROWS) -> dict[str, Any]:
    """See the module's text. `entropy`, `mass` are None where the store's parts do not tell them."""
    store = open_store(uri)
    found = inspect_store(uri)
    kept = (
        "store", "teacher", "dtype", "quantisation", "signal", "vocabulary", "shards", "sequences", "tokens", "rows",
        "bytes", "bytes_per_token", "on_disk", "columns_bytes_per_token", "columns_sampled_shards", "fidelity", "reuse",
        "units_planned_not_committed",
    )  # fmt: skip
    data: dict[str, Any] = {name: found.get(name) for name in kept}
    measured = _measure(store, rows)
    return data | {
        "rows_read": measured.rows,
        "entropy": _histogram(measured.entropy, measured.part),
        "mass": _mass(measured),
    }


@dataclass
class _Measured:
    """part: which one was read. entropy: nats of rows. mass: sums over rows, [temperature, k]."""

    part: str
    rows: int = 0
    entropy: list[NDArray[np.float64]] = field(default_factory=list)
    ks: list[int] = field(default_factory=list)
    mass: NDArray[np.float64] | None = None
    mass_rows: int = 0

    def add_mass(self, mean: NDArray[np.float64], rows: int) -> None:
        self.mass = mean * rows if self.mass is None else self.mass + mean * rows
        self.mass_rows += rows


def _measure(store: Store, limit: int) -> _Measured:
    signal, vocabulary = store.identity.signal, store.identity.vocabulary
    if signal.topk is not None:
        found = _Measured("topk", ks=ks_up_to(signal.topk.k))
        for block in _blocks(store, ("topk",), limit):
            assert block.topk is not None
            found.rows += len(block)
            found.entropy.append(entropy_of_topk(block.topk, vocabulary))
            found.add_mass(mass_by_k(block.topk, vocabulary, ks=found.ks, temperatures=TEMPERATURES), len(block))
        return found
    if signal.hidden is not None:
        return _of_hidden(store, min(limit, HIDDEN_ROWS))
    found = _Measured("sampled")
    for block in _blocks(store, ("sampled",), limit) if signal.sampled else ():
        assert block.sampled is not None
        found.rows += len(block)
        found.entropy.append(of_draws(block.sampled).entropy)
    return found


def _of_hidden(store: Store, limit: int) -> _Measured:
    rebuild = full_rows(store)
    found = _Measured("hidden", ks=[k for k in ks_up_to(256) if k < store.identity.vocabulary])
    for block in _blocks(store, ("hidden",), limit):
        logits_RV = rebuild(block)
        found.rows += len(block)
        found.entropy.append(of_full(logits_RV).entropy)
        found.add_mass(_mass_of_full(logits_RV, found.ks), len(block))
    return found


def full_rows(store: Store) -> Any:
    """signal → float32 [R, V], the teacher's logits rebuilt from its hidden states alone; torch is imported here."""
    from stillroom.pipeline.fidelity import rebuilder

    rebuild = rebuilder(store.files, store.identity)

    def alone(block: Signal) -> Float32:
        return rebuild(Signal(hidden=block.hidden), 1.0)

    return alone


def _mass_of_full(logits_RV: Float32, ks: list[int]) -> NDArray[np.float64]:
    rows = np.empty((len(TEMPERATURES), len(ks)))
    largest = -np.partition(-logits_RV, max(ks) - 1, axis=1)[:, : max(ks)]
    largest = -np.sort(-largest, axis=1)
    for number, temperature in enumerate(TEMPERATURES):
        top_R1 = largest[:, :1].astype(np.float64)
        total_R = np.exp((logits_RV - top_R1) / temperature).sum(1)
        share_RK = np.exp((largest - top_R1) / temperature) / total_R[:, None]
        rows[number] = np.cumsum(share_RK.mean(0))[np.array(ks) - 1]
    return rows


def _blocks(store: Store, parts: tuple[str, ...], limit: int) -> Iterator[Signal]:
    """Row groups of units by id, at most `limit` rows in pieces of 256. A unit's id is a digest, so the first ones are
    a fixed random part of the store."""
    from stillroom.storage.shard import ShardReader

    left = limit
    for _, ref in sorted(store.committed().items()):
        reader = ShardReader(store.files, ref, store.identity, parts=parts)
        for group in range(reader.groups):
            whole = Signal.concatenate([s.signal for s in reader.read_group(group) if s.signal is not None])
            for start in range(0, len(whole), 256):
                piece = whole[start : min(start + 256, start + left)]
                yield piece
                left -= len(piece)
                if left <= 0:
                    return


def _histogram(parts: list[NDArray[np.float64]], part: str) -> dict[str, Any] | None:
    if not parts:
        return None
    entropy = np.concatenate(parts)
    counts, edges = np.histogram(entropy, bins=_BINS, range=(0.0, float(np.ceil(max(entropy.max(), 1.0)))))
    return {
        "how": HOW[part],
        "edges": np.round(edges, 4).tolist(),
        "counts": counts.tolist(),
        "mean": float(entropy.mean()),
        "median": float(np.median(entropy)),
        "rows": len(entropy),
    }


def _mass(found: _Measured) -> dict[str, Any] | None:
    if found.mass is None:
        return None
    shares = found.mass / found.mass_rows
    return {"temperatures": list(TEMPERATURES), "k": found.ks, "mass": np.round(shares, 5).tolist()}
