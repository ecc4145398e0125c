"""read_through.py, devices.py, process.py: who may share what, and how long one waits for teachers."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.console import Console
from stillroom.pipeline.devices import VISIBLE, only_gpus, teachers_gpus
from stillroom.pipeline.process import TEACHING, TRAINING, is_held, locks_of, only_one
from stillroom.pipeline.progress_file import PROGRESS
from stillroom.pipeline.read_through import Signs
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.storage.errors import RecipeError, StillroomError, TeacherError


def recipe_of(folder: Path, *, device: str = "auto", gpus: float = 1, actors: int = 1, **over: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "run_dir": str(folder / "run"),
            "teacher": {"model": "teacher"},
            "corpus": {"sources": ["corpus.jsonl"]},
            "ray": {"gpus_per_actor": gpus, "actors": actors},
            "students": [{"name": "s", "model": {"cut": {"layers": 1}}, "device": device}],
            **over,
        }
    )


def left(recipe: Recipe, *visible: str) -> list[str] | None:
    return teachers_gpus(recipe, recipe.students[0], lambda: list(visible))


def test_teachers_get_the_gpus_that_the_student_does_not(tmp_path: Path) -> None:
    assert left(recipe_of(tmp_path), "0", "1", "2") == ["1", "2"]
    assert left(recipe_of(tmp_path, device="cuda:1"), "4", "5") == ["4"]
    assert left(recipe_of(tmp_path, device="cuda", gpus=0.5, actors=2), "a", "b") == ["b"]
    assert left(recipe_of(tmp_path, train={"processes": 2}), "4", "5", "6", "7") == ["6", "7"]


@pytest.mark.parametrize("changes", [{"device": "cpu"}, {"gpus": 0}])
def test_where_one_is_on_the_cpu_nothing_is_shared(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert left(recipe_of(tmp_path, **changes), "0") is None
    assert left(recipe_of(tmp_path)) is None  # no GPU: the teacher itself is refused elsewhere


@pytest.mark.parametrize(("changes", "visible"), [({}, ["0"]), ({"gpus": 0.5}, ["0"]), ({"actors": 2}, ["0", "1"])])
def test_one_gpu_for_both_is_refused(tmp_path: Path, changes: dict[str, Any], visible: list[str]) -> None:
    with pytest.raises(RecipeError, match="they never share one; lower these, set the student's device to cpu"):
        left(recipe_of(tmp_path, **changes), *visible)


def test_beside_a_cluster_a_student_on_a_gpu_is_refused(tmp_path: Path) -> None:
    cluster: dict[str, Any] = {"ray": {"gpus_per_actor": 1, "address": "auto"}}
    with pytest.raises(RecipeError, match="run `stillroom teach` on the cluster"):
        left(recipe_of(tmp_path, **cluster), "0", "1")
    assert left(recipe_of(tmp_path, device="cpu", **cluster), "0") is None


def test_what_is_started_inside_sees_these_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "0,1"):
        monkeypatch.delenv(VISIBLE, raising=False)
        if before is not None:
            monkeypatch.setenv(VISIBLE, before)
        with only_gpus(["1"]):
            assert os.environ[VISIBLE] == "1"
        assert os.environ.get(VISIBLE) == before
        with only_gpus(None):
            assert os.environ.get(VISIBLE) == before


def test_a_student_that_follows_leaves_the_folder_to_teach(tmp_path: Path) -> None:
    assert locks_of("train", read_through=False) == locks_of("run", read_through=True) == (TEACHING, TRAINING)
    with only_one(tmp_path, locks_of("teach", read_through=True)):
        assert is_held(tmp_path, TEACHING)
        with only_one(tmp_path, locks_of("train", read_through=True)):
            assert is_held(tmp_path, TRAINING)
        for command in ("run", "train", "teach"):
            with (
                pytest.raises(StillroomError, match="at work"),
                only_one(tmp_path, locks_of(command, read_through=False)),
            ):
                pass
    assert not is_held(tmp_path, TEACHING)
    with only_one(tmp_path, locks_of("run", read_through=False)):
        pass


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def signs_of(folder: Path, **train: Any) -> tuple[Signs, Clock, Path]:
    clock = Clock()
    path = folder / "run" / "store" / PROGRESS
    path.parent.mkdir(parents=True)
    return Signs(recipe_of(folder, train=train), Console(quiet=True), clock), clock, path


def test_commits_and_the_progress_file_are_signs_of_life(tmp_path: Path) -> None:
    signs, clock, path = signs_of(tmp_path, patience_s=100)
    for seconds in range(0, 1000, 90):
        clock.now = seconds
        if seconds % 180:
            path.write_text(json.dumps({"state": "teaching", "seconds": seconds}))
        signs.require_life(news=not seconds % 180, missing=["u"])
    clock.now += 99
    signs.require_life(news=False, missing=["u"])
    clock.now += 1
    with pytest.raises(TeacherError, match=r"nobody has taught at .* for 1 min 40 s .* 1 units are waited for"):
        signs.require_life(news=False, missing=["u"])


def test_a_store_that_cannot_be_read_is_no_sign_of_life_and_is_told(tmp_path: Path) -> None:
    signs, clock, path = signs_of(tmp_path, patience_s=100)
    path.write_text(json.dumps({"state": "teaching"}))
    signs.require_life(news=False, missing=["u"])
    path.unlink()
    path.mkdir()  # nobody can read a folder as a file, not even root
    clock.now = 99
    signs.require_life(news=False, missing=["u"])
    clock.now = 100
    with pytest.raises(TeacherError, match=r"nobody has taught .*; the store cannot be read: .*Is a directory"):
        signs.require_life(news=False, missing=["u"])


def test_without_a_limit_one_waits_for_ever_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signs, clock, _ = signs_of(tmp_path, patience_s=None)
    for hours in range(100):
        clock.now = 3600 * hours
        signs.require_life(news=False, missing=["u"])
    assert capsys.readouterr().err.count("no sign of teachers") == 1


def test_a_unit_that_teaching_left_out_ends_the_wait(tmp_path: Path) -> None:
    signs, _, path = signs_of(tmp_path)
    out = [{"unit": "u", "cause": "NaN logits in document 3"}]
    path.write_text(json.dumps({"state": "teaching", "quarantined": out}))
    signs.require_life(news=False, missing=["u"])  # it may still be tried again by the next run
    path.write_text(json.dumps({"state": "done", "quarantined": out}))
    with pytest.raises(TeacherError, match="left out 1 units that are waited for, the first is u: NaN logits"):
        signs.require_life(news=False, missing=["u", "v"])


def test_what_an_earlier_run_left_out_does_not(tmp_path: Path) -> None:
    _, _, path = signs_of(tmp_path)
    path.write_text(json.dumps({"state": "done", "quarantined": [{"unit": "u", "cause": "x"}]}))
    Signs(recipe_of(tmp_path), Console(quiet=True), Clock()).require_life(news=False, missing=["u"])
