"""`make bench`: what a store takes and gives, on the real teacher, in one run.

Enters: nothing. Leaves: its keys in `build/bench.json`, and a table. Costs: five minutes on two cores the first time,
three later.

    python -m tests.bench.store [--output build/bench.json] [--bars]

Bytes are of whole stores, each file written by the product's own function: shards, log, plans, identity, calibration
and the account. Three things do not grow with the store and are stated by themselves: the fidelity sample, the table of
what ids mean as text (`token_table_bytes`: 212,257, which of these 40,960 tokens is 5.2 bytes each), and the teacher's
output head that a hidden part keeps (`head_bytes`). Speeds are of one core: medians of repeats that take turns, the
codec with Parquet and file. KL and angles are means over 640 positions whose whole-vocabulary logits are kept by the
bench.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from stillroom.pipeline.account import TeachingAccount
from stillroom.pipeline.fidelity import rebuilder
from stillroom.pipeline.options import cut, unit_of
from stillroom.pipeline.token_text import keep_token_table
from stillroom.storage.calibration import save_calibration
from stillroom.storage.catalog.views import token_table
from stillroom.storage.fidelity.measure import Block, Fidelity, measure_blocks
from stillroom.storage.files import open_files
from stillroom.storage.identity import Identity
from stillroom.storage.records import (
    HiddenSpec,
    Receipt,
    SampledSpec,
    Signal,
    SignalSpec,
    TopKSpec,
)
from stillroom.storage.shard import ShardReader, write_shard
from stillroom.storage.store import Store, create_store
from stillroom.workers.head import calibrate, save_head, steps_of
from stillroom.workers.source import load_tokenizer
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.bench.results import merged
from tests.bench.teacher import DRAWS, TOKENS, Scored, scored

K = 64
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
UNIT_SEQUENCES = 16  # 8,192 tokens
REPEATS = 7
CALIBRATION_ROWS = 4096
#: The stores that a bar is about.
BARS = ("topk", "packed", "sampled", "topk and sampled", "hidden")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--bars", action="store_true", help="only the stores that a bar is about")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = scored()
    with tempfile.TemporaryDirectory(prefix="stillroom-bench-") as folder:
        result = bench(data, Path(folder), bars=arguments.bars)
    with merged(arguments.output) as held:
        held |= result
    show(result)


def bench(data: Scored, folder: Path, *, bars: bool) -> dict[str, Any]:
    topk, packed = TopKSpec(K), TopKSpec(K, layout="packed")
    specs = {
        "topk": SignalSpec(topk),
        "topk 1/16": SignalSpec(TopKSpec(K, 1 / 16)),
        "topk 1/4": SignalSpec(TopKSpec(K, 1 / 4)),
        "topk float32": SignalSpec(TopKSpec(K, None)),
        "packed": SignalSpec(packed),
        "sampled": SignalSpec(sampled=SampledSpec(DRAWS)),
        "topk and sampled": SignalSpec(topk, SampledSpec(DRAWS)),
        "hidden": SignalSpec(topk, hidden=HiddenSpec(data.width, "int16")),
        "hidden int8": SignalSpec(topk, hidden=HiddenSpec(data.width, "int8")),
        "hidden bfloat16": SignalSpec(topk, hidden=HiddenSpec(data.width, "bfloat16")),
    }
    names = BARS if bars else tuple(specs)
    stores = {name: build(data, specs[name], folder / name) for name in names}
    rows = {name: describe(data, store) for name, store in stores.items()}
    speeds = speed(data, stores["topk"], folder / "speed")
    naive = naive_layouts(data, folder)
    by_tier = {name: row["bytes_per_token"] for name, row in rows.items()}
    fidelity = {name: row["fidelity"] for name, row in rows.items()}
    signal_bytes = rows["sampled"]["columns_bytes_per_token"]
    return {
        "tokens": TOKENS,
        "k": K,
        "vocabulary": data.identity.vocabulary,
        "token_table_bytes": rows["topk"]["token_table_bytes"],
        "bytes_per_token_topk64": by_tier["topk"],
        "kl_added_topk64": fidelity["topk"]["topk"]["1"]["kl_added_nats"],
        "kl_added_topk64_by_temperature": {t: row["kl_added_nats"] for t, row in fidelity["topk"]["topk"].items()},
        "bytes_per_token_packed64": by_tier["packed"],
        "bytes_per_token_sampled50": by_tier["sampled"],
        "bytes_per_token_sampled50_signal": round(
            sum(size for name, size in signal_bytes.items() if name.startswith("sampled")), 2
        ),
        "bytes_per_token_topk64_sampled50": by_tier["topk and sampled"],
        "bytes_per_token_hidden": by_tier["hidden"],
        "bytes_per_token_hidden_part": round(
            sum(size for name, size in rows["hidden"]["columns_bytes_per_token"].items() if name.startswith("hidden")),
            2,
        ),
        "hidden_width": data.width,
        "gradient_angle_deg_hidden": {t: row["gradient_angle_deg"] for t, row in fidelity["hidden"]["hidden"].items()},
        **speeds,
        "naive_bytes_per_token": naive["int64 ids + float32"],
        "naive_layouts_bytes_per_token": naive,
        "tiers": rows,
    }


def build(data: Scored, spec: SignalSpec, root: Path) -> Store:
    """A whole store of the scored sequences, as teaching makes it, but for the fidelity sample and `progress.json`."""
    files = open_files(str(root))
    if spec.hidden is not None:
        spec = _found(data, spec, root)
    identity = Identity(**{**vars(data.identity), "signal": spec})
    store = create_store(str(root), identity)
    keep_token_table(store.files, _tokenizer(data.folder), identity.vocabulary)
    account = TeachingAccount(store.files, "bench")
    parts = [range(at, min(at + UNIT_SEQUENCES, len(data.sequences))) for at in range(0, len(data.sequences), 16)]
    units = [unit_of([data.sequences[i] for i in part]) for part in parts]
    store.save_plan(units)
    receipts = []
    for unit, part in zip(units, parts, strict=True):
        sequences = [data.sequences[i] for i in part]
        blocks = [cut(data.signals[i], spec, data.identity.vocabulary) for i in part]
        ref = write_shard(files, identity, unit, sequences, blocks, {"engine": "bench"})
        receipts.append(Receipt(ref, len(part), sum(unit.tokens), sum(unit.rows), batches=1, seconds=0.0))
    account.add(store.commit(receipts))
    return store


@cache
def _tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder, trust_remote_code=False)


def _found(data: Scored, spec: SignalSpec, root: Path) -> SignalSpec:
    """The output head beside the shards, and the calibration."""
    assert spec.hidden is not None
    files = open_files(str(root))
    teacher = TorchTeacher(TeacherSpec(folder=data.folder, dtype="float32", device="cpu", threads=1))
    head = teacher.output_head()
    save_head(files, head)
    calibration = save_calibration(files, steps_of(head)) if spec.hidden.dtype == "int16" else None
    if spec.hidden.dtype == "int8":
        hidden = Signal.concatenate(data.signals).hidden
        assert hidden is not None
        # Of every sequence some positions, as the founding of a store takes sequences of many documents.
        rows = np.linspace(0, len(hidden) - 1, CALIBRATION_ROWS).astype(np.int64)
        calibration = save_calibration(files, calibrate(hidden[rows], head.weight.float().numpy()))
    teacher.release()
    return SignalSpec(spec.topk, spec.sampled, HiddenSpec(spec.hidden.width, spec.hidden.dtype, calibration))


def describe(data: Scored, store: Store) -> dict[str, Any]:
    """Bytes by column and in all, and fidelity by part and temperature."""
    sizes = {info.name: info.size_bytes for info in store.files.walk()}
    head = sum(size for name, size in sizes.items() if "/head-" in name)
    table = sizes[token_table(store.files) or ""]
    total = sum(sizes.values()) - head - table
    columns: dict[str, int] = {}
    for ref in store.committed().values():
        metadata = pq.read_metadata(Path(store.uri) / ref.path)
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                name = column.path_in_schema.partition(".")[0]
                columns[name] = columns.get(name, 0) + column.total_compressed_size
    fidelity: dict[str, dict[str, Any]] = {}
    for row in measure(data, store).rows:
        fidelity.setdefault(row.tier, {})[f"{row.temperature:g}"] = {
            "kl_added_nats": row.kl_added_nats,
            "retained_mass": row.retained_mass,
            "gradient_angle_deg": row.gradient_angle_deg,
            "gradient_norm_ratio": row.gradient_norm_ratio,
        }
    return {
        "signal": store.identity.signal.in_words(),
        "bytes_per_token": round(total / TOKENS, 2),
        "columns_bytes_per_token": {name: round(size / TOKENS, 2) for name, size in columns.items()},
        "head_bytes": head,
        "token_table_bytes": table,
        "fidelity": fidelity,
    }


def measure(data: Scored, store: Store) -> Fidelity:
    """What the store decodes at the kept positions, against their truth."""
    rebuild = rebuilder(store.files, store.identity) if store.identity.signal.hidden else None
    truth = {s.digest: t for s, t in zip(data.sequences, data.truth, strict=True)}
    held = [(stored.sequence, stored.signal) for stored in store.sequences()]
    rows: list[Any] = []
    for temperature in TEMPERATURES:

        def blocks(temperature: float = temperature) -> Any:
            for sequence, whole in held:
                assert whole is not None
                signal = whole[np.array(data.positions)]
                keys = [(sequence.digest, t) for t in data.positions]
                yield Block(truth[sequence.digest], signal, keys, rebuild(signal, temperature) if rebuild else None)

        rows += measure_blocks(blocks(), vocabulary=store.identity.vocabulary, temperatures=[temperature]).rows
    return Fidelity(tuple(rows))


def speed(data: Scored, store: Store, root: Path) -> dict[str, Any]:
    """Tokens per second on one core: a unit's blocks to a file on disk, and a committed file to arrays."""
    identity = store.identity
    files = open_files(str(root))
    sequences = data.sequences[:UNIT_SEQUENCES]
    blocks = [cut(signal, identity.signal, identity.vocabulary) for signal in data.signals[:UNIT_SEQUENCES]]
    unit = unit_of(sequences)
    tokens = sum(unit.tokens)
    refs = list(store.committed().values())

    def encode() -> int:
        write_shard(files, identity, unit, sequences, blocks, {})
        return tokens

    def decode() -> int:
        read = 0
        for ref in refs:
            reader = ShardReader(store.files, ref, identity)
            for group in range(reader.groups):
                for stored in reader.read_group(group):
                    assert stored.signal is not None
                    assert stored.signal.topk is not None
                    topk = stored.signal.topk
                    read += len(torch.from_numpy(topk.ids))
                    assert torch.from_numpy(topk.logits).dtype == torch.float32
        return read

    found = alternate({"encode": encode, "decode": decode})
    shutil.rmtree(root)
    return {f"{name}_tokens_per_s_core": round(median(rates)) for name, rates in found.items()} | {
        f"{name}_tokens_per_s_core_all": [round(rate) for rate in rates] for name, rates in found.items()
    }


def alternate(jobs: dict[str, Callable[[], int]]) -> dict[str, list[float]]:
    """Rates of jobs that take turns, after one turn that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(REPEATS + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            count = job()
            if repeat:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def naive_layouts(data: Scored, folder: Path) -> dict[str, float]:
    """The same kept ids and logits as others keep them."""
    whole = Signal.concatenate(data.signals).topk
    assert whole is not None
    ids, logits = whole.ids[:, :K], whole.logits[:, :K]
    found = {"int64 ids + float32": 12.0 * K, "int32 ids + float32": 8.0 * K}
    table = pa.table({
        "ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), K),
        "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), K),
    })  # fmt: skip
    for name, settings in (
        ("Parquet, snappy", {"compression": "snappy"}),
        ("Parquet, zstd 3", {"compression": "zstd"}),
    ):
        path = folder / "naive.parquet"
        pq.write_table(table, path, row_group_size=8192, **settings)
        found[name] = round(path.stat().st_size / TOKENS, 2)
    return found


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['tokens']:,} tokens, k = {result['k']}, V = {result['vocabulary']:,}")
    for name in ("store", "bytes/token", "KL added at T = 1, 2, 4, 8", "gradient angle (°) at T = 1, 2, 4, 8"):
        table.add_column(name)
    for name, row in result["tiers"].items():
        part = next(p for p in ("hidden", "topk", "sampled") if p in row["fidelity"])
        numbers = row["fidelity"][part].values()
        kl = "  ".join("–" if n["kl_added_nats"] is None else f"{n['kl_added_nats']:.1e}" for n in numbers)
        angle = "  ".join(f"{n['gradient_angle_deg']:.2f}" for n in numbers)
        table.add_row(name, f"{row['bytes_per_token']:.1f}", kl, angle)
    for name, size in result["naive_layouts_bytes_per_token"].items():
        table.add_row(f"naive: {name}", f"{size:.1f}", "", "")
    console = Console(width=120)
    console.print(table)
    console.print(f"token table: {result['token_table_bytes']:,} bytes, once per store, not in bytes/token")
    for name in ("encode", "decode"):
        console.print(
            f"{name}: {result[f'{name}_tokens_per_s_core']:,} tokens/s on one core, topk with Parquet and file"
        )


if __name__ == "__main__":
    main()
