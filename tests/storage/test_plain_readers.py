"""A shard is readable without stillroom: pyarrow, DuckDB and Polars give the ids and logits that our reader gives.

Each test applies the expression that the file's own footer states and nothing of ours.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from stillroom.storage.store import Store
from tests.strategies import random_sequences, tiny_identity, tiny_store

K = 4


@dataclass(frozen=True)
class Given:
    """A shard's path, the step that its footer states (1 for none), and what our reader makes of it."""

    store: Store
    path: str
    step: float
    ids: np.ndarray
    logits: np.ndarray
    rows: int


@pytest.fixture(params=[1 / 8, None], ids=["int16", "float32"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Given:
    sequences = random_sequences(np.random.default_rng(1), 9)
    store = tiny_store(tmp_path / "store", sequences, identity=tiny_identity(k=K, gap_step=request.param), per_unit=5)
    ref = min(store.committed().values(), key=lambda r: r.path)
    signals = [s.topk for s in store.reader(ref) if s.topk is not None]
    path = str(Path(store.uri) / ref.path)
    footer = json.loads(pq.read_schema(path).metadata[b"stillroom"])
    step = footer["signal"]["gap_step"]
    assert footer["logit"] == ("top_logit - topk_gap" if step is None else f"top_logit - topk_gap * {step!r}")
    assert footer["signal"]["k"] == K
    return Given(
        store,
        path,
        1.0 if step is None else step,
        np.concatenate([s.ids for s in signals]),
        np.concatenate([s.logits for s in signals]),
        len(sequences),
    )


def assert_same(given: Given, ids: np.ndarray, logits: np.ndarray) -> None:
    assert len(given.ids) > K
    assert np.array_equal(ids.reshape(-1, K), given.ids)
    assert np.array_equal(logits.reshape(-1, K).astype(np.float32), given.logits)


def test_pyarrow(given: Given) -> None:
    table = pq.read_table(given.path)
    ids, gap, top = (table[name].combine_chunks().values.to_numpy() for name in ("topk_ids", "topk_gap", "top_logit"))
    assert_same(given, ids, top[:, None] - gap.reshape(-1, K).astype(np.float32) * np.float32(given.step))


def test_duckdb(given: Given) -> None:
    query = f"""
        SELECT topk_ids[i] AS id, top_logit[(i - 1) // {K} + 1] - topk_gap[i] * ({given.step})::FLOAT AS logit
        FROM (SELECT *, row_number() OVER () AS number, unnest(range(1, len(topk_ids) + 1)) AS i
              FROM read_parquet('{given.path}'))
        ORDER BY number, i
    """
    with duckdb.connect() as connection:
        found = connection.sql(query).fetchnumpy()
    assert_same(given, found["id"], found["logit"])


def test_polars(given: Given) -> None:
    shard = pl.read_parquet(given.path)
    ids, gap, top = (shard[name].explode().to_numpy() for name in ("topk_ids", "topk_gap", "top_logit"))
    assert_same(given, ids, top[:, None] - gap.reshape(-1, K).astype(np.float32) * np.float32(given.step))


def test_every_text_column_is_plain(given: Given) -> None:
    """Sequence digests and token ids too, and the row counts follow from them and the context."""
    shard = pl.read_parquet(given.path)
    stored = list(given.store.reader(min(given.store.committed().values(), key=lambda r: r.path)))
    assert shard["sequence"].to_list() == [s.sequence.digest for s in stored]
    assert shard["input_ids"].to_list() == [s.sequence.input_ids.tolist() for s in stored]
    first = (shard["context"] - 1).clip(0)
    assert (shard["top_logit"].list.len() == shard["input_ids"].list.len() - first).all()


def test_the_log_is_a_delta_table_for_polars(given: Given) -> None:
    """All committed shards as one table, through the log alone."""
    table = pl.read_delta(given.store.uri)
    assert len(given.store.committed()) == 2
    assert len(table) == given.rows
    assert sorted(table["sequence"]) == sorted(s for u in given.store.planned() for s in u.sequences)
