"""The common mistakes, and what is said of them: one line, the right exit code, nothing spent and nothing spoilt."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.cli import main
from stillroom.pipeline.console import Console
from stillroom.pipeline.plan import make_plan
from stillroom.pipeline.sources import Sources
from stillroom.storage.store import open_store
from tests.e2e.runs import Setup, distil, sentences, write_corpus
from tests.tiny import tiny_teacher

DOCUMENTS = sentences(31, 20)
QUICK: dict[str, Any] = {"students__0__steps": 2, "students__0__warmup_steps": 0}


class Said:
    """What a command printed, and its exit code."""

    def __init__(self, capfd: pytest.CaptureFixture[str], command: str, setup: Setup, words: Sequence[str]) -> None:
        capfd.readouterr()
        self.code = main([command, str(setup.folder / "recipe.yaml"), "--json", *words])
        self.out, self.err = capfd.readouterr()
        lines = self.out.splitlines()
        assert len(lines) == 1, f"expected one JSON object on stdout: {self.out}"
        self.object: dict[str, Any] = json.loads(lines[0])

    def refused(self, code: int, *words: str) -> None:
        assert self.code == code, self.err
        errors = [line for line in self.err.splitlines() if "error" in line]
        assert errors == [f"stillroom: error: {self.object['error']}"], self.err
        assert "Traceback" not in self.err
        for word in words:
            assert word in errors[0]


@pytest.fixture(name="say")
def _say(capfd: pytest.CaptureFixture[str]) -> Any:
    return lambda command, setup, *words: Said(capfd, command, setup, words)


@pytest.fixture(name="fresh")
def _fresh(tmp_path: Path) -> Setup:
    return Setup.make(tmp_path, DOCUMENTS, **QUICK)


@pytest.fixture(scope="module", name="trained")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    setup = Setup.make(tmp_path_factory.mktemp("trained"), DOCUMENTS, **QUICK)
    distil(setup)
    assert main(["train", str(setup.folder / "recipe.yaml"), "--quiet"]) == 0
    return setup


def store_of(setup: Setup) -> Path:
    return setup.folder / "store"


def copied(setup: Setup, folder: Path) -> Setup:
    shutil.copytree(setup.folder, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(setup.folder), str(folder)))
    return Setup(folder)


class TestTooSoon:
    def test_train_without_a_corpus(self, fresh: Setup, say: Any) -> None:
        said = say("train", fresh)
        said.refused(1, "corpus.parquet is not there yet", "run `stillroom teach`")
        assert said.object["kind"] == "StoreError"

    def test_evaluate_without_a_corpus_and_without_a_student(self, fresh: Setup, say: Any) -> None:
        say("evaluate", fresh).refused(1, "corpus.parquet is not there yet", "run `stillroom run`")
        distil(fresh)
        say("evaluate", fresh).refused(1, "no student in", "run `stillroom train`")

    @pytest.mark.real
    def test_train_before_the_teaching_is_done_pins_nothing(self, fresh: Setup, say: Any) -> None:
        sources = Sources(fresh.recipe(), Console(quiet=True))
        make_plan(sources.manifest(), sources.store(), unit_tokens=256, seed=0)
        say("train", fresh).refused(1, "lacks", "run `stillroom teach`")
        distil(fresh)
        said = say("train", fresh)
        assert said.code == 0, said.err
        assert [s["name"] for s in said.object["students"]] == ["cut"]


class TestSettings:
    def test_another_signal_than_the_stores_is_named(self, fresh: Setup, say: Any) -> None:
        distil(fresh)
        before = open_store(str(store_of(fresh))).committed()
        said = say("teach", fresh, "signal.topk.k=16")
        said.refused(1, "signal: store top-8 (1/8 nat), asked top-16 (1/8 nat)", "store.path of its own")
        assert "removing that folder" not in said.object["error"]
        assert open_store(str(store_of(fresh))).committed() == before

    def test_an_empty_store_of_another_signal_may_be_removed(self, fresh: Setup, say: Any) -> None:
        Sources(fresh.recipe(), Console(quiet=True)).store()
        say("teach", fresh, "signal.topk.k=16").refused(1, "asked top-16", "removing that folder")

    def test_k_beyond_the_vocabulary_founds_no_store(self, fresh: Setup, say: Any) -> None:
        say("teach", fresh, "signal.topk.k=320").refused(2, "signal.topk.k is 320, expected 1 to 319")
        assert not store_of(fresh).exists()

    def test_a_window_beyond_the_teachers_positions(self, fresh: Setup, say: Any) -> None:
        write_corpus(fresh.folder / "corpus.jsonl", [*DOCUMENTS, "the still drips " * 300])
        for command in ("plan", "teach"):
            said = say(command, fresh, "corpus.window=300", "corpus.heldout=0")
            said.refused(2, "sequences of 300 tokens", "end at 256")
            assert "teacher actor" not in said.err

    def test_a_disk_below_the_floor_is_refused_before_ray_starts(self, fresh: Setup, say: Any) -> None:
        said = say("teach", fresh, f"store.min_free_bytes={10**18}")
        said.refused(1, "needs store.min_free_bytes", "are free")
        assert said.object["kind"] == "StoreFull"
        assert "teacher actor" not in said.err


def test_plan_looks_and_founds_nothing(fresh: Setup, say: Any) -> None:
    said = say("plan", fresh)
    assert said.code == 0
    assert said.object["pending_sequences"] == said.object["sequences"] > 0
    assert said.object["estimate"]["bytes"] > 0
    assert not store_of(fresh).exists()
    # So a setting may still be changed after it has been seen.
    assert say("plan", fresh, "signal.topk.k=4").object["estimate"]["bytes"] < said.object["estimate"]["bytes"]


@pytest.mark.real
class TestTrained:
    def test_a_finished_student_needs_no_teacher_and_a_new_cut_does(
        self, trained: Setup, say: Any, tmp_path: Path
    ) -> None:
        hidden = trained.folder / "teacher-elsewhere"
        (trained.folder / "teacher").rename(hidden)
        try:
            said = say("train", trained)
            assert said.code == 0, said.err
            assert "trained already" in said.err
            say("train", trained, "students.0.name=second").refused(1, "teacher", "no such model folder")
        finally:
            hidden.rename(trained.folder / "teacher")

    def test_a_run_that_was_moved_is_still_trained(self, trained: Setup, say: Any, tmp_path: Path) -> None:
        moved = copied(trained, tmp_path / "moved")
        trained.folder.rename(trained.folder.with_name("away"))
        try:
            for command in ("train", "evaluate"):
                said = say(command, moved)
                assert said.code == 0, said.err
                assert str(trained.folder) not in said.out + said.err
        finally:
            trained.folder.with_name("away").rename(trained.folder)

    def test_a_grown_corpus_is_refused_before_the_teacher_works(self, trained: Setup, say: Any, tmp_path: Path) -> None:
        grown = copied(trained, tmp_path / "grown")
        write_corpus(grown.folder / "corpus.jsonl", [*DOCUMENTS, "anise and rose and thyme and mint"])
        before = open_store(str(store_of(grown))).committed()
        said = say("run", grown)
        said.refused(1, "result.json belongs to another run", "manifest:", "a name of its own")
        assert "teacher actor" not in said.err
        assert open_store(str(store_of(grown))).committed() == before

    def test_what_a_student_meets_is_one_line_with_its_own_exit_code(self, trained: Setup, say: Any) -> None:
        said = say("train", trained, "students.0.name=wide", "students.0.window=4096")
        said.refused(2, "student wide: ", "window is 4096, the corpus was cut at 32")
        assert said.object["kind"] == "RecipeError"


@pytest.mark.real
def test_hard_labels_alone_need_neither_teaching_nor_a_store(fresh: Setup, say: Any) -> None:
    said = say("train", fresh, "students.0.losses.alpha=0")
    assert said.code == 0, said.err
    assert not store_of(fresh).exists()
    # A store that comes later does not make another run of it.
    distil(fresh)
    again = say("train", fresh, "students.0.losses.alpha=0")
    assert again.code == 0, again.err
    assert "trained already" in again.err


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("students.0.model.cut.layers=99", 1, ("99 layers", "the teacher has 2")),
        ("students.0.window=4000", 2, ("4000", "set it to at most 32")),
        ("students.0.model={from: OTHER}", 1, ("digest", "sequence-level distillation")),
    ],
)
def test_a_student_that_cannot_be_is_refused_before_the_teacher_works(
    tmp_path: Path, say: Any, word: str, code: int, said: tuple[str, ...]
) -> None:
    setup = Setup.make(tmp_path, DOCUMENTS, **QUICK)
    tiny_teacher(tmp_path / "other", vocabulary=300)
    say("run", setup, word.replace("OTHER", str(tmp_path / "other"))).refused(code, *said)
    assert not (tmp_path / "store" / "shards").exists()
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
