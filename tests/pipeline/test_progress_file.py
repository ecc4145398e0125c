"""progress.json: whole at every moment, seldom written, and never a reason to stop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.pipeline.progress_file import PROGRESS, ProgressFile
from stillroom.storage.care.gc import collect_garbage
from stillroom.storage.errors import StoreFull
from stillroom.storage.files import LocalFiles
from tests.strategies import random_sequences, tiny_store


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    return LocalFiles(tmp_path / "store")


def counts(scored: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"units": {"scored": scored}}


def read(files: LocalFiles) -> dict[str, Any]:
    return dict(json.loads(files.read(PROGRESS)))


def test_commits_are_shown_every_two_seconds_and_idleness_every_ten(files: LocalFiles, clock: Clock) -> None:
    file = ProgressFile(files, "demo", pytest.fail, clock)
    shown = []
    for second in range(25):
        clock.now = 100.0 + second
        if file.update(counts(second), news=second < 6):
            shown.append(second)
            assert read(files)["units"] == {"scored": second}
    assert shown == [0, 2, 4, 14, 24]
    held = read(files)
    assert (held["run"], held["state"], held["seconds"]) == ("demo", "teaching", 24.0)
    assert held["updated_at"] >= held["began_at"]


def test_its_seconds_run_from_where_it_is_told(files: LocalFiles, clock: Clock) -> None:
    file = ProgressFile(files, "demo", pytest.fail, clock)
    assert file.update(counts(0), news=False)
    clock.now += 41
    file.begin()
    clock.now += 1
    assert file.update(counts(1), news=True)
    assert read(files)["seconds"] == 1.0


@pytest.mark.parametrize("state", ["done", "stopped"])
def test_the_end_is_always_shown(files: LocalFiles, clock: Clock, state: Any) -> None:
    file = ProgressFile(files, "demo", pytest.fail, clock)
    assert file.update(counts(1), news=True)
    assert file.update(counts(2), news=True, state=state)
    assert (read(files)["state"], read(files)["units"]) == (state, {"scored": 2})


def test_where_it_cannot_be_written_that_is_said_once(tmp_path: Path, clock: Clock) -> None:
    class Full(LocalFiles):
        def write(self, name: str, data: bytes | memoryview) -> None:
            raise StoreFull("no room")

    said: list[str] = []
    file = ProgressFile(Full(tmp_path), "demo", said.append, clock)
    for _ in range(3):
        clock.now += 60
        file.update(counts(1), news=True)
    assert said == ["_stillroom/progress.json cannot be written, which stops nothing: no room"]


def test_garbage_collection_leaves_it(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store", random_sequences(np.random.default_rng(1), 4))
    ProgressFile(store.files, "demo", pytest.fail).update(counts(1), news=True)
    report = collect_garbage(store.uri, older_than_s=0, now_s=4e9)
    assert report["foreign_files"] == 0
    assert store.files.exists(PROGRESS)
