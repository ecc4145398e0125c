"""A store of very many committed shards that need not exist: the log, the plans and the manifest are real.

Enters: a folder and a number of units. Leaves: a store and a corpus manifest of one sequence more than units in it.
Costs: about 40 s and 1 GB at a million.

Run as a program it opens such a store in a fresh process, lists it, plans the resume, and prints one JSON object:
seconds by part, peak resident memory, and what it found: `python -m tests.faults.synthetic FOLDER`.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.identity import canonical_json
from stillroom.storage.manifest import META_DIGEST_KEY, META_KEY, SCHEMA, ManifestMeta
from stillroom.storage.records import Receipt, ShardRef, Unit, digest128
from stillroom.storage.shard import shard_path
from stillroom.storage.store import create_store
from tests.strategies import TOKENIZER, tiny_identity

TOKENS = 512


def make(folder: Path, count: int, *, per_commit: int = 100_000, plans: int = 4) -> None:
    """`folder`/store has `count` committed units of one sequence each, `folder`/manifest.parquet ten sequences more."""
    rng = np.random.default_rng(0)
    digests = sorted(rng.bytes(16).hex() for _ in range(count + 10))
    fresh = set(rng.permutation(count + 10)[:10].tolist())
    units = [Unit((digest,), (TOKENS,), (0,)) for n, digest in enumerate(digests) if n not in fresh]
    store = create_store(str(folder / "store"), tiny_identity())
    for part in np.array_split(np.arange(count), plans):
        store.save_plan([units[n] for n in part])
    for start in range(0, count, per_commit):
        store.commit([_receipt(unit) for unit in units[start : start + per_commit]])
    _write_manifest(folder / "manifest.parquet", digests)


def _receipt(unit: Unit) -> Receipt:
    sha256 = 2 * unit.id
    ref = ShardRef(unit.id, shard_path(unit.id, sha256), sha256, 50_000)
    return Receipt(ref, 1, TOKENS, TOKENS, batches=1, seconds=0.1)


def _write_manifest(path: Path, digests: list[str]) -> None:
    """Without token ids: planning reads none. `ManifestWriter` takes a minute for a million rows."""
    count = len(digests)
    flat = {"document": np.arange(count), "line": np.arange(count), "weight": np.ones(count)}
    numbers = {"tokens": TOKENS, "trained": TOKENS - 1, "window": 0, "context": 0}
    words = {"source": "corpus.txt", "split": "train"}
    empty = pa.ListArray.from_arrays(np.zeros(count + 1, np.int32), pa.array([], pa.int32()))
    columns = []
    for field in SCHEMA:
        if field.name in words:
            column = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), [words[field.name]])
        elif field.name == "sequence":
            column = pa.array(digests)
        elif field.name in ("input_ids", "mask_runs"):
            column = empty
        else:
            column = pa.array(flat.get(field.name, np.full(count, numbers.get(field.name, 0))))
        columns.append(column.cast(field.type))
    meta = ManifestMeta(TOKENS, 0, TOKENIZER, None, 40, {}, {}, "00" * 16, rows=count, rows_digest="ab" * 16)
    text = canonical_json(asdict(meta))
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    table = table.replace_schema_metadata({META_KEY: text, META_DIGEST_KEY: digest128(text)})
    pq.write_table(table, path, row_group_size=16_384, compression="zstd", write_page_checksum=True)


def measure(folder: Path) -> dict[str, float]:
    """What a resume does before its first unit is scored."""
    from stillroom.pipeline.plan import make_plan
    from stillroom.storage.manifest import Manifest
    from stillroom.storage.store import open_store

    seconds: dict[str, float] = {"imported_mb": peak_mb()}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[f"{name}_s"], last = round(now - last, 2), now
        seconds[f"{name}_peak_mb"] = peak_mb()

    store = open_store(str(folder / "store"))
    lap("open")
    refs = store.committed()
    listed = sum(ref.size_bytes for ref in refs.values())
    lap("list")
    manifest = Manifest.open(folder / "manifest.parquet")
    plan = make_plan(manifest, store, unit_tokens=4 * TOKENS, seed=0, save=False)
    lap("plan")
    found = {"committed": len(refs), "bytes": listed, "held": plan.held, "pending": len(plan.pending),
             "pending_sequences": plan.pending_sequences, "sequences": plan.sequences}  # fmt: skip
    return seconds | found


def peak_mb() -> float:
    """Largest resident memory of this process so far. Not `getrusage`, which begins with what the parent had."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
