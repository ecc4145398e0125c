"""Recipes with stages, presets and defaults for students: what each stage's plain recipe is."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.pipeline.recipe import Chain, load_chain, load_recipe
from stillroom.storage.errors import RecipeError

BASE: dict[str, Any] = {
    "name": "chain",
    "run_dir": "runs/chain",
    "teacher": {"model": "org/teacher", "dtype": "float32", "device": "cpu"},
    "corpus": {"sources": ["python:pydoc_data.topics"]},
    "student_defaults": {"steps": 40, "batch_packs": 2, "losses": {"alpha": 0.7, "temperature": 2.0}},
    "stages": [
        {"name": "half", "students": [{"name": "half", "model": {"cut": {"layers": 6}}}]},
        {
            "name": "quarter",
            "teacher": {"stage": "half"},
            "students": [{"name": "quarter", "model": {"cut": {"layers": 3}}, "steps": 20, "losses": {"alpha": 0.9}}],
        },
        {"name": "direct", "students": [{"name": "quarter", "model": {"cut": {"layers": 3}}}]},
        {
            "name": "last",
            "teacher": {"stage": "quarter", "student": "quarter", "dtype": "bfloat16"},
            "signal": {"topk": {"k": 8}},
        },
    ],
}


def load(folder: Path, data: dict[str, Any], *overrides: str) -> Chain:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return load_chain(folder / "recipe.yaml", overrides)


def without(**stages: Any) -> dict[str, Any]:
    return {key: value for key, value in BASE.items() if key != "stages"} | stages


def test_each_stage_is_a_plain_recipe(tmp_path: Path) -> None:
    chain = load(tmp_path, BASE)
    half, quarter, _, last = chain.stages
    assert chain.plain is None
    assert (chain.name, chain.run_dir) == ("chain", Path("runs/chain"))
    assert [stage.recipe.name for stage in chain.stages] == [
        "chain.half", "chain.quarter", "chain.direct", "chain.last",
    ]  # fmt: skip
    assert quarter.recipe.run_dir == Path("runs/chain/stages/quarter")
    assert quarter.recipe.teacher.model == "runs/chain/stages/half/students/half/export"
    assert quarter.taught_by == ("half", "half")
    assert (quarter.recipe.teacher.dtype, last.recipe.teacher.dtype) == ("float32", "bfloat16")
    assert half.taught_by is None
    assert last.recipe.students == ()


def test_defaults_lie_under_each_student(tmp_path: Path) -> None:
    half, quarter, *_ = load(tmp_path, BASE).stages
    assert (half.recipe.students[0].steps, quarter.recipe.students[0].steps) == (40, 20)
    losses = quarter.recipe.students[0].losses
    assert (losses.alpha, losses.temperature) == (0.9, 2.0)
    plain = load(tmp_path, without(students=[{"name": "one", "model": {"cut": {"layers": 2}}}]))
    assert plain.plain is not None
    assert plain.plain.students[0].losses.alpha == 0.7


def test_stages_with_one_teacher_and_signal_share_a_store(tmp_path: Path) -> None:
    half, quarter, direct, last = (stage.recipe.store.path for stage in load(tmp_path, BASE).stages)
    assert half == direct == "runs/chain/stages/half/store"
    assert len({half, quarter, last}) == 3
    given = load(tmp_path, BASE | {"store": {"path": "s3://bucket/chain", "unit_tokens": 64}}).stages
    assert [stage.recipe.store.path for stage in given] == [
        "s3://bucket/chain/half", "s3://bucket/chain/quarter", "s3://bucket/chain/half", "s3://bucket/chain/last",
    ]  # fmt: skip
    assert {stage.recipe.store.unit_tokens for stage in given} == {64}


def test_where_a_chain_begins_and_what_it_has_cost(tmp_path: Path) -> None:
    chain = load(tmp_path, BASE)
    assert [chain.root(stage).name for stage in chain.stages] == ["half", "half", "direct", "half"]
    assert [chain.steps(stage) for stage in chain.stages] == [0, 40, 0, 60]
    epochs = load(tmp_path, BASE, "stages.0.students.0.steps=null", "stages.0.students.0.epochs=1")
    assert epochs.steps(epochs.stages[1]) is None


def test_the_command_line_goes_over_the_file(tmp_path: Path) -> None:
    chain = load(tmp_path, BASE, "stages.1.students.0.steps=9", "student_defaults.batch_packs=4", "corpus.window=64")
    assert [stage.recipe.students[0].steps for stage in chain.stages[:3]] == [40, 9, 40]
    assert {s.batch_packs for stage in chain.stages for s in stage.recipe.students} == {4}
    assert {stage.recipe.corpus.window for stage in chain.stages} == {64}


def test_one_stage_alone(tmp_path: Path) -> None:
    chain = load(tmp_path, BASE)
    alone = chain.only("quarter")
    assert alone.plain == chain.stages[1].recipe
    assert alone.only(None) == alone
    with pytest.raises(RecipeError, match="has stages, name one with --stage: half, quarter, direct, last"):
        chain.only(None)
    with pytest.raises(RecipeError, match="it has no stage halve: half"):
        chain.only("halve")
    with pytest.raises(RecipeError, match="has no stages: leave out --stage half"):
        alone.only("half")
    with pytest.raises(RecipeError, match="a recipe with stages: half, quarter"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages=3", "stages: expected a list of stages, each with a name, got 3"),
        ("stages=[]", "expected a list of stages"),
        ("stages.0=half", "stages.0: expected a mapping with a name"),
        ("stages.0.name=../x", "stages.0.name: expected letters"),
        ("stages.1.name=half", "expected a different name for each stage, got half twice"),
        ("stages.0.teacher={stage: half}", "expected an earlier stage, a later stage: nothing comes before"),
        ("stages.1.teacher.stage=direct", 'expected an earlier stage, one of half, got "direct"'),
        ("stages.1.teacher.student=x", r"expected a student of stage half \(half\), got \"x\""),
        ("stages.3.teacher={stage: half, student: [x]}", "expected a student of stage half"),
        ("student_defaults=3", "student_defaults: expected fields of a student, got 3"),
        ("stages.1.students.0.lr=-1", "stage quarter: command line: students.0.lr: expected more than 0"),
        ("stages.1.signals={}", "stage quarter: command line: unknown key signals .did you mean signal"),
        ("stage=x", "stage half: command line: unknown key stage .did you mean stages"),
        ("preset=deep", 'preset: expected one of deepseek, got "deep" .did you mean deepseek'),
    ],
)
def test_what_cannot_be(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(tmp_path, BASE, override)


def test_a_mistake_in_a_stage_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: chain\nteacher: {model: org/teacher}\ncorpus: {sources: ['python:re']}\nstages:\n"
        "  - name: one\n    students:\n      - {name: a, model: {cut: {layers: 1}}}\n"
        "      - name: b\n        modle: x\n"
    )
    with pytest.raises(RecipeError, match=r"recipe.yaml:9: unknown key students.1.modle .did you mean model"):
        load_chain(tmp_path / "recipe.yaml")


def test_the_preset_lies_under_the_recipe(tmp_path: Path) -> None:
    sources = [{"path": "python:re", "name": "pretraining"}, {"path": "python:pydoc_data", "name": "instruction"}]
    student = {"name": "small", "model": {"cut": {"layers": 2}}, "steps": 10}
    recipe = {
        "name": "deep", "preset": "deepseek", "teacher": {"model": "org/teacher"}, "corpus": {"sources": sources},
        "students": [student],
    }  # fmt: skip
    found = load(tmp_path, recipe).plain
    assert found is not None
    losses, features = found.students[0].losses, found.students[0].features
    assert (losses.alpha, losses.signal) == (0.7, "hidden")
    assert losses.temperature.at(0, 10) == 6.0  # type: ignore[union-attr]
    assert losses.temperature.at(9, 10) == 2.0  # type: ignore[union-attr]
    assert features is not None
    assert features.hidden is not None
    assert found.signal.topk is None
    assert found.signal.layers is not None
    assert found.signal.layers.every == 4
    over = load(tmp_path, recipe | {"signal": {"layers": {"every": 2}}}, "student_defaults.losses.alpha=0.5").plain
    assert over is not None
    assert over.signal.layers is not None
    assert (over.signal.layers.every, over.students[0].losses.alpha) == (2, 0.5)
