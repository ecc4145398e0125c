"""One run for all tests of the report; who changes it copies it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stillroom.pipeline.report import answers, student
from tests.pipeline.report.world import make_run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the run, its store left where it is."""
    import shutil

    def copy() -> Path:
        return Path(shutil.copytree(world, tmp_path / "run", ignore=shutil.ignore_patterns("report")))

    return copy


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Students answer in this process; the folders that were asked. `tests/e2e/test_report.py` starts the process."""
    torch.set_num_threads(1)
    asked: list[str] = []

    def predict(request: dict[str, object]) -> None:
        asked.append(str(request["folder"]))
        student.predict(request)

    monkeypatch.setattr(answers, "_run", predict)
    return asked
