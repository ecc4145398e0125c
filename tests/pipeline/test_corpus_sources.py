"""Every kind of source gives its documents, and what cannot be read is told with file and line."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stillroom.storage.errors import CorpusError, RecipeError
from tests.pipeline.corpora import counts, ingested, texts, write_jsonl
from tests.tiny import tiny_tokenizer

DOCUMENTS = ["the copper cools", "a glass of thyme", "jars of anise", "größe 蒸留 🫙🌿"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tok"))


def read(tokenizer: Any, folder: Path, sources: Any, **settings: Any) -> list[str]:
    return texts(tokenizer, ingested(tokenizer, folder, sources, append_eos=False, **settings))


def jsonl_bytes(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents).encode()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_jsonl(tokenizer: Any, tmp_path: Path, end: str) -> None:
    lines = [json.dumps({"text": d}) for d in DOCUMENTS]
    (tmp_path / "c.jsonl").write_bytes(("\ufeff" + end.join(lines)).encode())
    assert read(tokenizer, tmp_path, "c.jsonl") == DOCUMENTS


def test_jsonl_zst_of_several_frames(tokenizer: Any, tmp_path: Path) -> None:
    data = jsonl_bytes(DOCUMENTS)
    parts = [zstandard.compress(data[:40]), zstandard.compress(data[40:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(parts))
    assert read(tokenizer, tmp_path, "c.jsonl.zst") == DOCUMENTS


@pytest.mark.parametrize("kept", [0.4, 0.95])
def test_a_truncated_zst_is_a_bad_line(tokenizer: Any, tmp_path: Path, kept: float) -> None:
    whole = zstandard.compress(jsonl_bytes([f"{i} {d}" for i in range(4_000) for d in DOCUMENTS]))
    (tmp_path / "c.jsonl.zst").write_bytes(whole[: int(len(whole) * kept)])
    (tmp_path / "d.jsonl").write_bytes(jsonl_bytes(["after it"]))
    found = counts(ingested(tokenizer, tmp_path, ["d.jsonl", "c.jsonl.zst"], limit_documents=None))
    assert found.bad_lines in (1, 2), "the cut itself, and the line it goes through if part of it came out"
    assert "cut short" in found.bad_examples[-1]
    assert found.documents > 1


def test_zst_of_garbage_is_a_bad_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl.zst").write_bytes(b"this is no zstd frame")
    write_jsonl(tmp_path / "d.jsonl", [{"text": "fine"}])
    found = counts(ingested(tokenizer, tmp_path, ["c.jsonl.zst", "d.jsonl"]))
    assert (found.documents, found.bad_lines) == (1, 1)
    assert found.bad_examples[0].startswith("c.jsonl.zst:1: damaged zstd data")


def test_parquet_over_row_groups(tokenizer: Any, tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(DOCUMENTS * 200, pa.large_string()), "other": list(range(800))})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=150)
    assert read(tokenizer, tmp_path, "c.parquet") == DOCUMENTS * 200


def test_damaged_parquet_is_a_bad_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    pq.write_table(pa.table({"text": ["fine"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"body": ["a", "b"]}), tmp_path / "c.parquet")
    found = counts(ingested(tokenizer, tmp_path, "*.parquet"))
    assert (found.documents, found.bad_lines) == (1, 3)
    assert found.bad_examples[0].startswith("a.parquet:1: cannot be read")
    assert found.bad_examples[1].startswith("c.parquet:0: has none of the columns text")
    assert "it has body" in found.bad_examples[1]


def test_parquet_with_nulls_and_other_types(tokenizer: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["fine", None]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1.5]}), tmp_path / "b.parquet")
    found = counts(ingested(tokenizer, tmp_path, ["a.parquet", "b.parquet"]))
    assert (found.documents, found.bad_lines) == (1, 2)
    assert found.bad_examples == [
        "a.parquet:2: expected messages, prompt and response, or text; got no field with a value",
        "b.parquet:1: field text is float, expected a string",
    ]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("file", ["one\ntwo\n\nthree\n"]),
        ("line", ["one", "two", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_txt(tokenizer: Any, tmp_path: Path, mode: str, expected: list[str], end: str) -> None:
    (tmp_path / "c.txt").write_bytes(end.join(["one", "two", "", "three", ""]).encode())
    assert read(tokenizer, tmp_path, {"path": "c.txt", "txt_documents": mode}) == expected


def test_txt_of_invalid_utf8_names_the_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nbroken \xff\n")
    (tmp_path / "b.txt").write_text("fine")
    found = counts(ingested(tokenizer, tmp_path, "*.txt"))
    assert found.bad_examples == ["a.txt:2: invalid UTF-8 at byte 12 (invalid start byte)"]
    assert found.documents == 1


def test_a_document_above_the_limit_is_told(tokenizer: Any, tmp_path: Path) -> None:
    long = "x" * ((1 << 20) + 1)
    (tmp_path / "a.txt").write_text(long)
    write_jsonl(tmp_path / "b.jsonl", [{"text": long}, {"text": "after the long line"}])
    pq.write_table(pa.table({"text": [long, "after the long row"]}), tmp_path / "c.parquet")
    manifest = ingested(tokenizer, tmp_path, ["a.txt", "b.jsonl", "c.parquet"], max_document_mib=1, append_eos=False)
    assert texts(tokenizer, manifest) == ["after the long line", "after the long row"]
    assert counts(manifest).bad_lines == 3
    assert all("max_document_mib = 1 MiB" in line for line in counts(manifest).bad_examples)


def test_folder_in_sorted_order_and_what_it_passes_over(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c/b.jsonl", [{"text": "second"}])
    write_jsonl(tmp_path / "c/a/z.jsonl", [{"text": "first"}])
    (tmp_path / "c/c.txt").write_text("third")
    (tmp_path / "c/notes.pdf").write_text("no")
    (tmp_path / "c/.hidden.txt").write_text("no")
    manifest = ingested(tokenizer, tmp_path, "c", append_eos=False)
    assert texts(tokenizer, manifest) == ["first", "second", "third"]
    assert [row.source for row in manifest] == ["c/a/z.jsonl", "c/b.jsonl", "c/c.txt"]
    assert counts(manifest).passed_examples == ["c/notes.pdf"]


def test_glob(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("x/b-2.txt", "x/b-1.txt", "x/a.txt", "y/b-0.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tokenizer, tmp_path, "x/b-*.txt") == ["x/b-1.txt", "x/b-2.txt"]
    assert read(tokenizer, tmp_path, "**/b-*.txt") == ["x/b-1.txt", "x/b-2.txt", "y/b-0.txt"]
    assert read(tokenizer, tmp_path, str(tmp_path / "x" / "*.txt")) == ["x/a.txt", "x/b-1.txt", "x/b-2.txt"]


def test_a_name_with_brackets_is_a_name(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("fine")
    assert read(tokenizer, tmp_path, "a[1].txt") == ["fine"]


def test_python_package_is_read_and_not_run(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lib" / "cellar_words"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text('"""The cellar."""\nraise SystemExit("it was run")\n')
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "topics.py").write_text(
        "topics = {'a': 'of thyme', 'b': 'of '\n 'mint'}\nsizes = {'a': 1}\nmixed: dict = {'c': 'rose'}\n"
        "def f():\n    'a function'\n    d = {'no': 'not at module level'}\nclass C:\n    'a class'\n"
        "    async def g(self):\n        '''a method\n\n        of two lines'''\n"
    )
    (package / "old.py").write_text("print 'python 2'\n")
    monkeypatch.syspath_prepend(str(package.parent))
    topics = ["of thyme", "of mint", "rose", "a function", "a class", "a method\n\nof two lines"]
    assert read(tokenizer, tmp_path, "python:cellar_words.inner.topics") == topics
    manifest = ingested(tokenizer, tmp_path, "python:cellar_words", append_eos=False)
    assert texts(tokenizer, manifest) == ["The cellar.", *topics]
    assert "cellar_words" not in sys.modules
    assert counts(manifest).bad_lines == 1
    assert counts(manifest).bad_examples[0].startswith("python:cellar_words/old.py:1: not Python of this version")
    rows = list(manifest)
    assert (rows[1].source, rows[1].line) == ("python:cellar_words/inner/topics.py", 1)


def test_the_demo_corpus(tokenizer: Any, tmp_path: Path) -> None:
    found = counts(ingested(tokenizer, tmp_path, "python:pydoc_data.topics", window=1024, limit_documents=3))
    assert (found.documents, found.forms) == (3, {"text": 3})
    assert found.stopped_at == "limit_documents = 3"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python:pydoc_dato.topics", "python:pydoc_dato.topics is not installed; the closest name is pydoc_data"),
        ("python:pydoc_data.nothing", "python:pydoc_data.nothing is not installed; pydoc_data is, without this part"),
        ("python:math", "python:math has no Python source"),
        ("python:not a name", "'not a name' is not the name of a module"),
        ("c/gone.jsonl", r"c/gone.jsonl does not exist; the closest in .*c is gone_1.jsonl"),
        ("d/gone_1.jsonl", r"d/gone_1.jsonl does not exist; .* has nothing of a similar name"),
        ("c/*.parquet", r"c/\*.parquet matches no file"),
        ("c/notes.pdf", "c/notes.pdf is of no kind that can be read: give a .txt"),
        ("c/empty", "c/empty holds no file that can be read"),
    ],
)
def test_what_is_not_there_is_named(tokenizer: Any, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "c/empty").mkdir(parents=True)
    (tmp_path / "c/notes.pdf").write_text("no")
    write_jsonl(tmp_path / "c/gone_1.jsonl", [{"text": "a"}])
    with pytest.raises(RecipeError, match=message):
        ingested(tokenizer, tmp_path, name)


BAD = [
    ("not json", "invalid JSON: Expecting value at column 1"),
    ('["a", "list"]', "expected a JSON object, got list"),
    ({"body": "x"}, "expected messages, prompt and response, or text; got the fields body"),
    ({"text": 3}, "field text is int, expected a string"),
    ({"text": None}, "expected messages, prompt and response, or text; got no field with a value"),
    ({"prompt": "p", "response": ["r"]}, "field response is list, expected a string"),
    ({"messages": "hi"}, "field messages is str, expected a list of messages"),
    ({"messages": ["hi"]}, "messages[0] is str, expected an object with role and content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is NoneType, expected a string"),
    ('{"text": "half \\ud83e"}', "text holds half a surrogate pair at character 5, which no UTF-8 has"),
    ("[" * 100_000, "invalid JSON: "),
]


def test_bad_lines_are_reported_with_their_reason(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [bad for bad, _ in BAD] + ["", {"text": "fine"}])
    manifest = ingested(tokenizer, tmp_path, "c.jsonl")
    found = counts(manifest)
    assert (found.documents, found.bad_lines, found.blank_lines) == (1, len(BAD), 1)
    for number, ((_, reason), example) in enumerate(zip(BAD, found.bad_examples, strict=True), start=1):
        assert example.startswith(f"c.jsonl:{number}: {reason}")
    assert manifest.rows([0])[0].line == len(BAD) + 2
    (notice,) = [notice for notice in found.notices() if "bad lines" in notice]
    assert notice == f"11 bad lines left out, the first are {'; '.join(found.bad_examples[:3])}"


def test_invalid_utf8_in_jsonl(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a \xc3("}\n{"text": "fine"}\n')
    found = counts(ingested(tokenizer, tmp_path, "c.jsonl"))
    assert found.bad_examples == ["c.jsonl:1: invalid UTF-8 at byte 12 (invalid continuation byte)"]


def test_all_bad_lines_are_counted_and_twenty_kept(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", ["no"] * 50 + [{"text": "fine"}])
    found = counts(ingested(tokenizer, tmp_path, "c.jsonl"))
    assert (found.bad_lines, len(found.bad_examples)) == (50, 20)


@pytest.mark.parametrize("bad", [bad for bad, _ in BAD])
def test_strict_stops_there(tokenizer: Any, tmp_path: Path, bad: Any) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"text": "fine"}, bad, {"text": "fine"}])
    with pytest.raises(CorpusError, match=r"^c\.jsonl:2: .*strict"):
        ingested(tokenizer, tmp_path, "c.jsonl", strict=True)
    assert list((tmp_path / "out").iterdir()) == []
