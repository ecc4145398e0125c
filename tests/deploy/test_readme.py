"""What the README says of reading a store without stillroom is run as it stands, on a small store where it has its
own; its other commands are parsed."""

import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from deploy.reading import commands_in
from stillroom.pipeline.arguments import parse
from stillroom.pipeline.cli import main
from stillroom.pipeline.token_text import keep_token_table
from stillroom.storage.store import Store
from tests.strategies import random_sequences, tiny_identity, tiny_manifest, tiny_store
from tests.tiny import tiny_tokenizer

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
#: `duckdb -c "$(stillroom …) SELECT …"`: the command and the query.
(QUERY,) = re.findall(r'^    duckdb -c "\$\(stillroom ([^)]+)\) ([^"]+)"$', README, flags=re.MULTILINE)
(JOINED,) = re.findall(r"`(JOIN read_parquet\([^`]+)`", README)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two shards where the README has the demo's store, with the demo's k and step, and the demo's corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    identity = tiny_identity(k=64, vocabulary=len(tokenizer))
    sequences = random_sequences(np.random.default_rng(0), 9, vocabulary=len(tokenizer))
    made = tiny_store(Path("build/demo/store"), sequences, identity=identity)
    keep_token_table(made.files, tokenizer, len(tokenizer))
    tiny_manifest(Path("build/demo/corpus.parquet"), sequences, vocabulary=len(tokenizer))
    return made


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_both_python_blocks_are_run_here() -> None:
    assert ["pyarrow.parquet" in block for block in BLOCKS] == [True, False]
    assert "load_dataset" in BLOCKS[1]


def test_a_shard_by_pyarrow(store: Store) -> None:
    """The README's three lines give the ids and the logits of our reader, to the bit."""
    found = run(BLOCKS[0])
    ours = {stored.sequence.digest: stored.signal for stored in store.sequences()}
    order = found["table"]["sequence"].to_pylist()
    signals = [signal.topk for digest in order if (signal := ours[digest]) is not None]
    assert len(order) in (4, 5)
    np.testing.assert_array_equal(found["ids"], np.concatenate([topk.ids for topk in signals if topk]))
    logits = np.concatenate([topk.logits for topk in signals if topk])
    np.testing.assert_array_equal(found["logits"].astype(np.float32), logits)


def test_readers_of_tables(store: Store) -> None:
    found = run(BLOCKS[1])
    digests = sorted(stored.sequence.digest for stored in store.sequences())
    assert len(found["files"]) == len(store.committed()) == 2
    for rows in (found["table"]["sequence"].to_pylist(), found["frame"]["sequence"].to_list()):
        assert sorted(rows) == digests
    assert sorted(row["sequence"] for row in found["rows"]) == digests


def test_the_query(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's views, then the query; by the Python package, as the README says for where there is no `duckdb`."""
    command, select = QUERY
    assert main(command.split()) == 0
    views = capsys.readouterr().out
    with duckdb.connect() as connection:
        rows = connection.execute(f"{views} {select}").fetchall()
        joined = connection.execute(f"SELECT DISTINCT document FROM topk {JOINED}").fetchall()
    assert len(rows) == 20
    assert all(isinstance(text, str) and 0 < p < 1 for text, p in rows)
    assert [p for _, p in rows] == sorted((p for _, p in rows), reverse=True)
    assert sorted(document for (document,) in joined) == list(range(9))


def test_every_command_is_one() -> None:
    """They are run by the tests of the guide and of the command line, on recipes that are there."""
    shown = "\n".join(re.findall(r"^    (stillroom .*?)(?:\s+#.*)?$", README, flags=re.MULTILINE))
    commands = [parse(command.words).command for command in commands_in("README.md", shown)]
    assert commands == ["init", "plan", "run"]
