"""views.py: what DuckDB makes of the statements is what our reader gives, for any signal, corpus and folder name."""

import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stillroom.pipeline.cli import main
from stillroom.pipeline.token_text import keep_token_table, token_rows
from stillroom.storage.catalog.inspect import inspect_store
from stillroom.storage.catalog.views import TokenRow, texts_of, token_table, views_sql, write_token_table
from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.files import LocalFiles, content_digest, sha256_hex
from stillroom.storage.records import (
    AttentionSpec,
    HiddenSpec,
    LayersSpec,
    NucleusSpec,
    Sampled,
    Sequence,
    SignalSpec,
    TopK,
    TopKSpec,
)
from stillroom.storage.store import Store, create_store
from tests.storage.test_plain_readers import PLAIN, D, K, N, V, signals
from tests.strategies import random_sequences, tiny_identity, tiny_store, write_unit
from tests.tiny import tiny_tokenizer


def sequences_of(seed: int) -> list[Sequence]:
    """Short ones, and some that are cut into several chunks of 32 positions."""
    rng = np.random.default_rng(seed)
    return [
        *random_sequences(rng, 6, vocabulary=V),
        *random_sequences(rng, 3, vocabulary=V, shortest=60, longest=100),
        *random_sequences(rng, 1, vocabulary=V, shortest=32, longest=32),
    ]


def made(folder: Path, signal: SignalSpec, seed: int = 1) -> Store:
    """Two shards that count and one that does not."""
    identity = tiny_identity(vocabulary=V, signal=signal)
    store = tiny_store(folder, sequences_of(seed), identity=identity, per_unit=5)
    write_unit(store, random_sequences(np.random.default_rng(99), 3, vocabulary=V))
    return store


def query(store: Store, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        connection.execute(views_sql(store))
        return [tuple(row) for row in connection.execute(sql).fetchall()]


def column(rows: list[tuple[Any, ...]], number: int, kind: Any = np.float32) -> NDArray[Any]:
    return np.array([row[number] for row in rows], kind)


def stored(store: Store) -> list[tuple[str, int, int, Any, int]]:
    """(sequence, position, input id, signal, row of it), in the order of the queries."""
    return [
        (each.sequence.digest, each.sequence.first_position + row,
         int(each.sequence.input_ids[each.sequence.first_position + row]), each.signal, row)
        for each in sorted(store.sequences(), key=lambda s: s.sequence.digest)
        for row in range(each.sequence.rows)
    ]  # fmt: skip


def exact(topk: TopK, row: int) -> tuple[NDArray[np.float64], float]:
    """p of the kept ids and of the tail at T = 1, by our reader's numbers."""
    logits = topk.logits[row][topk.ids[row] >= 0].astype(np.float64)
    parts = np.exp(np.append(logits, topk.tail_lse[row, -1]) - logits.max())
    return parts[:-1] / parts.sum(), float(parts[-1] / parts.sum())


@pytest.mark.parametrize("name", ["int16", "float32", "nucleus", "all"])
def test_kept_logits_are_the_readers_to_the_bit_and_probabilities_sum_to_one(tmp_path: Path, name: str) -> None:
    store = made(tmp_path / "store", signals(tmp_path / "store")[name])
    expected = [
        (sequence, position, read, rank + 1, int(signal.topk.ids[row, rank]), signal.topk.logits[row, rank], p)
        for sequence, position, read, signal, row in stored(store)
        for rank, p in enumerate(exact(signal.topk, row)[0])
    ]
    rows = query(store, "SELECT * FROM topk ORDER BY sequence, position, rank")
    assert len(rows) > 400
    assert [row[:5] for row in rows] == [row[:5] for row in expected]
    assert np.array_equal(column(rows, 5), column(expected, 5))
    # float32 logits against steps in float64
    assert np.allclose(column(rows, 6, float), column(expected, 6, float), rtol=1e-5, atol=0)
    assert all(row[7:] == (None, None) for row in rows)
    positions = query(store, "SELECT * FROM topk_positions ORDER BY sequence, position")
    assert [(row[0], row[1], row[2]) for row in positions] == [row[:3] for row in stored(store)]
    tails = [exact(signal.topk, row)[1] for *_, signal, row in stored(store)]
    assert np.allclose(column(positions, 6, float), tails, rtol=1e-5, atol=0)
    sums = query(
        store,
        "SELECT any_value(tail_probability) + sum(probability), any_value(kept), count(*) "
        "FROM topk JOIN topk_positions USING (sequence, position) GROUP BY sequence, position",
    )
    assert len(sums) == len(positions)
    assert np.allclose(column(sums, 0, float), 1, rtol=0, atol=1e-12)
    assert [row[1] for row in sums] == [row[2] for row in sums]


@pytest.mark.parametrize("name", ["sampled", "all"])
def test_draws(tmp_path: Path, name: str) -> None:
    store = made(tmp_path / "store", signals(tmp_path / "store")[name])

    def drawn(sampled: Sampled, row: int) -> list[tuple[int, int, float]]:
        pairs = zip(sampled.ids[row].tolist(), sampled.counts[row].tolist(), strict=True)
        return [(i, count, count / N) for i, count in pairs if count]

    expected = [
        (sequence, position, read, *line, None, None)
        for sequence, position, read, signal, row in stored(store)
        for line in drawn(signal.sampled, row)
    ]
    assert query(store, "SELECT * FROM sampled ORDER BY sequence, position, id") == expected


@pytest.mark.parametrize("name", ["hidden int8", "hidden int16", "hidden bfloat16", "all"])
def test_hidden_states_are_the_readers_to_the_bit(tmp_path: Path, name: str) -> None:
    store = made(tmp_path / "store", signals(tmp_path / "store")[name])
    rows = query(store, "SELECT * FROM hidden ORDER BY sequence, position, channel")
    assert [row[:3] for row in rows] == [(line[0], line[1], c) for line in stored(store) for c in range(D)]
    assert np.array_equal(column(rows, 3), np.concatenate([signal.hidden[row] for *_, signal, row in stored(store)]))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    k=st.integers(1, V - 1),
    mass=st.none() | st.floats(0.05, 0.99),
    step=st.sampled_from([None, 1 / 16, 1 / 2, 1 / 7]),
)
def test_any_width_and_nucleus(
    tmp_path_factory: pytest.TempPathFactory, seed: int, k: int, mass: float | None, step: float | None
) -> None:
    spec = SignalSpec(TopKSpec(k, step, None if mass is None else NucleusSpec(mass)))
    store = made(tmp_path_factory.mktemp("any") / "store", spec, seed)
    rows = query(store, "SELECT id, logit FROM topk ORDER BY sequence, position, rank")
    kept = [(signal.topk, row, signal.topk.ids[row] >= 0) for *_, signal, row in stored(store)]
    assert [row[0] for row in rows] == [i for topk, row, used in kept for i in topk.ids[row][used].tolist()]
    assert np.array_equal(column(rows, 1), np.concatenate([topk.logits[row][used] for topk, row, used in kept]))


@pytest.mark.parametrize(
    "name",
    ["it's", '"quoted"', "'; DROP VIEW shards; --", "a*b", "what?", "[ab]", "a[", "x=1", "$HOME `id`", "é 字"],
)
def test_a_folders_name_is_a_name_and_nothing_else(tmp_path: Path, name: str) -> None:
    """Neither SQL, nor a pattern, nor a partition; and its neighbours are not read."""
    signal = SignalSpec(TopKSpec(K), hidden=signals(tmp_path / name)["hidden int8"].hidden)
    store = made(tmp_path / name, signal)
    for neighbour in ("aXb", "whatX", "a", "b"):  # with files of the same names: a pattern would read them twice
        shutil.copytree(store.uri, tmp_path / neighbour)
    write_token_table(store.files, [TokenRow(number, f"t{number}", f"{number}") for number in range(V)])
    ours = [s.digest for s in sequences_of(1)]
    assert sorted(query(store, "SELECT sequence FROM shards")) == sorted((digest,) for digest in ours)
    names = query(store, "SELECT column_name FROM (DESCRIBE shards)")
    assert [row[0] for row in names] == pq.read_schema(
        f"{store.uri}/{next(iter(store.committed().values())).path}"
    ).names
    assert query(store, "SELECT count(*) FROM topk WHERE token = 't' || id AND text = id::VARCHAR") == query(
        store, "SELECT count(*) FROM topk"
    )
    assert query(store, "SELECT count(*) > 0 FROM hidden") == [(True,)]


def test_views_show_the_text_of_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, as a person does it."""
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    size = len(tokenizer)
    sequence = Sequence(np.array(tokenizer("the still drips ")["input_ids"], np.int32))
    identity = tiny_identity(vocabulary=size + 1, signal=SignalSpec(TopKSpec(3)))
    store = tiny_store(tmp_path / "store", [sequence], identity=identity)
    assert keep_token_table(store.files, tokenizer, size + 1)
    assert not keep_token_table(store.files, tokenizer, size + 1)
    assert main(["inspect", store.uri, "--sql"]) == 0
    sql = capsys.readouterr().out
    with duckdb.connect() as connection:
        rows = connection.execute(f"{sql} SELECT id, token, text FROM topk").fetchall()
        read = connection.execute("SELECT text FROM topk_positions JOIN tokens ON id = input_id ORDER BY position")
        assert "".join(row[0] for row in read.fetchall()) == "the still drips "
    assert len(rows) == 3 * sequence.rows
    for number, token, text in rows:
        if number < size:
            assert (token, text) == (tokenizer.convert_ids_to_tokens(number), tokenizer.decode([number]))
    assert main(["inspect", store.uri, "--sql", "--json"]) == 0
    assert main(["inspect", store.uri, "--sql", "--unit", "0"]) == 2


def test_the_token_table_has_every_id(tmp_path: Path) -> None:
    """Also those that the vocabulary lacks, and bytes that are no character."""
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    rows = list(token_rows(tokenizer, len(tokenizer) + 2))
    files = LocalFiles(tmp_path)
    assert token_table(files) is None
    name = write_token_table(files, rows)
    assert token_table(files) == name
    assert content_digest(name) == sha256_hex(files.read(name))  # so that `verify` checks it
    table = pq.read_table(tmp_path / name, use_threads=False)
    assert table["id"].to_pylist() == list(range(len(tokenizer) + 2))
    assert table["token"].to_pylist() == [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), None, None]
    assert len(set(table["token"].to_pylist())) == len(tokenizer) + 1
    assert texts_of(files) == [row.text for row in rows]
    texts = texts_of(files) or []
    assert texts[-2:] == ["", ""]
    assert "�" in texts
    assert None in table["text"].to_pylist(), "a text that its token spells is not written again"


#: Spelled by marks, with none, as other than they are, with quotes and marks of their own.
ODD = [("a", "a"), ("Ġa", " a"), ("▁▁", "  "), ("ĊĠ", "\n "), ("▁the", "the"), ("Ã©", "é"), ("<0x0A>", "\n"),
       ("Ġ", "Ġ"), ("it's", "it's"), ("", ""), (None, ""), (None, "x"), ("\n", "\n")]  # fmt: skip


def test_texts_come_back_whether_or_not_their_token_spells_them(tmp_path: Path) -> None:
    rows = [TokenRow(number, *row) for number, row in enumerate(ODD)]
    store = made(tmp_path, SignalSpec(TopKSpec(K)))
    write_token_table(store.files, rows)
    assert texts_of(store.files) == [text for _, text in ODD]
    assert query(store, "SELECT id, token, text FROM tokens ORDER BY id") == rows


def test_a_table_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """It has every text written out, with dictionaries."""
    store = made(tmp_path, SignalSpec(TopKSpec(K)))
    columns = zip(*((number, token, text) for number, (token, text) in enumerate(ODD)), strict=True)
    names = [pa.field("id", pa.int32(), nullable=False), ("token", pa.string()),
             pa.field("text", pa.string(), nullable=False)]  # fmt: skip
    sink = pa.BufferOutputStream()
    schema = pa.schema(names)
    pq.write_table(pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema), sink,
                   compression="zstd", write_page_checksum=True)  # fmt: skip
    data = sink.getvalue().to_pybytes()
    store.files.write(f"_stillroom/tokens-{sha256_hex(data)}.parquet", data)
    assert texts_of(store.files) == [text for _, text in ODD]
    assert query(store, "SELECT token, text FROM tokens ORDER BY id") == ODD


def test_a_store_that_sql_cannot_read_says_so(tmp_path: Path) -> None:
    empty = create_store(str(tmp_path / "empty"), tiny_identity())
    with pytest.raises(StoreError, match="has no committed shards"):
        views_sql(empty)
    packed = made(tmp_path / "packed", SignalSpec(TopKSpec(K, layout="packed")))
    with pytest.raises(StoreError, match=r"transcode .* --layout plain"):
        views_sql(packed)
    both = made(tmp_path / "both", SignalSpec(TopKSpec(K, layout="packed"), hidden=HiddenSpec(D, "bfloat16")))
    assert query(both, "SELECT count(*) FROM hidden")[0][0] == D * sum(s.rows for s in sequences_of(1))
    with pytest.raises(duckdb.CatalogException):
        query(both, "SELECT * FROM topk")


def test_every_plain_tier_has_its_views(tmp_path: Path) -> None:
    for name in PLAIN:
        spec = signals(tmp_path / name)[name]
        found = {
            row[0]
            for row in query(made(tmp_path / name, spec), "SELECT view_name FROM duckdb_views() WHERE NOT internal")
        }
        wanted = {"shards", "tokens"} | ({"topk", "topk_positions"} if spec.topk else set())
        assert found == wanted | {part for part in ("sampled", "hidden") if getattr(spec, part)}


def test_layers_are_the_readers_to_the_bit(tmp_path: Path) -> None:
    store = made(tmp_path / "store", SignalSpec(layers=LayersSpec((0, 4, 8), D)))
    rows = query(store, "SELECT * FROM layers ORDER BY sequence, position, layer, channel")
    wanted = [(line[0], line[1], layer, c) for line in stored(store) for layer in (0, 4, 8) for c in range(D)]
    assert [row[:4] for row in rows] == wanted
    assert np.array_equal(column(rows, 4), np.concatenate([s.layers[row].ravel() for *_, s, row in stored(store)]))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_row_of_an_attention_map_is_a_slice_as_the_format_says(tmp_path: Path, dtype: Any) -> None:
    store = made(tmp_path / "store", SignalSpec(attention=AttentionSpec((1, 3), 128, "per_head", 2, dtype)))
    fenced = (Path(__file__).parents[3] / "storage" / "FORMAT.md").read_text(encoding="utf-8").split("```sql")[2]
    sql = fenced.partition("```")[0].replace("'shards/*.parquet'", "shards")
    if dtype == "float32":
        sql = sql.replace("SELECT scale * (code / 255.0) ** 2", "SELECT code")
        sql = sql.replace("attention_3_scale[heads * row + head + 1]", "1")
    lines = stored(store)
    for sequence, position, _, signal, row in (lines[0], lines[17], lines[-1]):
        for head in (0, 1):
            asked = sql.replace("'…'", f"'{sequence}'").replace("9 AS heads, 0 AS head", f"2 AS heads, {head} AS head")
            asked = asked.replace("100 AS t", f"{position} AS t")
            wanted = signal.attention[row : row + 1].dense()[1, head, 0]
            np.testing.assert_allclose([found[0] for found in query(store, asked)], wanted, rtol=1e-5, atol=1e-9)


def test_inspect_shows_the_text_of_ids_where_there_is_a_table(tmp_path: Path) -> None:
    """As SQL does; a flipped byte of the table is told."""
    store = made(tmp_path, SignalSpec(TopKSpec(K)))
    unit = next(iter(store.committed()))
    first = inspect_store(store.uri, unit=unit)["sequences"][0]["positions"][0]
    assert "text" not in first
    name = write_token_table(store.files, (TokenRow(i, f"t{i}", f"<{i}>") for i in range(store.identity.vocabulary)))
    first = inspect_store(store.uri, unit=unit)["sequences"][0]["positions"][0]
    assert first["text"] == f"<{first['id']}>"
    assert first["top_texts"] == [f"<{i}>" for i in first["top_ids"]]
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:])
    with pytest.raises(CorruptShard, match=r"tokens-\w+\.parquet is not what its name says"):
        inspect_store(store.uri, unit=unit)
