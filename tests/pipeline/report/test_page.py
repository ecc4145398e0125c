"""The page: what is in it, that text stays text, how large it is, and the command line that writes it."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stillroom.pipeline.cli import main
from stillroom.pipeline.console import Console
from stillroom.pipeline.report import answers
from stillroom.pipeline.report.answers import Answers
from stillroom.pipeline.report.command import MOST_BYTES, inspect_page, report
from stillroom.pipeline.report.data import gather_chain, gather_run
from stillroom.pipeline.report.documents import Document, Window, of_run
from stillroom.pipeline.report.markup import script_json
from stillroom.pipeline.report.page import render
from stillroom.pipeline.report.payload import tokens_shown, viewer
from stillroom.pipeline.report.run_parts import label_students
from stillroom.pipeline.report.store_data import ROWS, gather_store
from stillroom.pipeline.report.teacher import TOP, TeacherRows
from stillroom.pipeline.run_status import RESOLVED
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import BETAS, Receipt, Sequence, Signal, TopK
from stillroom.storage.shard import write_shard
from stillroom.storage.store import Store, create_store, open_store
from tests.pipeline.report.world import HOSTILE
from tests.strategies import tiny_identity, unit_of

QUIET = Console(quiet=True)


class Elements(HTMLParser):
    """Names and attributes of all elements, and the page's own text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data


def data_of(page: str, name: str) -> Any:
    """What the page's script reads under this id."""
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_the_whole_run_is_on_the_page(run: Callable[[], Path], tmp_path: Path, here: list[str]) -> None:
    file = tmp_path / "out" / "page.html"
    result = report([str(run())], str(file), QUIET)
    page = file.read_text()
    assert result["missing"] == []
    assert result["size_bytes"] == file.stat().st_size < MOST_BYTES
    elements = Elements(page)
    ids = {attributes.get("id") for _, attributes in elements.found}
    assert {"pipeline", "evaluation", "curves", "reuse", "store", "viewer"} <= ids
    items = data_of(page, "plots-data")["items"]
    assert {item["target_id"] for item in items} <= ids
    assert len(items) == 10
    assert "Every student after the first cost it nothing" in page
    (group,) = data_of(page, "tokens-data")
    assert group["students"] == group["kl_of"] == ["ten", "six"]
    document = group["documents"][0]
    text = "".join(group["texts"][str(i)] for i in document["ids"])
    assert text.startswith(HOSTILE)
    rows = len(document["ids"]) - len(document["bare"])
    assert {len(document["entropy"]), len(document["top"]), *(len(s["kl"]) for s in document["students"])} == {rows}
    assert len(here) == 2
    # It asks for nothing, and may not.
    asking = [
        value
        for _, attributes in elements.found
        for name in ("src", "href", "data", "action")
        if (value := attributes.get(name)) and not value.startswith(("#", "data:"))
    ]
    assert asking == []
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in elements.found)


def test_students_are_asked_once(run: Callable[[], Path], here: list[str]) -> None:
    found = gather_run(run())
    documents = of_run(Manifest.open(Path(found["folder"]) / "corpus.parquet"), open_store(found["store"]), tokens=60)

    def asked() -> dict[str, Answers]:
        return answers.ask(found, documents, vocabulary=320, has_kl=True, console=QUIET)

    first, again = asked(), asked()
    assert len(here) == 2
    np.testing.assert_array_equal(first["ten"].kl, again["ten"].kl)
    assert (first["ten"].kl > 0).all()
    (Path(found["folder"]) / "students" / "ten" / "export" / "model.safetensors").touch()
    asked()
    assert here[2:] == [found["students"][0]["export"]]


def test_a_student_that_cannot_answer_is_named(run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: dict[str, Any]) -> None:
        raise answers._CannotSay("RuntimeError: out of memory")

    monkeypatch.setattr(answers, "_run", fail)
    found = gather_run(run())
    documents = of_run(Manifest.open(Path(found["folder"]) / "corpus.parquet"), open_store(found["store"]), tokens=60)
    assert answers.ask(found, documents, vocabulary=320, has_kl=True, console=QUIET) == {}
    (_, last) = found["missing"]
    assert last == (
        "Student six could not be asked about the text, the token viewer lacks it: RuntimeError: out of memory"
    )


def test_parts_that_are_missing_are_said_on_the_page(run: Callable[[], Path], tmp_path: Path, here: list[str]) -> None:
    folder = run()
    recipe = yaml.safe_load((folder / RESOLVED).read_text())
    recipe["students"] = []
    (folder / RESOLVED).write_text(yaml.safe_dump(recipe))
    (folder / "evaluation.json").unlink()
    (folder / "ledger.jsonl").unlink()
    result = report([str(folder)], str(tmp_path / "page.html"), QUIET)
    text = Elements((tmp_path / "page.html").read_text()).text
    assert len(result["missing"]) == 2
    for sentence in result["missing"]:
        assert sentence in text
    assert "Retained mass by k and T" in text
    assert here == []


def test_hostile_names_and_texts_stay_text(run: Callable[[], Path], tmp_path: Path) -> None:
    folder = run()
    found = gather_run(folder)
    found["name"] = found["recipe"]["teacher"]["model"] = found["students"][0]["name"] = HOSTILE
    found["missing"] = [HOSTILE]
    label_students([found])
    store = gather_store(found["store"]) | {"teacher": HOSTILE, "signal": HOSTILE, "store": HOSTILE}
    group = viewer(HOSTILE, [_document(5, title=HOSTILE)], {HOSTILE: _answers(4)}, dict.fromkeys(range(300), HOSTILE))
    page = render(HOSTILE, runs=[found], stores={"s": store}, groups=[group | {"colours": []}], made=HOSTILE)
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 4
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in elements.found)
    assert "<script>window" not in page
    assert set(data_of(page, "tokens-data")[0]["texts"].values()) == {HOSTILE}


def test_json_in_a_script_ends_nothing() -> None:
    text = script_json(["</script><!--<script>\u2028"])
    assert "<" not in text
    assert json.loads(text) == ["</script><!--<script>\u2028"]


def test_a_sampled_store_says_so(world: Path) -> None:
    found = gather_store(gather_run(world)["store"], rows=300)
    page = render("t", runs=[], stores={"s": found}, groups=[], made="")
    assert f"Sampled: mass and entropy are of 300 of the {found['rows']:,} stored positions" in page


@pytest.mark.parametrize("students", [0, 1, pytest.param(8, marks=pytest.mark.slow)])
def test_the_largest_page_is_under_five_megabytes(world: Path, students: int) -> None:
    """As many tokens as a page ever shows, with ids of six digits; curves as long as they get. A store of any size has
    the same page, as no other part of it grows."""
    found = gather_run(world)
    base = found["students"][0]
    long = {name: [(n, n * 1.0123456789) for n in range(1, 301)] for name in base["curves"]}
    found["students"] = [base | {"name": f"student-{n}", "curves": long} for n in range(students)]
    label_students([found])
    tokens = tokens_shown(students)
    documents = [_document(tokens // 20, vocabulary=10**6) for _ in range(20)]
    rows = sum(len(d.windows[0].teacher) for d in documents)
    given = {s["name"]: _answers(rows, vocabulary=10**6) for s in found["students"]}
    texts = {i: f"tok{i}" for d in documents for i in d.ids.tolist()}
    group = viewer("g", documents, given, texts) | {"colours": ["var(--s0)"] * students}
    page = render("t", runs=[found], stores={"s": gather_store(found["store"])}, groups=[group], made="")
    assert tokens >= 256
    assert len(page.encode()) < MOST_BYTES


def _grow(store: Store, rng: np.random.Generator, units: int) -> None:
    """Units of 4,096 rows, k = 64 of the store's vocabulary; the tail is flat, two nats below the last kept logit."""
    vocabulary = store.identity.vocabulary
    for _ in range(units):
        sequences = [Sequence(rng.integers(0, vocabulary, 512).astype(np.int32)) for _ in range(8)]
        blocks = []
        for _ in sequences:
            first, step = rng.integers(0, vocabulary, (512, 1)), rng.integers(1, vocabulary // 64, (512, 1))
            ids = (first + step * np.arange(64)) % vocabulary
            logits = rng.normal(18.0, 3.0, (512, 1)) - np.cumsum(rng.exponential(0.2, (512, 64)), axis=1)
            tail = (logits[:, -1:] - 2.0) * np.array(BETAS) + np.log(vocabulary - 64)
            blocks.append(Signal(TopK(ids.astype(np.int32), logits.astype(np.float32), tail.astype(np.float32))))
        unit = unit_of(sequences)
        store.save_plan([unit])
        ref = write_shard(store.files, store.identity, unit, sequences, blocks, {})
        store.commit([Receipt(ref, len(sequences), sum(unit.tokens), sum(unit.rows), 1, 1.0)])


@pytest.mark.slow
def test_the_page_of_a_store_of_100000_tokens(tmp_path: Path) -> None:
    """All of it is read, and the page is under 5 MB; of a store beyond the limit a part is, which the page says."""
    rng, file = np.random.default_rng(0), tmp_path / "page.html"
    store = create_store(str(tmp_path / "store"), tiny_identity(k=64, vocabulary=49_152))
    _grow(store, rng, 25)
    found = inspect_page(store.uri, str(file), QUIET)
    assert found["positions_read"] == 25 * 4096 > 100_000
    assert found["size_bytes"] == file.stat().st_size < MOST_BYTES
    assert "Sampled:" not in Elements(file.read_text()).text
    _grow(store, rng, 8)
    found = inspect_page(store.uri, str(file), QUIET)
    assert found["positions_read"] == ROWS < 33 * 4096
    assert found["size_bytes"] < MOST_BYTES
    said = f"Sampled: mass and entropy are of {ROWS:,} of the {33 * 4096:,} stored positions"
    assert said in Elements(file.read_text()).text


def _document(tokens: int, *, vocabulary: int = 300, title: str = "title") -> Document:
    rng = np.random.default_rng(tokens)
    ids = rng.integers(vocabulary // 2, vocabulary, tokens).astype(np.int32)
    top = np.sort(rng.normal(0, 1, (tokens - 1, 64)), axis=1)[:, ::-1].astype(np.float32)
    kept = rng.integers(vocabulary // 2, vocabulary, (tokens - 1, 64)).astype(np.int32)
    teacher = TeacherRows(kept, top, np.zeros(tokens - 1, np.float32), rng.uniform(0, 11, tokens - 1))
    return Document(title, (Window(Sequence(ids), 0, tokens - 1, teacher),), tokens, True)


def _answers(rows: int, *, vocabulary: int = 300) -> Answers:
    rng = np.random.default_rng(rows)
    ids = rng.integers(vocabulary // 2, vocabulary, (rows, TOP)).astype(np.int32)
    shares = rng.uniform(0, 1, (rows, TOP)).astype(np.float32)
    return Answers(ids, shares, rng.uniform(0, 9, rows).astype(np.float32))


class TestCommandLine:
    @pytest.mark.slow
    def test_several_runs(
        self, world: Path, tmp_path: Path, here: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "page.html"
        assert main(["report", str(world), str(world), "--html", str(file), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["html"] == str(file)
        assert printed["runs"] == [str(world)] * 2
        assert printed["students"] == 4
        assert len(data_of(file.read_text(), "tokens-data")) == 2

    def test_inspect(self, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "page.html"
        store = gather_run(world)["store"]
        assert main(["inspect", store, "--html", str(file), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["store"] == store
        ids = {attributes.get("id") for _, attributes in Elements(file.read_text()).found}
        assert {"store", "viewer"} <= ids
        assert not ids & {"pipeline", "curves"}

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["report", "RUN"], "the following arguments are required: --html"),
            (["report", "--html", "f.html"], "the following arguments are required: RUN"),
            (["report", "nowhere", "--html", "f.html"], "nowhere is no run"),
            (["inspect", "s", "--html", "f.html", "--sql"], "--html is of the whole store"),
        ],
    )
    def test_mistakes(self, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(words) == 2
        assert said in capsys.readouterr().err

    def test_without_the_plotting_library(
        self, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "bokeh", None)
        assert main(["report", str(world), "--html", "f.html"]) == 2
        assert "pip install 'stillroom[report]'" in capsys.readouterr().err


def test_a_chain_has_its_table(world: Path, tmp_path: Path) -> None:
    found = gather_run(world)
    label_students([found])
    row = {"stage": found["name"], "student": "six", "teacher": HOSTILE, "layers": 6, "parameters": 5_000_000,
           "steps": 9, "steps_with_teachers": None, "kl_to_own_teacher": 0.25, "kl_to_first_teacher": 0.5}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps({"recipe": "chain", "stages": [], "students": [row]}))
    chain = gather_chain(tmp_path)
    assert chain is not None
    page = render("t", runs=[found], chains=[chain], stores={}, groups=[], made="")
    text = Elements(page).text
    for words in ("Stages compared", "0.250 nats", "0.500 nats", "5.0 M", HOSTILE):
        assert words in text
    assert gather_chain(world) is None
