"""Recipes whose students learn from inside the teacher, by schedules and in phases: taught, checked and trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.console import Console
from stillroom.pipeline.fidelity import measure_store, require_supported, require_taught
from stillroom.pipeline.run import run_recipe
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.train import require_possible, train_command
from stillroom.storage.errors import RecipeError, StudentError, UnsupportedSignal
from stillroom.storage.records import SignalSpec, TopKSpec
from stillroom.storage.store import open_store
from tests.e2e.runs import Setup, distil, sentences

QUIET = Console(quiet=True)
SIGNAL = {
    "topk": {"k": 8},
    "embeddings": True,
    "layers": {"every": 2},
    "attention": {"every": 2, "heads": "per_head", "max_tokens": 32},
}
PHASES: list[dict[str, Any]] = [
    {"steps": 6, "temperature": {"from": 4, "to": 2, "shape": "cosine"}},
    {
        "steps": 18,
        "features": {
            "hidden": {"weight": 0.3, "map": [[1, 2], [2, 4]], "projection": "linear"},
            "attention": {"weight": 0.1, "map": "last"},
            "embeddings": {"weight": 0.1},
            "relations": {"weight": {"from": 0, "to": 0.5}},
        },
    },
    {"steps": 4, "losses": {"alpha": 0}},
]


def student(**fields: Any) -> dict[str, Any]:
    return {
        "name": "cut", "model": {"cut": {"layers": 2}}, "batch_packs": 2, "lr": 2e-3, "warmup_steps": 2,
        "device": "cpu",
    } | fields  # fmt: skip


@pytest.fixture(scope="module", name="taught")
def _taught(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    setup = Setup.make(
        tmp_path_factory.mktemp("inner"), sentences(61, 40), teacher={"layers": 4}, signal=SIGNAL,
        students=[student(phases=PHASES)],
    )  # fmt: skip
    distil(setup)
    return setup


@pytest.mark.real
def test_a_curriculum_runs_from_its_recipe(taught: Setup) -> None:
    (result,) = train_command(taught.recipe(), console=QUIET)["students"]
    assert result["steps"] == 28
    lines = (taught.folder / "run" / "students" / "cut" / "log.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["kind"] == "step"]
    assert [r["phase"] for r in records] == [0] * 6 + [1] * 18 + [2] * 4
    assert (records[0]["temperature"], records[5]["temperature"]) == (4, 2)
    first, last = records[7]["features"], records[23]["features"]
    assert first.keys() == last.keys() == {"hidden", "attention", "embeddings", "relations"}
    assert last["hidden"] < 0.9 * first["hidden"]
    assert "features" not in records[-1] or records[-1]["features"] == {}


@pytest.mark.parametrize(
    ("features", "error", "says"),
    [
        ("{hidden: {map: [[1, 3]]}}", UnsupportedSignal, r"layers 3, of which the store holds 0, 2, 4"),
        ("{hidden: {map: [[3, 2]]}}", StudentError, r"the student's layers 3, which has 0 … 2"),
        ("{attention: {map: [[0, 0]]}}", UnsupportedSignal, r"layers 0, of which the store holds 1, 3"),
    ],
)
def test_what_does_not_fit_is_said_before_the_teacher_works(
    features: str, error: type[Exception], says: str, tmp_path: Path
) -> None:
    setup = Setup.make(tmp_path, sentences(61, 5), teacher={"layers": 4}, signal=SIGNAL, students=[student(steps=2)])
    with pytest.raises(error, match=says):
        run_recipe(setup.recipe(f"students.0.features={features}"), console=QUIET)
    assert not (tmp_path / "store").exists()


def test_a_fitting_student_passes(taught: Setup) -> None:
    recipe, sources, _ = distil(taught)
    for asked in recipe.students:
        require_possible(recipe, asked, sources.manifest(), sources)
        require_supported(recipe, asked, open_store(recipe.store.path))


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("features={hidden: {map: [[1, 2], [3]]}}", r"hidden\.map: expected pairs \[student, teacher\] .* got \[3\]"),
        ("features={hiden: {}}", r"unknown key students\.0\.features\.hiden.*hidden"),
        ("losses.temperature={from: 6, to: 20}", r"students\.0\.losses\.temperature: must lie in 1 … 10"),
        ("losses.temperature={from: 6, until: 2}", r"unknown key until"),
        ("losses.alpha={from: 2, to: 1}", r"students\.0\.losses\.alpha: must lie in 0 … 1"),
        ("losses.alpha=high", r"students\.0\.losses\.alpha: expected a number, or \{from, to"),
        ("phases=[{steps: 3, temprature: 2}]", r"unknown key students\.0\.phases\.0\.temprature.*temperature"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(taught: Setup, key: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        taught.recipe("students.0.phases=null", "students.0.steps=3", f"students.0.{key}")
    assert "\n" not in str(caught.value)


def test_the_bound_holds_over_all_of_a_schedule(taught: Setup) -> None:
    """Only the middle of it, 8 … 2 through 4, is measured to be too far off: each end alone would pass."""
    store = open_store(str(taught.folder / "store"))
    rows = {row.temperature: row for row in measure_store(store, [1.0, 2.0, 4.0, 8.0])[0].rows if row.tier == "topk"}
    angles = {temperature: row.gradient_angle_deg for temperature, row in rows.items()}
    worst = max(angles, key=angles.__getitem__)
    asked = StudentConfig.model_validate(student(losses={"temperature": {"from": 8, "to": 1}}))
    assert asked.temperatures((1.0, 2.0, 4.0, 8.0)) == [1, 2, 4, 8]
    recipe = taught.recipe(f"fidelity.max_gradient_angle_deg={angles[worst] - 1e-3!r}")
    with pytest.raises(UnsupportedSignal, match=f"topk at T = {worst:g} gives gradient angle"):
        require_supported(recipe, asked, store)
    require_supported(taught.recipe(f"fidelity.max_gradient_angle_deg={angles[worst] + 1e-6!r}"), asked, store)


def test_without_the_layers_no_store_is_asked() -> None:
    asked = StudentConfig.model_validate(student(features={"relations": {}}))
    with pytest.raises(UnsupportedSignal, match=r"features\.relations needs signal\.layers, and the store holds top-8"):
        require_taught(asked, SignalSpec(TopKSpec(8)), where="s")
