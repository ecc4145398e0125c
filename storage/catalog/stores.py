"""Many stores at a glance: what each holds, how faithful it is, whom it has taught, and what that saved.

Enters: a folder or a bucket's prefix. Leaves: a JSON-able dictionary for each store, and rows for tables of 120
columns. Costs: of each store the log, the plans, the ledgers and no shard: 0.13 s of a core for 10,000 shards of 8
sequences.
"""

from collections.abc import Sequence as Seq
from math import isfinite
from typing import Any

import numpy as np

from stillroom.storage.catalog import generations
from stillroom.storage.catalog.planned import planned_sums
from stillroom.storage.catalog.tables import fitted, relative, scaled, shown
from stillroom.storage.catalog.uses import load_taught, load_uses, reuse, unseal
from stillroom.storage.errors import CorruptShard, StillroomError
from stillroom.storage.files import Files, find_stores
from stillroom.storage.generations.store import GenerationStore, open_any
from stillroom.storage.store import Store

#: Written by pipeline/fidelity.py.
FIDELITY = "_stillroom/fidelity.json"

#: Which part's gradient the table shows: the one that teaches if a student does not choose.
_TEACHING = ("hidden", "topk", "sampled")


def list_stores(root: str) -> list[dict[str, Any]]:
    """Stores at or below a folder or an s3:// prefix, one dictionary each, by path.

    A store that cannot be read carries `error`; one whose numbers are readable, and its account of fidelity or uses is
    not, carries `problems`. Raises StoreError if there is no such folder or bucket.
    """
    found = []
    for uri in find_stores(root):
        try:
            store = open_any(uri)
            if isinstance(store, GenerationStore):
                found.append(generations.summary(store))
                continue
            held = summary(store)
            found.append(held | _account(store, held["tokens"]))
        except StillroomError as error:
            found.append({"store": uri, "error": str(error)})
    return found


def summary(store: Store) -> dict[str, Any]:
    """A store in numbers: by the log and the plans. Raises StoreError, CorruptShard where they cannot be read."""
    refs = store.committed()
    planned = planned_sums(store.files)
    committed = np.isin(planned.units, np.array(list(refs), "S32"))
    tokens = int(planned.tokens[committed].sum())
    size = sum(ref.size_bytes for ref in refs.values())
    identity = store.identity
    return {
        "kind": "signal",
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


def table_rows(stores: Seq[dict[str, Any]], root: str, *, fold: bool = False) -> list[dict[str, str]]:
    """What stores hold, for people, as a table at most 120 columns wide; paths relative to `root`, "." for itself.

    stores: as `list_stores` gives them; those with an error are left out, `problem_rows` has them. fold: paths of more
    columns than there is room for go over several lines; else they stay whole, and the table is wider.
    """
    known = [store for store in stores if "error" not in store and store["kind"] == "signal"]
    return fitted([_row(store, root) for store in known], ("teacher",), "signal", fold=fold)


def reuse_rows(stores: Seq[dict[str, Any]], root: str, *, fold: bool = False) -> list[dict[str, str]]:
    """What stores have cost and saved, of those that have an account of it; as wide. Hours are a teacher's."""
    known = [store for store in stores if "error" not in store and store.get("reuse")]
    rows = [_reuse_row(store, root) for store in known if store["reuse"]["uses"] or store["reuse"]["teaching_runs"]]
    return fitted(rows, ("students",), fold=fold)


def problem_rows(stores: Seq[dict[str, Any]], root: str) -> list[dict[str, str]]:
    """One line for each store's error, and for each part of one that could not be read."""
    return [
        {"store": relative(store["store"], root), "problem": line}
        for store in stores
        for line in ([store["error"]] if "error" in store else store["problems"])
    ]


def _row(store: dict[str, Any], root: str) -> dict[str, str]:
    name = str(store["teacher"]).rstrip("/").rpartition("/")[2]
    return {
        "store": relative(store["store"], root),
        "teacher": f"{name} {store['quantisation'] or store['dtype']}",
        "signal": store["signal"],
        "tokens": scaled(store["tokens"]).strip(),
        "size": f"{scaled(store['bytes'])}B",
        "B/token": shown(store["bytes_per_token"], ".1f"),
        "angle": shown(store["gradient_angle_deg"], ".1f", "°"),
    }


def _reuse_row(store: dict[str, Any], root: str) -> dict[str, str]:
    reused = store["reuse"]
    return {
        "store": relative(store["store"], root),
        "students": ", ".join(reused["students"]) or "–",
        "uses": str(reused["uses"]),
        "last use": (reused["last_use"] or "–")[:10],
        "passes": shown(reused["passes"], ".3g"),
        "break-even": shown(reused["break_even_passes"], ".3g"),
        "spent h": shown(reused["teacher_hours_spent"], ".3g"),
        "live h": shown(reused["teacher_hours_live"], ".3g"),
        "saved h": shown(reused["teacher_hours_saved"], ".3g"),
    }


def _arithmetic(store: Store) -> str:
    """`float32`, or `bfloat16 from Q8_0`."""
    identity = store.identity
    return f"{identity.dtype} from {identity.quantisation}" if identity.quantisation else identity.dtype
