"""`stillroom status`: what a run's files say, in every state that they can be in."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.progress_file import PROGRESS, ProgressFile
from stillroom.pipeline.run_status import SILENCE_S, STAGES, status_command
from stillroom.storage.errors import StoreError
from stillroom.storage.files import LocalFiles

UNITS = {"planned": 10, "scored": 4, "quarantined": 1, "pending": 5}


def make(folder: Path) -> Path:
    """A run that has just begun."""
    folder.mkdir(parents=True)
    recipe = {
        "name": "r", "store": {"path": str(folder / "store")}, "generate": None,
        "students": [{"name": "s", "steps": 40, "phases": None}],
    }  # fmt: skip
    (folder / "recipe.resolved.yaml").write_text(json.dumps(recipe))
    return folder


def teaching(folder: Path, state: Any = "teaching", run: str = "r", ready: int = 2, scored: int = 4) -> None:
    """What a teaching run writes, by its own hand, after 8 s."""
    clock = iter([0.0, 8.0])
    counts = {
        "units": UNITS | {"scored": scored}, "actors": {"wanted": 2, "ready": ready, "lost": 0}, "tokens_per_s": 2000.0,
        "quarantined": [{}],
    }  # fmt: skip
    file = ProgressFile(LocalFiles(folder / "store"), run, lambda _: None, lambda: next(clock))
    assert file.update(lambda: counts, news=True, state=state)


def log(folder: Path, *records: dict[str, Any], age_s: float = 0.0) -> None:
    path = folder / "students" / "s" / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "st')
    os.utime(path, (time.time() - age_s,) * 2)


def step(number: int, wait: float = 0.0) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": 2.5, "tokens": 512, "tokens_per_s": 256.0, "data_wait": wait}


def part(folder: Path, name: str) -> dict[str, Any]:
    return next(p for p in status_command(str(folder))["parts"] if p["part"] == name)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    found = status_command(str(run))
    assert (found["run"], found["state"]) == ("r", "not begun")
    assert [p["part"] for p in found["parts"]] == ["corpus", "teach", "train s", "evaluate"]
    assert part(run, "train s") == {"part": "train s", "state": "not begun", "of": 40}


def test_teachers_at_work(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    teaching(run)
    found = part(run, "teach")
    assert 0.0 <= found.pop("silent_s") < SILENCE_S
    assert found == {
        "part": "teach", "state": "at work", "done": 4, "of": 10, "rate": "2,000 tokens/s", "left_s": 10.0,
        "waits_for": "", "left_out": 1,
    }  # fmt: skip
    assert status_command(str(run))["state"] == "at work"
    teaching(run, ready=0, scored=0)
    assert part(run, "teach")["waits_for"] == "2 of 2 actors to start"
    assert part(run, "teach")["left_s"] is None
    teaching(run, run="other")
    assert part(run, "teach")["waits_for"] == "the store is written by run other"


def test_engines_that_start(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    recipe = json.loads((run / "recipe.resolved.yaml").read_text()) | {"generate": {"path": str(run / "said")}}
    (run / "recipe.resolved.yaml").write_text(json.dumps(recipe))
    assert part(run, "generate") == {"part": "generate", "state": "not begun"}
    units, actors = {"planned": 4, "generated": 0, "quarantined": 0, "pending": 4}, {"wanted": 2, "ready": 0, "lost": 0}
    file = ProgressFile(LocalFiles(run / "said"), "r", pytest.fail)
    assert file.update(lambda: {"units": units, "actors": actors}, news=False)
    found = part(run, "generate")
    assert (found["state"], found["left_s"]) == ("at work", None)
    assert found["waits_for"].startswith("2 of 2 engines to start (vLLM: ")


def test_teachers_that_ended_and_teachers_that_fell_silent(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    teaching(run, state="done")
    assert part(run, "teach")["state"] == "done"
    teaching(run, state="stopped")
    assert part(run, "teach")["state"] == "stopped"
    teaching(run)
    path = run / "store" / PROGRESS
    path.write_text(json.dumps(json.loads(path.read_text()) | {"updated_at": "2020-01-01T00:00:00+00:00"}))
    found = part(run, "teach")
    assert found["state"] == "stopped"
    assert "left_s" not in found
    path.write_text("{")
    assert part(run, "teach")["state"] == "unknown"


@pytest.mark.parametrize(
    "damaged", ["{}", "[]", '{"state": "done"}', '{"units": 3, "actors": {}, "updated_at": 7}', "{", "\x00"]
)
def test_a_damaged_progress_file_is_named_and_hides_nothing_else(tmp_path: Path, damaged: str) -> None:
    run = make(tmp_path / "run")
    teaching(run)
    (run / "store" / PROGRESS).write_text(damaged)
    found = part(run, "teach")
    assert found["state"] == "unknown"
    assert str(run / "store") in found["waits_for"]
    assert part(run, "train s")["state"] == "not begun"


def test_a_student_at_work(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    log(run, {"kind": "evaluation", "step": 0, "kl": 3.5}, step(1), step(2, wait=0.5))
    found = part(run, "train s")
    assert 0.0 <= found.pop("silent_s") < SILENCE_S
    assert found == {
        "part": "train s", "state": "at work", "done": 2, "of": 40, "rate": "256 tokens/s", "loss": 2.5,
        "left_s": 76.0, "waits_for": "data, 25% of the time", "kl": 3.5,
    }  # fmt: skip
    log(run, step(1), step(2), age_s=SILENCE_S + 5)
    found = part(run, "train s")
    assert found["state"] == "stopped"
    assert "left_s" not in found


def test_a_student_that_is_done(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    log(run, step(1))
    (run / "students" / "s" / "result.json").write_text(json.dumps({"steps": 30, "after": {"kl": 0.5}}))
    assert part(run, "train s") == {"part": "train s", "state": "done", "done": 30, "of": 30, "kl": 0.5}


def test_stages(tmp_path: Path) -> None:
    chain = tmp_path / "chain"
    run = make(chain / "stages" / "one")
    teaching(run, state="done")
    listed = [{"name": name, "run_dir": str(chain / "stages" / name)} for name in ("one", "two")]
    (chain / STAGES).write_text(json.dumps({"recipe": "c", "stages": listed}))
    found = status_command(str(chain))
    assert (found["run"], found["state"]) == ("c", "not begun")
    assert [(p["stage"], p["part"]) for p in found["parts"]][-1] == ("two", "all")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is no run's folder: it has no recipe\.resolved\.yaml"):
        status_command(str(tmp_path))
