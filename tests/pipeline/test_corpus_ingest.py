"""The flow: counts, split, limits, weights, determinism, and when an ingest is not needed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stillroom.pipeline.corpus.config import CorpusConfig, SourceConfig
from stillroom.pipeline.corpus.counts import Counts
from stillroom.pipeline.corpus.encode import Encoder
from stillroom.pipeline.corpus.ingest import ingest, ingest_if_needed, is_heldout
from stillroom.storage.errors import CorpusError, CorruptShard
from stillroom.storage.identity import canonical_json, tokenizer_digest
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import digest128
from tests.pipeline.corpora import counts, ingested, texts, write_jsonl
from tests.tiny import tiny_tokenizer

SOURCES = (SourceConfig(path="c.jsonl"),)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return tiny_tokenizer(tmp_path / "tok")


def documents(count: int) -> list[dict[str, Any]]:
    return [{"text": f"jar number {i} of thyme"} for i in range(count)]


def test_counts_of_a_small_corpus(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"text": "a"}, {"text": ""}, {"text": "a"}, "", {"text": "b" * 80}])
    manifest = ingested(tokenizer, tmp_path, "c.jsonl", window=32)
    found = counts(manifest)
    assert (found.documents, found.empty_documents, found.blank_lines) == (4, 1, 1)
    assert (found.sequences, found.train_sequences, found.duplicate_sequences) == (5, 5, 2), "81 tokens are 3 windows"
    assert found.tokens == 2 + 2 + 81
    assert (found.unpredicted_tokens, found.trained_tokens) == (2, 1 + 1 + 80 - 2)
    assert [row.document for row in manifest] == [0, 2, 3, 3, 3], "an empty document keeps its number"
    assert [row.line for row in manifest] == [1, 3, 5, 5, 5]
    assert len(found.notices()) == 4
    assert "4 documents (4 text; 0 held out), 5 sequences, 85 tokens, 80 of them learned" in found.line()


def test_a_corpus_of_one_document_of_one_token(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a")
    [row] = ingested(tokenizer, tmp_path, "c.txt", append_eos=False)
    assert (len(row.sequence.input_ids), row.mask.tolist(), row.trained) == (1, [True], 0)
    [row] = ingested(tokenizer, tmp_path, "c.txt")
    assert (len(row.sequence.input_ids), row.trained) == (2, 1)


@pytest.mark.parametrize("records", [[], [{"text": ""}], ["bad"]])
def test_an_empty_corpus_is_refused(tokenizer: Any, tmp_path: Path, records: list[Any]) -> None:
    write_jsonl(tmp_path / "c.jsonl", records)
    with pytest.raises(CorpusError, match=r"the corpus c\.jsonl is empty") as raised:
        ingested(tokenizer, tmp_path, "c.jsonl")
    assert ("c.jsonl:1: invalid JSON" in str(raised.value)) == (records == ["bad"])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_text_that_ends_with_the_end_token_gets_no_second(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"text": "mint<|end|>"}, {"text": "mint"}])
    assert texts(tokenizer, ingested(tokenizer, tmp_path, "c.jsonl")) == ["mint<|end|>"] * 2


def test_a_truncating_tokenizer_truncates_nothing(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.model_max_length = 8
    write_jsonl(tmp_path / "c.jsonl", [{"text": "every drop is weighed"}, {"text": "a"}])
    manifest = ingested(tokenizer, tmp_path, "c.jsonl", append_eos=False)
    assert texts(tokenizer, manifest) == ["every drop is weighed", "a"]


def test_ids_above_17_bits_survive(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(140_000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    (tmp_path / "c.txt").write_text("w131072 w139999 w131071")
    manifest = ingested(tokenizer, tmp_path, "c.txt")
    assert manifest.rows([0])[0].sequence.input_ids.tolist() == [131_072, 139_999, 131_071, 140_000]
    assert manifest.rows([0])[0].sequence.input_ids.dtype == np.int32
    assert manifest.meta.vocabulary == 140_001
    assert manifest.meta.chat_template is None


def test_meta_says_what_the_corpus_was_made_with(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", documents(3))
    meta = ingested(tokenizer, tmp_path, "c.jsonl", window=32, overlap=4).meta
    assert meta.tokenizer == tokenizer_digest(tokenizer.backend_tokenizer.to_str())
    assert (meta.window, meta.overlap, meta.vocabulary) == (32, 4, len(tokenizer))
    assert meta.chat_template is not None
    assert CorpusConfig(**meta.config).window == 32


def test_split_follows_content(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", documents(200))
    first = ingested(tokenizer, tmp_path, "c.jsonl", heldout=0.2)
    held = {text for text, row in zip(texts(tokenizer, first), first, strict=True) if row.heldout}
    assert 20 <= len(held) <= 60
    assert counts(first).heldout_documents == counts(first).heldout_sequences == len(held)
    write_jsonl(tmp_path / "c.jsonl", [*documents(200)[:90], {"text": "inserted"}, *documents(200)[90:], *documents(9)])
    second = ingested(tokenizer, tmp_path, "c.jsonl", heldout=0.2)
    again = {text for text, row in zip(texts(tokenizer, second), second, strict=True) if row.heldout}
    assert again - {"inserted<|end|>"} == held
    trained = {text for text, row in zip(texts(tokenizer, second), second, strict=True) if not row.heldout}
    assert not again & trained, "copies of a document go together"
    third = ingested(tokenizer, tmp_path, "c.jsonl", heldout=0.2, split_seed=-1)
    assert third.index().heldout.tolist() != second.index().heldout.tolist()


def test_windows_of_a_document_are_in_one_split(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"text": f"{i} " * 60} for i in range(30)])
    index = ingested(tokenizer, tmp_path, "c.jsonl", window=16, heldout=0.3).index()
    assert 0 < index.heldout.sum() < len(index)
    for document in range(30):
        assert len(set(index.heldout[index.documents == document].tolist())) == 1


def test_held_out_share_and_its_ends() -> None:
    drawn = [is_heldout(str(i).encode(), share=0.05, seed=3) for i in range(20_000)]
    assert 850 < sum(drawn) < 1150
    assert not any(is_heldout(str(i).encode(), share=0.0, seed=0) for i in range(100))
    more = [is_heldout(str(i).encode(), share=0.5, seed=3) for i in range(20_000)]
    assert all(b for a, b in zip(drawn, more, strict=True) if a), "a larger share keeps what was held out"


def test_all_held_out_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", documents(1))
    with pytest.raises(CorpusError, match=r"every document of the corpus \(1\) falls into the held-out split"):
        ingested(tokenizer, tmp_path, "c.jsonl", heldout=0.999999)


def test_limits(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", ["bad", *documents(5), "bad", *documents(300)])
    found = counts(ingested(tokenizer, tmp_path, "c.jsonl", limit_documents=5))
    assert (found.documents, found.bad_lines, found.stopped_at) == (5, 1, "limit_documents = 5")
    each = ingested(tokenizer, tmp_path, "c.jsonl", limit_documents=1).index().tokens[0]
    found = counts(ingested(tokenizer, tmp_path, "c.jsonl", limit_tokens=int(each) * 3 + 1))
    assert (found.documents, found.stopped_at) == (4, f"limit_tokens = {each * 3 + 1}")
    assert counts(ingested(tokenizer, tmp_path, "c.jsonl", limit_documents=999)).stopped_at is None


def test_weights_by_source(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(1))
    write_jsonl(tmp_path / "b.jsonl", documents(2))
    manifest = ingested(tokenizer, tmp_path, ["a.jsonl", {"path": "b.jsonl", "weight": 0.25}])
    assert manifest.index().weights.tolist() == [1.0, 0.25, 0.25]
    assert counts(manifest).duplicate_sequences == 1


def test_order_is_kept_over_batches_and_forms(tokenizer: Any, tmp_path: Path) -> None:
    records = [
        {"text": f"{i}"} if i % 3 else {"messages": [{"role": "assistant", "content": f"{i}"}]} for i in range(700)
    ]
    write_jsonl(tmp_path / "c.jsonl", records)
    manifest = ingested(tokenizer, tmp_path, "c.jsonl")
    found = ["".join(c for c in text if c.isdigit()) for text in texts(tokenizer, manifest)]
    assert found == [str(i) for i in range(700)]


def test_equal_input_gives_equal_bytes(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", documents(50))
    config = CorpusConfig(sources=SOURCES, window=16, overlap=2)
    for name in ("a", "b"):
        ingest(config, tokenizer, out=tmp_path / name, root=tmp_path)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_progress_sees_running_counts(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", documents(600))
    seen: list[int] = []
    config = CorpusConfig(sources=SOURCES, heldout=0)
    ingest(config, tokenizer, out=tmp_path / "m", root=tmp_path, progress=lambda c: seen.append(c.documents))
    assert seen == [256, 512, 600]


def test_an_ingest_of_the_same_is_not_needed(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", documents(5))
    config = CorpusConfig(sources=SOURCES, heldout=0)

    def again(config: CorpusConfig = config) -> bool:
        return ingest_if_needed(config, tokenizer, out=tmp_path / "m.parquet", root=tmp_path)[1]

    assert [again(), again()] == [True, False]
    write_jsonl(tmp_path / "c.jsonl", documents(6))
    assert [again(), again()] == [True, False]
    os.utime(tmp_path / "c.jsonl", ns=(1, 1))
    assert [again(), again()] == [True, False]
    assert [again(CorpusConfig(sources=SOURCES, heldout=0.5)), again()] == [True, True]
    tokenizer.chat_template += " "
    assert [again(), again()] == [True, False]
    tokenizer.eos_token = "<|pad|>"
    assert [again(), again()] == [True, False]
    tokenizer.backend_tokenizer.enable_truncation(9)
    assert not again(), "truncation is not obeyed, so it is no difference"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("generations", "generations"),
        ("generations:runs/a/verdicts.parquet", "generations"),
        ("python:pydoc_data", "pydoc_data"),
        ("data/wiki.jsonl.zst", "wiki"),
        ("data/wiki/*.jsonl", "wiki"),
        ("/data/web.v2/", "web.v2"),
        ("**/*.txt", "**/*.txt"),
    ],
)
def test_a_source_without_a_name_is_called_after_its_path(path: str, name: str) -> None:
    assert CorpusConfig(sources=path).names() == [name]  # type: ignore[arg-type]
    assert CorpusConfig(sources=({"path": path, "name": "own"},)).names() == ["own"]  # type: ignore[arg-type]


def test_documents_are_counted_by_source_and_names_change_no_digest(tokenizer: Any, tmp_path: Path) -> None:
    """The same path twice, an empty document, a folder of two files; the limit cuts the last source."""
    write_jsonl(tmp_path / "c.jsonl", [*documents(3), {"text": ""}])
    write_jsonl(tmp_path / "more" / "a.jsonl", documents(2))
    write_jsonl(tmp_path / "more" / "b.jsonl", documents(5))
    sources: list[dict[str, Any]] = [{"path": path} for path in ("c.jsonl", "more", "c.jsonl", "c.jsonl")]
    plain = ingested(tokenizer, tmp_path, sources, limit_documents=13)
    found = [(source["name"], source["documents"]) for source in counts(plain).sources]
    assert found == [("c", 4), ("more", 7), ("c", 2), ("c", 0)]
    assert [source.get("name") for source in plain.meta.config["sources"]] == [None] * 4
    assert "name" not in plain.meta.config["sources"][0], "as manifests of before sources had names"
    named = [source | {"name": f"n{number}"} for number, source in enumerate(sources)]
    again = ingested(tokenizer, tmp_path, named, limit_documents=13)
    assert [source["name"] for source in counts(again).sources] == ["n0", "n1", "n2", "n3"]
    assert again.digest == plain.digest
    assert again.meta.inputs != plain.meta.inputs, "else another name would not be written down"


def test_without_names_what_a_manifest_is_made_of_has_the_digest_of_before(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", documents(5))
    config = CorpusConfig(sources=SOURCES, heldout=0)
    manifest = ingest(config, tokenizer, out=tmp_path / "m.parquet", root=tmp_path)
    stated = config.model_dump(mode="json")
    for source in stated["sources"]:
        assert source.pop("name") is None
    assert manifest.meta.config == stated
    encoder, stat = Encoder(config, tokenizer), (tmp_path / "c.jsonl").stat()
    parts = [1, stated, encoder.digest, encoder.fingerprint, [["c.jsonl", stat.st_size, stat.st_mtime_ns]]]
    assert manifest.meta.inputs == digest128(b"stillroom.inputs.1", canonical_json(parts))


def test_a_damaged_manifest_is_not_reused(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", documents(5))
    (tmp_path / "m.parquet").write_text("damaged")
    with pytest.raises(CorruptShard, match=r"m\.parquet is damaged .*: delete it and ingest the corpus again"):
        ingest_if_needed(CorpusConfig(sources=SOURCES), tokenizer, out=tmp_path / "m.parquet", root=tmp_path)


def test_a_failed_ingest_leaves_the_manifest_of_before(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", documents(5))
    before = ingested(tokenizer, tmp_path, "c.jsonl").digest
    write_jsonl(tmp_path / "c.jsonl", [*documents(5), "bad"])
    with pytest.raises(CorpusError):
        ingested(tokenizer, tmp_path, "c.jsonl", strict=True)
    assert Manifest.open(tmp_path / "out" / "manifest.parquet").digest == before


def test_counts_survive_the_manifest() -> None:
    found = Counts(documents=3, forms={"text": 3}, bad_examples=["a:1: b"])
    assert Counts.from_dict(found.as_dict()) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "sources"),
        ({"sources": "a", "window": 8, "overlap": 8}, "overlap must be less than window, got overlap 8 and window 8"),
        ({"sources": "a", "heldout": 1.0}, "heldout"),
        ({"sources": {"path": "a", "wieght": 2}}, "wieght"),
        ({"sources": [{"path": "a", "weight": 0}]}, "weight"),
        ({"sources": [{"path": "a", "name": "x"}, {"path": "b", "name": "x"}]}, "two sources are named x: give each"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorpusConfig(**settings)


def test_every_field_is_described() -> None:
    schema = CorpusConfig.model_json_schema()
    fields = {**schema["properties"], **schema["$defs"]["SourceConfig"]["properties"]}
    assert [name for name, field in fields.items() if not field.get("description")] == []


@pytest.mark.real
def test_the_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, stillroom.pipeline.corpus.config\n"
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'numpy', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


_MEASURE = """
import re, sys
from pathlib import Path
from transformers import AutoTokenizer
from stillroom.pipeline.corpus.config import CorpusConfig, SourceConfig
from stillroom.pipeline.corpus.ingest import ingest
folder = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
config = CorpusConfig(sources=sys.argv[2], window=256, overlap=16)
manifest = ingest(config, tokenizer, out=folder / "m.parquet", root=folder)
# Not ru_maxrss, which a child takes over from the process that starts it.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(manifest.meta.counts["tokens"], peak[1])
"""


@pytest.mark.real
def test_memory_does_not_grow_with_the_corpus(tokenizer: Any, tmp_path: Path) -> None:
    text = "every drop is weighed twice before it is written down in the book of waters. " * 20
    peaks = {}
    # Both are many batches of 256 documents: with one batch, buffers and allocators are not yet at their size.
    for name, size in (("small", 1_000), ("large", 4_000)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{i} {text}"} for i in range(size)])
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(tmp_path), f"{name}.jsonl"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        tokens, peak_kib = map(int, done.stdout.split())
        peaks[tokens] = peak_kib / 1024
    (small, small_mib), (large, large_mib) = sorted(peaks.items())
    assert large - small > 2_000_000  # as Python lists they would take 16 MiB, whatever else is kept of them
    assert large_mib - small_mib < 16, f"{small} tokens took {small_mib:.0f} MiB, {large} tokens {large_mib:.0f} MiB"
