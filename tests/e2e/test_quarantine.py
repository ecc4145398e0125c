"""Documents that the teacher cannot score: named, left out, tried again; all others are committed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from stillroom.pipeline.progress_file import PROGRESS
from stillroom.storage.manifest import Manifest
from stillroom.storage.store import open_store
from tests.e2e.runs import Setup, sentences, write_corpus

pytestmark = pytest.mark.real

DOCUMENTS = sentences(5, 60)
POISON = "a Q is what this teacher cannot read"


def setup_with(folder: Path, documents: list[str], poison: str = "Q") -> Setup:
    """A teacher that makes NaN of every context in which that token is."""
    setup = Setup.make(
        folder, documents, teacher={"tie_word_embeddings": False}, store__unit_tokens=128, corpus__heldout=0.05
    )
    tokenizer = Tokenizer.from_file(str(folder / "teacher" / "tokenizer.json"))
    (token,) = tokenizer.encode(poison).ids
    weights = load_file(folder / "teacher" / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "teacher" / "model.safetensors", metadata={"format": "pt"})
    return setup


def teach(setup: Setup, code: int) -> tuple[dict[str, Any], str]:
    """What `stillroom teach --json` says on stdout, and what on stderr."""
    words = [sys.executable, "-m", "stillroom.pipeline", "teach", str(setup.folder / "recipe.yaml"), "--json"]
    environment = os.environ | {"STILLROOM_CACHE": str(setup.folder / "cache")}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_a_poison_document_is_named_and_the_rest_is_committed(tmp_path: Path) -> None:
    setup = setup_with(tmp_path / "poisoned", [*DOCUMENTS[:30], POISON, *DOCUMENTS[30:]])
    result, told = teach(setup, 1)
    (left_out,) = result["quarantined"]
    line = f"{setup.folder / 'corpus.jsonl'}:31"
    assert left_out["documents"] == [line]
    assert "NaN or infinite" in left_out["cause"]
    assert f"notice: unit {left_out['unit']} is left out" in told
    last = told.splitlines()[-1]
    assert last.startswith("stillroom: error: 1 unit could not be scored and left out of store ")
    assert line in last
    store = open_store(str(setup.folder / "store"))
    assert result["units_scored"] == len(store.committed()) == len(store.planned()) - 1
    progress = json.loads(store.files.read(PROGRESS))
    assert (progress["state"], progress["units"]["pending"], progress["tokens"]["pending"]) == ("done", 0, 0)
    assert progress["units"]["quarantined"] == 1
    assert progress["quarantined"] == result["quarantined"]

    # Again: only that unit is tried, and a student is not trained on what lacks it.
    ledger = setup.ledger()
    printed = setup.run("run", code=1)
    assert "1 unit could not be scored" in printed
    assert "in 1 units;" in printed
    assert not (setup.folder / "run" / "students").exists()
    assert setup.ledger() == ledger

    # Without the document, its neighbours in the unit are scored, and nothing else is.
    write_corpus(setup.folder / "corpus.jsonl", DOCUMENTS)
    result, told = teach(setup, 0)
    assert result["quarantined"] == []
    assert "error" not in told
    assert result["units_scored"] == 1
    wanted = {row.sequence.digest for row in Manifest.open(setup.folder / "run" / "corpus.parquet")}
    assert {stored.sequence.digest for stored in store.sequences()} == wanted


def test_where_nothing_can_be_scored_it_is_the_teacher(tmp_path: Path) -> None:
    setup = setup_with(tmp_path, [f"Q {document}" for document in DOCUMENTS], poison="Q")
    printed = setup.run("teach", code=1)
    assert "3 units failed and 0 were scored: it is the teacher or its machine" in printed
    assert printed.count("is left out") == 3
    assert not open_store(str(setup.folder / "store")).committed()
