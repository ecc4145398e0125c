"""A student with another tokenizer than the teacher's learns from what the teacher wrote, by its text."""

from pathlib import Path

import pytest

from stillroom.pipeline.corpus.config import CorpusConfig
from stillroom.pipeline.prompts import ingest_prompts
from stillroom.pipeline.recipe.generate_schema import GenerateConfig
from stillroom.storage.manifest import Manifest
from tests.e2e.runs import Setup, sentences
from tests.pipeline.corpora import write_jsonl
from tests.pipeline.generations import kept_by_hand
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.real


def test_it_trains_on_the_text(tmp_path: Path) -> None:
    words = ("thyme", "copper", "glass", "water")
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    kept_by_hand(tmp_path, tokenizer, words)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": w} for w in words])
    config = GenerateConfig.model_validate({"prompts": "prompts.jsonl"})
    unread = CorpusConfig(sources="unread")  # type: ignore[arg-type]
    ingest_prompts(config, unread, tokenizer, window=None, out=tmp_path / "prompts.parquet", root=tmp_path)
    # The model whose tokenizer the corpus is to have stands where a teacher would; nothing asks it for logits.
    setup = Setup.make(
        tmp_path / "other", sentences(1, 2), teacher={"vocabulary": 300}, corpus__heldout=0.0,
        corpus__sources=[f"generations:{tmp_path / 'verdicts.parquet'}"],
        students__0__losses={"alpha": 0.0}, students__0__model={"from": str(tmp_path / "other" / "teacher")},
    )  # fmt: skip
    printed = setup.run("train")
    assert "8 generations were written with another tokenizer" in printed
    manifest = Manifest.open(tmp_path / "other" / "run" / "corpus.parquet")
    assert max(int(row.sequence.input_ids.max()) for row in manifest) < 300
    steps = setup.losses()
    assert len(steps) == 12
    assert steps[-1][1] < steps[0][1]
