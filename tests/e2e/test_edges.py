"""Documents and vocabularies at the edges, each through the whole path: text → shard → stream → a student's step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.console import Console
from stillroom.pipeline.train import train
from stillroom.storage.errors import TokenizerMismatch
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import open_store
from tests.e2e.runs import Setup, distil, rows, sentences
from tests.tiny import tiny_model, tiny_teacher, tiny_tokenizer

pytestmark = pytest.mark.real


def step(setup: Setup, *overrides: str) -> dict[str, Any]:
    """Two optimizer steps in the student's own process; returns its result."""
    words = ["students.0.steps=2", "students.0.warmup_steps=0", *overrides]
    recipe, _, _ = distil(setup, *words)
    return train(recipe, recipe.students[0], Console(quiet=True))


def live_logits(setup: Setup, digest: str) -> tuple[Any, Any]:
    """(ids, logits [T, V]) of a stored sequence, by the model itself."""
    stored = next(s for s in open_store(str(setup.folder / "store")).sequences() if s.sequence.digest == digest)
    model = AutoModelForCausalLM.from_pretrained(setup.folder / "teacher", dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor(stored.sequence.input_ids, dtype=torch.long)[None]).logits[0]
    return stored, logits.numpy()


def check_rows(setup: Setup, *, vocabulary: int) -> None:
    """Stored rows are the model's own, to within the gap's rounding."""
    for digest in list(rows(open_store(str(setup.folder / "store"))))[:3]:
        stored, logits = live_logits(setup, digest)
        wanted = logits[stored.sequence.first_position :, :vocabulary]
        kept = np.take_along_axis(wanted, stored.signal.topk.ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(stored.signal.topk.logits, kept, atol=1 / 16 + 1e-4)
        np.testing.assert_array_equal(stored.signal.topk.ids[:, 0], wanted.argmax(axis=1))


def test_vocabulary_above_131072(tmp_path: Path) -> None:
    # 17 bits hold ids up to 131,071: Qwen's 151,936 do not fit.
    setup = Setup.make(tmp_path, ["placeholder"])
    folder = setup.folder / "teacher"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = len(AutoTokenizer.from_pretrained(folder))
    blank = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for number in range(first, 140_000):
        if number in (135_000, 139_999):
            tokenizer["added_tokens"].append({"id": number, "content": f"<far{number}>", **blank})
        else:
            tokenizer["model"]["vocab"][f"unused{number}"] = number
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tiny_model(folder, vocabulary=140_000)
    lines = [{"text": f"{text} <far135000> <far139999> {text}"} for text in sentences(5, 12)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = step(setup, "corpus.heldout=0.3")
    stored = rows(open_store(str(setup.folder / "store")))
    assert max(int(r["input_ids"].max()) for r in stored.values()) == 139_999
    assert max(int(r["ids"].max()) for r in stored.values()) > 131_072
    check_rows(setup, vocabulary=140_000)
    assert result["after"]["kl"] >= 0


def test_config_vocabulary_padded_beyond_the_tokenizer(tmp_path: Path) -> None:
    setup = Setup.make(tmp_path, sentences(5, 12), teacher={"padded": 64})
    model = AutoModelForCausalLM.from_pretrained(setup.folder / "teacher")
    with torch.no_grad():  # an untrained padded column that would win every position
        model.get_output_embeddings().weight[-64:] = 50.0
    model.save_pretrained(setup.folder / "teacher")
    result = step(setup)
    vocabulary = model.config.vocab_size - 64
    stored = rows(open_store(str(setup.folder / "store")))
    assert max(int(r["ids"].max()) for r in stored.values()) < vocabulary
    check_rows(setup, vocabulary=vocabulary)
    assert result["after"]["kl"] >= 0


@pytest.mark.parametrize(
    ("documents", "sequences"),
    [
        pytest.param(["mint"], 1, id="one token"),
        pytest.param(["", "the still drips"], 1, id="an empty document"),
        pytest.param([" ".join(sentences(1, 12))], None, id="longer than the window, and the only one"),
    ],
)
def test_odd_documents(tmp_path: Path, documents: list[str], sequences: int | None) -> None:
    # A plain document among them trains, so that the student has something to do.
    extra = sentences(9, 6)
    setup = Setup.make(tmp_path, [*documents, *extra])
    result = step(setup, "corpus.append_eos=false", "corpus.heldout=0")
    manifest = Manifest.open(setup.folder / "run" / "corpus.parquet")
    own = [r for r in manifest if r.document < len(documents)]
    if sequences is not None:
        assert len(own) == sequences
    assert manifest.meta.counts["empty_documents"] == documents.count("")
    held = rows(open_store(str(setup.folder / "store")))
    assert all(r.sequence.digest in held for r in own)
    assert result["steps"] == 2
    check_rows(setup, vocabulary=320)


def test_a_corpus_of_one_document_that_fits_the_window(tmp_path: Path) -> None:
    setup = Setup.make(tmp_path, ["the cellar keeps its jars of thyme"])
    result = step(setup, "corpus.heldout=0", "students.0.batch_packs=1")
    assert result["steps"] == 2
    assert result["after"] is None


def test_a_student_with_another_tokenizer_is_refused_with_both_digests(tmp_path: Path) -> None:
    setup = Setup.make(tmp_path, sentences(5, 12))
    other = tmp_path / "other"
    tiny_teacher(other, vocabulary=300)
    recipe, sources, _ = distil(setup)
    snapshot: Snapshot = sources.store().snapshot()
    from stillroom.pipeline.student.config import ModelConfig
    from stillroom.pipeline.student.model import build_student

    with pytest.raises(TokenizerMismatch) as refused:
        build_student(
            ModelConfig.model_validate({"from": str(other)}),
            teacher=None,
            tokenizer=tiny_tokenizer(tmp_path / "t"),
            expected_tokenizer=snapshot.identity.tokenizer,
            vocabulary=snapshot.identity.vocabulary,
        )
    assert snapshot.identity.tokenizer in str(refused.value)
    assert "sequence-level distillation" in str(refused.value)
    assert recipe.students[0].name == "cut"
