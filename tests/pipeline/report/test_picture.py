"""Times and bytes of each stage, what generating made, and what students make of it; absent or said where unknown."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.pipeline import evaluate, measured
from stillroom.pipeline.console import Console
from stillroom.pipeline.measured import held, keep
from stillroom.pipeline.report.data import gather_chain, gather_run, run_folders, teacher_shown
from stillroom.pipeline.report.page import render
from stillroom.pipeline.report.picture import picture
from stillroom.pipeline.report.run_parts import evaluation, label_students, missing, reuse
from stillroom.pipeline.run_status import RESOLVED
from stillroom.pipeline.sources import Sources
from stillroom.storage.files import LocalFiles
from stillroom.storage.manifest import Manifest
from tests.e2e.runs import Setup
from tests.pipeline.report.test_page import Elements
from tests.pipeline.report.world import add_generation

QUIET = Console(quiet=True)


def shown(run: dict[str, Any], store: dict[str, Any] | None = None) -> dict[str, str]:
    """The picture's boxes as text, by their titles; "" is what is below them."""
    label_students([run])
    boxes, _, below = picture(run, store, titled=False).partition("</ol>")
    found = {"": Elements(below).text}
    for box in boxes.split("<li ")[1:]:
        text = Elements(f"<li {box}").text
        title = next(name for name in _TITLES if text.startswith(name))
        found[title] = text.removeprefix(title)
    return found


_TITLES = ("Generation", "Corpus", "Teacher", "Store", "Students", "Evaluation")


class TestTimes:
    def test_a_corpus_is_timed_when_it_is_read_and_not_again(self, tmp_path: Path) -> None:
        setup = Setup.make(tmp_path, ["mint and thyme"] * 3 + ["sage and rose"], corpus__heldout=0)
        recipe, ledger = setup.recipe(), tmp_path / "run" / "ledger.corpus.jsonl"
        manifest = Sources(recipe, QUIET).manifest()
        (entry,) = map(json.loads, ledger.read_text().splitlines())
        assert entry["manifest"] == manifest.digest
        assert entry["wall_s"] > 0
        Sources(recipe, QUIET).manifest()
        assert len(ledger.read_text().splitlines()) == 1, "nothing was read"
        (tmp_path / "run" / RESOLVED).write_text(yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True)))
        corpus = gather_run(tmp_path / "run")["corpus"]
        assert corpus["wall_s"] == entry["wall_s"]
        # The time of another corpus is not this one's.
        ledger.write_text(json.dumps({"manifest": "another", "wall_s": 9.0}) + "\n")
        assert gather_run(tmp_path / "run")["corpus"]["wall_s"] is None

    def test_a_model_is_timed_when_it_is_measured_and_not_again(
        self, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = Setup(world.parent).recipe(f"run_dir={tmp_path}", f"store.path={world.parent / 'store'}")
        (tmp_path / "corpus.parquet").symlink_to(world / "corpus.parquet")
        asked = []

        def run_module(module: str, request: dict[str, Any], what: str) -> str:
            asked.append(what)
            time.sleep(0.002)
            return json.dumps({"perplexity": 2.0})

        monkeypatch.setattr(evaluate, "run_module", run_module)
        folder = world / "students" / "ten" / "export"
        first = evaluate._measure(recipe, folder, "ten", QUIET)
        kept = json.loads((tmp_path / measured.FOLDER / "ten.json").read_text())
        assert kept["wall_s"] >= 0.002
        assert evaluate._measure(recipe, folder, "ten", QUIET) == first == {"perplexity": 2.0}
        assert json.loads((tmp_path / measured.FOLDER / "ten.json").read_text()) == kept
        assert len(asked) == 1

    def test_each_stage_has_its_time(self, run: Callable[[], Path]) -> None:
        folder = run()
        keep(folder, "teacher", {}, {}, wall_s=2.0)
        keep(folder, "ten", {}, {}, wall_s=3.0)
        keep(folder, "ten.lm_eval", {}, {}, wall_s=4.0)
        keep(folder, "six", {}, {}, wall_s=5.0)
        keep(folder, "gone", {}, {}, wall_s=500.0)  # of a student that the recipe no longer has
        assert held(folder, "ten", {}) == {}
        digest = Manifest.open(folder / "corpus.parquet").digest
        times = [{"manifest": digest, "wall_s": seconds} for seconds in (9.0, 7.0)]  # it was removed, and read again
        (folder / "ledger.corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
        boxes = shown(gather_run(folder))
        assert boxes["Corpus"].endswith("time7 s")
        assert boxes["Teacher"].endswith("time2.5 s")
        assert boxes["Students"].endswith("time14 s")
        assert boxes["Evaluation"].endswith("time14 s")
        assert "Recorded time, 50 s" in boxes[""]
        for words in ("corpus 7 s (14 %)", "teacher 2.5 s (5 %)", "evaluation 14 s (28 %)"):
            assert words in boxes[""]

    def test_what_earlier_releases_did_not_time_is_said(self, run: Callable[[], Path]) -> None:
        folder = run()
        (folder / "ledger.corpus.jsonl").unlink()
        boxes = shown(gather_run(folder))
        assert boxes["Corpus"].endswith("timenot recorded")
        assert boxes["Evaluation"].endswith("timenot recorded")
        assert "corpus" not in boxes[""]
        LocalFiles(folder / measured.FOLDER).write("teacher.json", b'{"of": {}, "measured": {}}')
        keep(folder, "six", {}, {}, wall_s=5.0)
        assert shown(gather_run(folder))["Evaluation"].endswith("timeat least 5 s")

    def test_a_store_that_held_all_took_no_teacher(self, run: Callable[[], Path]) -> None:
        folder = run()
        (folder / "ledger.jsonl").unlink()
        store = {"signal": "top-8", "tokens": 9, "shards": 1, "bytes_per_token": 1.0, "bytes": 9}
        assert shown(gather_run(folder), store)["Teacher"].endswith("batches0timenone, the store held all")
        assert shown(gather_run(folder))["Teacher"].endswith("time–")


class TestGenerations:
    def test_what_was_generated_is_in_the_picture(self, run: Callable[[], Path]) -> None:
        folder = run()
        assert gather_run(folder)["generation"] is None
        assert "Generation" not in shown(gather_run(folder))
        add_generation(folder)
        found = gather_run(folder)
        assert found["missing"] == []
        assert found["generation"] == {
            "responses": 4, "kept": 2, "tokens": 10, "units": 3, "bytes": 3000, "wall_s": 4.0, "tokens_per_s": 25.0,
            "dropped": [{"reason": "truncated", "responses": 1}, {"reason": "duplicate", "responses": 1}],
        }  # fmt: skip
        assert shown(found)["Generation"] == (
            "4 responses of the teacherkept2 (50 %)dropped, truncated1 (25 %)dropped, duplicate1 (25 %)"
            "tokens10tokens/s25.0bytes3.0 kBtime4 s"
        )
        (folder / "verdicts.parquet").unlink()
        found = gather_run(folder)
        assert found["missing"][0].startswith("The responses cannot be counted: there are no generations in")
        assert shown(found)["Generation"].startswith("– responses")

    def test_likeness_and_perplexity_by_kind_of_text(self, run: Callable[[], Path]) -> None:
        folder = run()
        plain = gather_run(folder)
        label_students([plain])
        for words in ("BLEU", "ROUGE-L", "ground truth", "teacher text"):
            assert words not in evaluation([plain])
        add_generation(folder)
        found = gather_run(folder)
        label_students([found])
        rows = _rows(evaluation([found]))
        assert rows["ten"]["on teacher text"] == "30.00 → 9.00"
        assert rows["ten"]["on ground truth"] == "40.00 → 14.00"
        assert (rows["ten"]["BLEU"], rows["ten"]["ROUGE-L"]) == ("21.5", "0.433")
        assert rows["teacher"]["on teacher text"] == "8.00"  # it was not trained
        assert (rows["teacher"]["BLEU"], rows["teacher"]["ROUGE-L"]) == ("–", "–")
        assert "answers to 5 held-out prompts" in evaluation([found])

    def test_downstream_tasks(self, run: Callable[[], Path]) -> None:
        found = gather_run(run())
        label_students([found])
        assert "stills" not in evaluation([found])
        found["evaluation"]["models"][1]["lm_eval"] = {"stills": {"acc": 0.625, "acc_norm": 0.75}}
        rows = _rows(evaluation([found]))
        assert (rows["ten"]["stills acc_norm"], rows["teacher"]["stills acc_norm"]) == ("0.750", "–")


def _rows(page: str) -> dict[str, dict[str, str]]:
    """A table's cells, by row and column."""
    head, body = page.split("<tbody>")
    columns = [Elements(f"<th {cell}").text for cell in head.split("<th ")[1:]]
    found = {}
    for line in body.split("<tr>")[1:]:
        cells = [Elements(f"<td{cell}").text for cell in line.replace("<th", "<td").split("<td")[1:]]
        found[cells[0]] = dict(zip(columns, cells, strict=True))
    return found


class TestChains:
    @pytest.fixture
    def chain(self, run: Callable[[], Path], tmp_path: Path) -> Path:
        """two, whose teacher is a student of one, before the chain has ended; three is not begun."""
        folder = tmp_path / "chain"
        (folder / "stages").mkdir(parents=True)
        for name in ("two", "one"):
            run().rename(folder / "stages" / name)
        path = folder / "stages" / "two" / RESOLVED
        recipe = yaml.safe_load(path.read_text())
        recipe["teacher"]["model"] = str(folder / "stages" / "one" / "students" / "six" / "export")
        path.write_text(yaml.safe_dump(recipe))
        os.utime(folder / "stages" / "one" / RESOLVED, (2e9, 2e9))  # a run that goes on writes it again
        listed = [{"name": name, "run_dir": ""} for name in ("one", "two", "three")]
        (folder / "stages.json").write_text(json.dumps({"recipe": "chain", "stages": listed}))
        return folder

    def test_stages_are_in_order_and_teachers_by_name(self, chain: Path) -> None:
        runs = [gather_run(path) for path in run_folders(chain)]
        label_students(runs)
        assert [run["name"] for run in runs] == ["one", "two"]
        assert shown(runs[1])["Teacher"].startswith("one/six")
        assert teacher_shown("s3://bucket/stages") == "s3://bucket/stages"

    def test_what_has_not_begun_is_said(self, chain: Path) -> None:
        found = gather_chain(chain)
        assert found is not None
        assert (found["name"], found["students"]) == ("chain", [])
        text = Elements(missing([], [found])).text
        assert "Stage three has not begun." in text
        assert "The chain has not ended" in text
        page = render("t", runs=[], chains=[found], stores={}, groups=[], made="")
        assert "Stages compared" not in page

    def test_a_teacher_of_each_store(self, chain: Path) -> None:
        """Both learn from one store here: only what is after its first student is free."""
        runs = [gather_run(path) for path in run_folders(chain)]
        label_students(runs)
        assert "cost" not in reuse(runs, {}), "both stages have a ledger"
        runs[1]["store"] = "another"
        assert "Every student after the first of its store cost the teacher nothing." in reuse(runs, {})
        assert "Every student after the first cost it nothing." in reuse(runs[:1], {})
        hours = {"teacher_hours_spent": None, "teacher_hours_live": None}
        served = {"uses": 1, "students": ["ten"], "passes": 1.0, **hours}
        stores = {run["store"]: {"store": run["store"], "reuse": served} for run in runs}
        page = reuse(runs, stores)
        assert "The store of one has served 1 student (ten)" in page
        assert "The store of two has served 1 student (ten)" in page
