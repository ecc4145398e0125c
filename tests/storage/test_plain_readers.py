"""A store is readable without stillroom: by pyarrow, DuckDB, Polars, Hugging Face `datasets`, and any reader of Delta.

Each reader gets the files that the log names, or the log itself. What it reads is decoded by the expression that the
format states and nothing of ours, and is what our reader gives, to the bit.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from numpy.typing import NDArray

from stillroom.storage.calibration import Calibration, calibration_path, save_calibration
from stillroom.storage.files import LocalFiles
from stillroom.storage.records import HiddenSpec, NucleusSpec, SampledSpec, SignalSpec, TopKSpec
from stillroom.storage.store import Store
from tests.strategies import random_sequences, tiny_identity, tiny_store, write_unit

V, K, D, N = 40, 4, 8, 20
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Rows:
    """The lists of one sequence, by name, flat; each reader gives these by sequence digest."""

    columns: Columns
    context: int


def signals(folder: Path) -> dict[str, SignalSpec]:
    """Every plain tier. folder: where the calibration of the hidden ones is written."""
    rng = np.random.default_rng(0)
    scale, offset = rng.uniform(0.01, 0.1, D).astype(np.float32), rng.normal(0, 1, D).astype(np.float32)
    sha256 = save_calibration(LocalFiles(folder), Calibration(scale, offset))
    return {
        "int16": SignalSpec(TopKSpec(K, 1 / 8)),
        "float32": SignalSpec(TopKSpec(K, None)),
        "nucleus": SignalSpec(TopKSpec(K, 1 / 10, NucleusSpec(0.8))),
        "sampled": SignalSpec(sampled=SampledSpec(N)),
        "hidden int8": SignalSpec(hidden=HiddenSpec(D, "int8", sha256)),
        "hidden int16": SignalSpec(hidden=HiddenSpec(D, "int16", sha256)),
        "hidden bfloat16": SignalSpec(hidden=HiddenSpec(D, "bfloat16")),
        "all": SignalSpec(TopKSpec(K), SampledSpec(N), HiddenSpec(D, "int8", sha256)),
    }


PLAIN = ["int16", "float32", "nucleus", "sampled", "hidden int8", "hidden int16", "hidden bfloat16", "all"]


@pytest.fixture(params=PLAIN)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Two committed shards, and a third that its writer never committed: a glob would find it, the log does not."""
    sequences = random_sequences(np.random.default_rng(1), 9, vocabulary=V)
    folder = tmp_path / "store"
    identity = tiny_identity(vocabulary=V, signal=signals(folder)[request.param])
    made = tiny_store(folder, sequences, identity=identity, per_unit=5)
    write_unit(made, random_sequences(np.random.default_rng(2), 3, vocabulary=V))
    assert len(made.committed()) == 2
    assert len(made.files.list("shards")) == 3
    return made


def paths(store: Store) -> list[str]:
    return [f"{store.uri}/{ref.path}" for ref in store.committed().values()]


def by_pyarrow(store: Store) -> pa.Table:
    return pads.dataset(paths(store)).to_table(use_threads=False)


def by_duckdb(store: Store) -> pa.Table:
    with duckdb.connect() as connection:
        return connection.sql("SELECT * FROM read_parquet($files)", params={"files": paths(store)}).to_arrow_table()


def by_polars(store: Store) -> pa.Table:
    return pl.read_parquet(paths(store)).to_arrow()


def by_polars_through_the_log(store: Store) -> pa.Table:
    return pl.scan_delta(store.uri).collect().to_arrow()


def by_deltalake(store: Store) -> pa.Table:
    return DeltaTable(store.uri).to_pyarrow_table()


def by_datasets(store: Store) -> pa.Table:
    from datasets import load_dataset

    cache = Path(store.uri).parent / "cache"
    return load_dataset("parquet", data_files=paths(store), split="train", cache_dir=str(cache)).data.table


def by_datasets_streaming(store: Store) -> pa.Table:
    from datasets import load_dataset

    return pa.Table.from_pylist(list(load_dataset("parquet", data_files=paths(store), split="train", streaming=True)))


READERS = [
    by_pyarrow, by_duckdb, by_polars, by_polars_through_the_log, by_deltalake, by_datasets, by_datasets_streaming,
]  # fmt: skip


def rows_of(table: pa.Table) -> dict[str, Rows]:
    lists = [name for name in table.column_names if name not in ("sequence", "context")]
    found = {}
    for number, sequence in enumerate(table["sequence"].to_pylist()):
        columns = {name: np.array(table[name][number].as_py()) for name in lists}
        found[str(sequence)] = Rows(columns, int(table["context"][number].as_py()))
    return found


def floats(values: NDArray[Any]) -> NDArray[np.float32]:
    """A float32 that came through a Python float is the same one."""
    return values.astype(np.float32)


def decoded(rows: Rows, footer: dict[str, Any], calibration: pa.Table | None) -> Columns:
    """What FORMAT.md says, in numpy."""
    column, signal = rows.columns, footer["signal"]
    found: Columns = {"input_ids": column["input_ids"]}
    positions = len(column["input_ids"]) - max(rows.context - 1, 0)
    if "topk" in signal:
        step = signal["topk"]["gap_step"]
        kept = column.get("topk_count", np.full(positions, signal["topk"]["k"]))
        assert footer["logit"] == ("top_logit - topk_gap" if step is None else f"top_logit - topk_gap * {step!r}")
        nats = floats(column["topk_gap"]) * np.float32(1 if step is None else step)
        found |= {"topk_ids": column["topk_ids"], "logits": np.repeat(floats(column["top_logit"]), kept) - nats}
    if "sampled" in signal:
        assert len(column["sampled_count"]) == positions
        found |= {"sampled_ids": column["sampled_ids"], "p": column["sampled_draws"] / signal["sampled"]["draws"]}
    if "hidden" in signal:
        width, dtype = signal["hidden"]["width"], signal["hidden"]["dtype"]
        if dtype == "bfloat16":
            hidden = floats(column["hidden"])
        else:
            assert calibration is not None
            scale, offset = (calibration[name].to_numpy() for name in ("channel_scale", "channel_offset"))
            hidden = floats(column["hidden_code"] - {"int8": 128, "int16": 16512}[dtype]).reshape(-1, width)
            if dtype == "int8":
                hidden = hidden * floats(column["hidden_scale"])[:, None]
            hidden = hidden * scale + offset
        found["hidden"] = hidden.ravel()
    return found


def expected(store: Store) -> dict[str, Columns]:
    """By our own reader."""
    found: dict[str, Columns] = {}
    for stored in store.sequences():
        assert stored.signal is not None
        columns: Columns = {"input_ids": stored.sequence.input_ids}
        topk, sampled, hidden = stored.signal.topk, stored.signal.sampled, stored.signal.hidden
        if topk is not None:
            used = topk.ids >= 0
            columns |= {"topk_ids": topk.ids[used], "logits": topk.logits[used]}
        if sampled is not None:
            used = sampled.counts > 0
            columns |= {"sampled_ids": sampled.ids[used], "p": sampled.counts[used] / N}
        if hidden is not None:
            columns["hidden"] = hidden.ravel()
        found[stored.sequence.digest] = columns
    return found


def footer_of(store: Store) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(pq.read_schema(paths(store)[0]).metadata[b"stillroom"])
    return described


def calibration_of(footer: dict[str, Any], store: Store) -> pa.Table | None:
    sha256 = footer["signal"].get("hidden", {}).get("calibration")
    return pq.read_table(f"{store.uri}/{calibration_path(sha256)}", use_threads=False) if sha256 else None


@pytest.mark.parametrize("read", READERS)
def test_a_reader_gets_what_ours_gives(store: Store, read: Callable[[Store], pa.Table]) -> None:
    footer = footer_of(store)
    calibration = calibration_of(footer, store)
    found, ours = rows_of(read(store)), expected(store)
    assert found.keys() == ours.keys()
    for sequence, rows in found.items():
        same(decoded(rows, footer, calibration), ours[sequence])


def same(found: Columns, ours: Columns) -> None:
    assert found.keys() == ours.keys()
    for name, values in found.items():
        assert len(values) > 0
        assert np.array_equal(values, ours[name]), name


def test_arrays_without_a_python_object_for_each_number(store: Store) -> None:
    """As the README does it: one shard, all sequences at once."""
    path = paths(store)[0]
    table = pq.read_table(path, use_threads=False)
    ours = expected(store)
    order = table["sequence"].to_pylist()
    for name in set(table.column_names) & {"topk_ids", "sampled_ids", "input_ids"}:
        flat = table[name].combine_chunks().values.to_numpy()
        assert np.array_equal(flat, np.concatenate([ours[sequence][name] for sequence in order]))


def test_row_counts_follow_from_the_text_and_the_context(store: Store) -> None:
    frame = pl.read_parquet(paths(store))
    rows = frame["input_ids"].list.len() - (frame["context"] - 1).clip(0)
    values = {"top_logit": 1, "topk_count": 1, "sampled_count": 1, "hidden_scale": 1, "tail_code": 10, "hidden": D,
              "hidden_code": D}  # fmt: skip
    assert values.keys() & set(frame.columns)
    for name in values.keys() & set(frame.columns):
        assert (frame[name].list.len() == rows * values[name]).all(), name


def test_polars_decodes_by_expressions(tmp_path: Path) -> None:
    """From the log, lazily, without numpy."""
    sequences = random_sequences(np.random.default_rng(1), 9, vocabulary=V)
    made = tiny_store(tmp_path / "store", sequences, identity=tiny_identity(k=K, vocabulary=V), per_unit=5)
    top = pl.col("top_logit").list.eval(pl.element().repeat_by(K).explode()).explode()
    gap = pl.col("topk_gap").explode().cast(pl.Float32)
    logits = pl.scan_delta(made.uri).sort("sequence").select(top - gap * pl.lit(1 / 8, pl.Float32)).collect()
    ours = [columns["logits"] for _, columns in sorted(expected(made).items())]
    assert np.array_equal(logits.to_series().to_numpy(), np.concatenate(ours))
