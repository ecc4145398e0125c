"""Many stores at a glance: what each holds, how faithful it is, whom it has taught, and what that saved.

Enters: a folder or a bucket's prefix. Leaves: a JSON-able dictionary for each store, and rows for tables of 120
columns. Costs: of each store the log, the plans, the ledgers and no shard: 0.13 s of a core for 10,000 shards of 8
sequences.
"""

import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillroom.storage import plans
from stillroom.storage.catalog.uses import load_taught, load_uses, reuse, unseal
from stillroom.storage.errors import CorruptShard, StillroomError
from stillroom.storage.files import Files, find_stores, open_files
from stillroom.storage.records import digest128
from stillroom.storage.store import Store, open_store

#: Written by pipeline/fidelity.py.
FIDELITY = "_stillroom/fidelity.json"

#: Which part's gradient the table shows: the one that teaches if a student does not choose.
_TEACHING = ("hidden", "topk", "sampled")

#: Columns of a terminal, and how many of them stand between two of a table (and half of them at each end).
_WIDTH, _BETWEEN = 120, 3


def list_stores(root: str) -> list[dict[str, Any]]:
    """Stores at or below a folder or an s3:// prefix, one dictionary each, by path.

    A store that cannot be read carries `error`; one whose numbers are readable, and its account of fidelity or uses is
    not, carries `problems`. Raises StoreError if there is no such folder or bucket.
    """
    found = []
    for uri in find_stores(root):
        try:
            store = open_store(uri)
            held = summary(store)
            found.append(held | _account(store, held["tokens"]))
        except StillroomError as error:
            found.append({"store": uri, "error": str(error)})
    return found


def summary(store: Store) -> dict[str, Any]:
    """A store in numbers: by the log and the plans. Raises StoreError, CorruptShard where they cannot be read."""
    refs = store.committed()
    planned = _planned(store.files)
    committed = np.isin(planned.units, np.array(list(refs), "S32"))
    tokens = int(planned.tokens[committed].sum())
    size = sum(ref.size_bytes for ref in refs.values())
    identity = store.identity
    return {
        "store": store.uri,
        "identity": identity.id,
        "identity_in_words": f"{identity.teacher}, {_arithmetic(store)}: {identity.signal.in_words()}",
        "teacher": identity.teacher,
        "dtype": identity.dtype,
        "quantisation": identity.quantisation,
        "signal": identity.signal.in_words(),
        "tiers": list(identity.signal.as_dict()),
        "vocabulary": identity.vocabulary,
        "shards": len(refs),
        "sequences": int(planned.sequences[committed].sum()),
        "tokens": tokens,
        "rows": int(planned.rows[committed].sum()),
        "bytes": size,
        "bytes_per_token": round(size / tokens, 2) if tokens else None,
        "units_planned_not_committed": int((~committed).sum()),
    }


def kept_fidelity(files: Files) -> dict[str, Any] | None:
    """What was measured of a store: `sample`, `reference_student`, `rows`, `noise`; None if nothing was.

    Raises CorruptShard where the file is not that.
    """
    if not files.exists(FIDELITY):
        return None
    try:
        found = unseal(files.read(FIDELITY))
        noise = found["noise"] or {"rows": []}
        for row in (*found["rows"], *noise["rows"]):
            if not all(isinstance(value, str) or value is None or isfinite(value) for value in row.values()):
                raise ValueError("a number is not finite")
            _ = row["temperature"], row["gradient_angle_deg"]
        _ = found["sample"], found["reference_student"], [(row["tier"], row["retained_mass"]) for row in found["rows"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptShard(
            f"{files.uri}/{FIDELITY} cannot be read ({' '.join(str(error).split())}): remove it, and `stillroom teach` "
            "on the recipe measures anew"
        ) from error
    return found


def _account(store: Store, tokens: int) -> dict[str, Any]:
    """Fidelity and reuse; of a part that is damaged, null and a line in `problems`."""
    account: dict[str, Any] = {"fidelity": None, "gradient_angle_deg": None, "reuse": None, "problems": []}
    try:
        held = kept_fidelity(store.files)
        if held:
            angles = {row["tier"]: row["gradient_angle_deg"] for row in held["rows"] if row["temperature"] == 1}
            account["fidelity"] = held
            account["gradient_angle_deg"] = next((angles[part] for part in _TEACHING if part in angles), None)
    except StillroomError as error:
        account["problems"].append(str(error))
    try:
        account["reuse"] = reuse_of(store, tokens)
    except StillroomError as error:
        account["problems"].append(str(error))
    return account


def reuse_of(store: Store, tokens: int) -> dict[str, Any]:
    """`uses.Reuse` of a store. tokens: committed. Raises CorruptShard, StoreError."""
    return reuse(load_uses(store.files), load_taught(store.files), store_tokens=tokens).as_dict()


@dataclass(frozen=True)
class _Planned:
    """Units of all plans, each once: units S32; sequences, tokens, rows int64."""

    units: NDArray[np.bytes_]
    sequences: NDArray[np.int64]
    tokens: NDArray[np.int64]
    rows: NDArray[np.int64]


def _planned(files: Files) -> _Planned:
    """Sums by unit, without making a Python object of each sequence: 20 times as fast as `load_plans`.

    A plan is checked against its name, units against their sequences are not: `verify` does that.
    Raises CorruptShard naming a plan that cannot be read.
    """
    parts = [_of_plan(files, name) for name in files.list(plans.FOLDER) if re.fullmatch(plans.NAME, name)]
    whole = np.concatenate([units for units, _ in parts]) if parts else np.zeros(0, "S32")
    sums = np.concatenate([part for _, part in parts], axis=1) if parts else np.zeros((3, 0), np.int64)
    units, first = np.unique(whole, return_index=True)
    return _Planned(units, *sums[:, first])


def _of_plan(files: Files, name: str) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """Units S32 [N], and int64 [3, N]: their sequences, tokens and rows."""
    where = f"{files.uri}/{name}"
    try:
        source = pa.BufferReader(files.read(name))
        table = pq.ParquetFile(source, page_checksum_verification=True).read(
            columns=["unit", "tokens", "context"], use_threads=False
        )
        unit = table["unit"].combine_chunks().dictionary_encode()
        codes = unit.indices.to_numpy()
        tokens, context = (table[column].to_numpy().astype(np.int64) for column in ("tokens", "context"))
        ids: list[str] = unit.dictionary.to_pylist()
        if digest128(b"stillroom.plan.1", *(i.encode() for i in ids)) not in name:
            raise ValueError("it holds other units than its name says")
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptShard(f"plan {where} cannot be read: {' '.join(str(error).split())}") from error
    rows = tokens - np.maximum(context - 1, 0)
    sums = [np.bincount(codes, weights, minlength=len(ids)) for weights in (np.ones(len(codes)), tokens, rows)]
    return np.array(ids, "S32"), np.stack(sums).astype(np.int64)


def table_rows(stores: Seq[dict[str, Any]], root: str) -> list[dict[str, str]]:
    """What stores hold, for people, as a table at most 120 columns wide; paths relative to `root`, "." for itself.

    stores: as `list_stores` gives them; those with an error are left out, `problem_rows` has them.
    """
    return _fitted([_row(store, root) for store in stores if "error" not in store], ("store", "teacher", "signal"))


def reuse_rows(stores: Seq[dict[str, Any]], root: str) -> list[dict[str, str]]:
    """What stores have cost and saved, of those that have an account of it; as wide. Hours are a teacher's."""
    known = [store for store in stores if "error" not in store and store["reuse"]]
    rows = [_reuse_row(store, root) for store in known if store["reuse"]["uses"] or store["reuse"]["teaching_runs"]]
    return _fitted(rows, ("store", "students"))


def problem_rows(stores: Seq[dict[str, Any]], root: str) -> list[dict[str, str]]:
    """One line for each store's error, and for each part of one that could not be read."""
    return [
        {"store": _relative(store["store"], root), "problem": line}
        for store in stores
        for line in ([store["error"]] if "error" in store else store["problems"])
    ]


def _row(store: dict[str, Any], root: str) -> dict[str, str]:
    name = str(store["teacher"]).rstrip("/").rpartition("/")[2]
    return {
        "store": _relative(store["store"], root),
        "teacher": f"{name} {store['quantisation'] or store['dtype']}",
        "signal": store["signal"],
        "tokens": _scaled(store["tokens"]).strip(),
        "size": f"{_scaled(store['bytes'])}B",
        "B/token": _shown(store["bytes_per_token"], ".1f"),
        "angle": _shown(store["gradient_angle_deg"], ".1f", "°"),
    }


def _reuse_row(store: dict[str, Any], root: str) -> dict[str, str]:
    reused = store["reuse"]
    return {
        "store": _relative(store["store"], root),
        "students": ", ".join(reused["students"]) or "–",
        "uses": str(reused["uses"]),
        "last use": (reused["last_use"] or "–")[:10],
        "passes": _shown(reused["passes"], ".3g"),
        "break-even": _shown(reused["break_even_passes"], ".3g"),
        "spent h": _shown(reused["teacher_hours_spent"], ".3g"),
        "live h": _shown(reused["teacher_hours_live"], ".3g"),
        "saved h": _shown(reused["teacher_hours_saved"], ".3g"),
    }


def _fitted(rows: list[dict[str, str]], elastic: Seq[str]) -> list[dict[str, str]]:
    """Rows whose table fits: the widest of the `elastic` columns gives way."""
    while rows and sum(width + _BETWEEN for width in _widths(rows).values()) > _WIDTH:
        widths = _widths(rows)
        widest = max(elastic, key=lambda name: widths[name])
        if widths[widest] <= len(widest):
            break  # headings are not cut
        rows = [row | {widest: _shortened(row[widest], widths[widest] - 1)} for row in rows]
    return rows


def _widths(rows: Seq[dict[str, str]]) -> dict[str, int]:
    return {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}


def _shortened(text: str, width: int) -> str:
    """The end is kept, and so is the beginning, as names differ there."""
    return text if len(text) <= width else f"{text[: width // 2]}…{text[len(text) - (width - 1 - width // 2) :]}"


def _relative(uri: str, root: str) -> str:
    """`uri` below `root`; as it is where it lies elsewhere."""
    base = open_files(root).uri
    return "." if uri == base else uri.removeprefix(f"{base}/")


def _arithmetic(store: Store) -> str:
    """`float32`, or `bfloat16 from Q8_0`."""
    identity = store.identity
    return f"{identity.dtype} from {identity.quantisation}" if identity.quantisation else identity.dtype


def _scaled(number: float) -> str:
    """40960 → "41.0 k"."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if not unit or number >= 99.95 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.0f} P"


def _shown(number: float | None, form: str, unit: str = "") -> str:
    """Up to five digits before the point as they are: `.3g` would make 1,234 hours 1.23e+03."""
    if number is None:
        return "–"
    return f"{number:,.0f}{unit}" if form.endswith("g") and 999.5 <= abs(number) < 1e6 else f"{number:{form}}{unit}"
