"""A student that trains while teachers still write ends as one that came after them, whatever is killed meanwhile."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillroom.pipeline.console import Console
from stillroom.pipeline.fidelity import keep_fidelity
from stillroom.pipeline.plan import make_plan
from stillroom.pipeline.precompute import _payloads, _truth_wanted
from stillroom.pipeline.read_through import train_beside
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.train import train
from stillroom.storage.errors import StoreError, TeacherError
from stillroom.storage.snapshot import Snapshot
from stillroom.workers.actor import TeacherActor
from tests.e2e.runs import PATIENCE_S, Setup, assert_equal_rows, children, kill_group, sentences, wait_for

pytestmark = pytest.mark.real

DOCUMENTS = sentences(11, 180)
#: About 110 units. Training takes packs from 64 of them in turn, so it stands still while any of these is missing.
OVER: dict[str, Any] = {
    "store__unit_tokens": 128,
    "corpus__heldout": 0.05,
    "students__0__steps": 48,
    "students__0__checkpoint_every": 5,
}
READ_THROUGH = "train.read_through=true"


class Teacher:
    """The actor's own class without Ray, which commits as many units as it is told to, in teaching order."""

    def __init__(self, setup: Setup) -> None:
        self.recipe, self.console = setup.recipe(READ_THROUGH), Console(quiet=True)
        self.sources = Sources(self.recipe, self.console)
        self.manifest, self.store = self.sources.manifest(), self.sources.store()
        plan = make_plan(self.manifest, self.store, unit_tokens=self.recipe.store.unit_tokens, seed=0)
        self.units = len(plan.pending)
        self._actor = TeacherActor(self.sources.teacher_spec(), self.store.identity, self.store.uri)
        self._work = _payloads(plan, self.manifest, _truth_wanted(self.recipe, plan, self.store))

    def commit(self, units: int | None = None) -> None:
        """None: all that is left."""
        work = list(self._work) if units is None else [next(self._work) for _ in range(units)]
        self.store.commit([self._actor.score_unit(*payload) for payload in work])


@pytest.fixture(scope="module", name="came_after")
def _came_after(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    setup = Setup.make(tmp_path_factory.mktemp("after"), DOCUMENTS, **OVER)
    teacher = Teacher(setup)
    assert teacher.units > 100
    teacher.commit()
    setup.run("train")
    return setup


def student(setup: Setup) -> Path:
    return setup.folder / "run" / "students" / "cut"


def steps(setup: Setup) -> int:
    log = student(setup) / "log.jsonl"
    return log.read_text().count('"loss"') if log.exists() else 0


def assert_ends_the_same(setup: Setup, other: Setup) -> None:
    assert_equal_rows(setup.folder / "store", other.folder / "store")
    assert setup.losses() == other.losses()
    one, two = (load_file(student(s) / "export" / "model.safetensors") for s in (setup, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    snapshots = [Snapshot.read(student(s) / "snapshot.parquet") for s in (setup, other)]
    assert snapshots[0].units == snapshots[1].units
    results = [json.loads((student(s) / "result.json").read_text()) for s in (setup, other)]
    assert (results[0]["before"], results[0]["after"]) == (results[1]["before"], results[1]["after"])
    assert results[0]["bindings"]["planned"] == results[1]["bindings"]["planned"]
    assert results[0]["bindings"]["snapshot"] == snapshots[0].digest != snapshots[0].planned_digest


def test_teaching_and_training_at_once_end_with_the_same_student(tmp_path: Path, came_after: Setup) -> None:
    setup = Setup.make(tmp_path, DOCUMENTS, **OVER)
    printed = setup.run("run", READ_THROUGH)
    assert "starts beside the teachers" in printed
    assert_ends_the_same(setup, came_after)
    recipe = setup.recipe()  # and without it the student is found to be trained
    assert train(recipe, recipe.students[0], Console(quiet=True))["steps"] == 48


@pytest.mark.slow
def test_a_student_killed_while_it_waits_goes_on(tmp_path: Path, came_after: Setup) -> None:
    """`train` follows a teacher elsewhere."""
    setup = Setup.make(tmp_path, DOCUMENTS, **OVER)
    teacher = Teacher(setup)
    teacher.commit(30)
    process = setup.start("train", READ_THROUGH)
    there = student(setup) / "checkpoints" / "step-00000015"  # 30 packs, two a step
    wait_for(there.exists, process, "the step before a wait")
    os.kill(children(process, "stillroom.pipeline.student")[0].pid, signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "killed by signal 9; the same command goes on from its last checkpoint" in printed
    assert "the evaluation before training is made up for at the end" in printed

    process = setup.start("train", READ_THROUGH)
    try:
        teacher.commit()
        printed, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            kill_group(process)
    assert process.returncode == 0, printed
    assert "going on after step 15 of 48" in printed
    assert_ends_the_same(setup, came_after)


def test_where_the_teacher_fails_the_student_stops_and_both_go_on_later(tmp_path: Path, came_after: Setup) -> None:
    setup = Setup.make(tmp_path, DOCUMENTS, **OVER)
    teacher = Teacher(setup)

    def fails() -> None:
        teacher.commit(20)
        end = time.monotonic() + PATIENCE_S
        while steps(setup) < 10:  # the step before a wait
            assert time.monotonic() < end
            time.sleep(0.05)
        raise TeacherError("unit x is left out")

    def succeeds() -> None:
        teacher.commit()
        keep_fidelity(teacher.recipe, teacher.store, teacher.console)

    arguments = teacher.recipe, teacher.recipe.students[0], teacher.manifest, teacher.store
    with pytest.raises(TeacherError, match="unit x is left out"):
        train_beside(*arguments, fails, teacher.console)
    assert (student(setup) / "checkpoints" / "step-00000010").exists()
    assert not (student(setup) / "result.json").exists()
    assert Snapshot.read(student(setup) / "snapshot.parquet").open
    with pytest.raises(StoreError, match="run `stillroom teach` on this recipe first, or set train"):
        train(teacher.recipe, teacher.recipe.students[0], teacher.console)

    result = train_beside(*arguments, succeeds, teacher.console)
    assert result["steps"] == 48
    assert_ends_the_same(setup, came_after)
