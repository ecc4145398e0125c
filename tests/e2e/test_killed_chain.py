"""A chain killed in the middle of each of its stages goes on from there, and ends as one that nobody disturbed.

Shaped as `deploy/recipes/progressive.yaml`: three layers teach two, these one; then one of the three at once.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.storage.store import open_store
from tests.e2e.runs import Setup, assert_equal_rows, kill_group, sentences, wait_for

pytestmark = [pytest.mark.real, pytest.mark.slow]

STUDENTS = {"one": "two-layers", "two": "one-layer", "direct": "one-layer"}
STEPS = 12
#: Enough small units that teaching takes seconds: with 120 documents the first commit had all of them.
DOCUMENTS = sentences(11, 900)
OVER: dict[str, Any] = {"store__unit_tokens": 128, "corpus__heldout": 0.02, "ray__actors": 1}


def chain(folder: Path) -> Setup:
    setup = Setup.make(folder, DOCUMENTS, teacher={"layers": 3}, **OVER)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    student = recipe.pop("students")[0]
    del recipe["store"]["path"]
    recipe["teacher"]["model"] = str(folder.parent / "teacher" / "teacher")  # one for both: its name is in the identity
    recipe["student_defaults"] = {k: v for k, v in student.items() if k not in ("name", "model")} | {"steps": STEPS}
    layers = {"two-layers": 2, "one-layer": 1}
    recipe["stages"] = [
        {"name": stage, "students": [{"name": name, "model": {"cut": {"layers": layers[name]}}}]}
        for stage, name in STUDENTS.items()
    ]
    recipe["stages"][1]["teacher"] = {"stage": "one"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return setup


def stores(setup: Setup) -> list[Path]:
    return sorted(path.parent for path in (setup.folder / "run").rglob("_delta_log"))


def student(setup: Setup, stage: str) -> Path:
    return setup.folder / "run" / "stages" / stage / "students" / STUDENTS[stage]


def losses(setup: Setup, stage: str) -> list[tuple[int, float]]:
    """(step, loss) of every step in the student's log."""
    lines = map(json.loads, (student(setup, stage) / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def teaching(setup: Setup, number: int) -> Callable[[], bool]:
    """Its store number `number` has a commit; that it lacks units still is asserted after the kill."""
    return lambda: len(stores(setup)) > number and len(list((stores(setup)[number] / "_delta_log").iterdir())) > 1


def training(setup: Setup, stage: str) -> Callable[[], bool]:
    log = student(setup, stage) / "log.jsonl"
    return lambda: log.exists() and log.read_text().count('"kind": "step"') > STEPS // 2


def taught(setup: Setup, number: int) -> bool:
    store = open_store(str(stores(setup)[number]))
    return len(store.committed()) == len(store.planned())


def trained(setup: Setup, stage: str) -> bool:
    return (student(setup, stage) / "result.json").exists()


def test_it_goes_on_from_every_stage(tmp_path: Path) -> None:
    Setup.make(tmp_path / "teacher", [], teacher={"layers": 3})
    killed, calm = chain(tmp_path / "killed"), chain(tmp_path / "calm")
    moments: dict[str, tuple[Callable[[], bool], Callable[[], bool]]] = {
        "stage one teaches": (teaching(killed, 0), lambda: not taught(killed, 0)),
        "stage one trains": (training(killed, "one"), lambda: not trained(killed, "one")),
        "stage two teaches": (teaching(killed, 1), lambda: not taught(killed, 1)),
        "stage two trains": (training(killed, "two"), lambda: not trained(killed, "two")),
        "the direct student trains": (training(killed, "direct"), lambda: not trained(killed, "direct")),
    }
    for what, (moment, midway) in moments.items():
        process = killed.start()
        try:
            wait_for(moment, process, what)
        finally:
            kill_group(process)
        assert midway(), f"{what}: it was done before the kill"
    killed.run()
    calm.run()
    assert len(stores(killed)) == len(stores(calm)) == 2, "direct learns from the first stage's store"
    for one, other in zip(stores(killed), stores(calm), strict=True):
        identities = [open_store(str(path)).identity for path in (one, other)]
        assert identities[0] == replace(identities[1], teacher=identities[0].teacher), "but for the folder's name"
        assert_equal_rows(one, other)
    for stage in STUDENTS:
        assert losses(killed, stage) == losses(calm, stage)
        assert [step for step, _ in losses(killed, stage)] == list(range(1, STEPS + 1))
        weights = [(student(setup, stage) / "export" / "model.safetensors").read_bytes() for setup in (killed, calm)]
        assert weights[0] == weights[1]
    tables = [json.loads((setup.folder / "run" / "summary.json").read_text())["students"] for setup in (killed, calm)]
    compared = [[(row["student"], row["kl_to_first_teacher"]) for row in table] for table in tables]
    assert compared[0] == compared[1]
    assert len(compared[0]) == len(STUDENTS)
    again = killed.run()
    assert again.count("is trained already") == len(STUDENTS)
    assert "starting" not in again, "a teacher was started for nothing"
