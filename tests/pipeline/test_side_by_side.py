"""Which GPUs students get that train at once."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.side_by_side import _seats
from stillroom.storage.errors import RecipeError


def recipe_of(folder: Path, *devices: str, **train: Any) -> Recipe:
    students = [
        {"name": f"s{number}", "model": {"cut": {"layers": 1}}, "device": device}
        for number, device in enumerate(devices)
    ]
    return Recipe.model_validate(
        {
            "name": "test", "run_dir": str(folder / "run"), "teacher": {"model": "teacher"}, "students": students,
            "corpus": {"sources": ["corpus.jsonl"]}, "train": train,
        }
    )  # fmt: skip


def seats(recipe: Recipe, *visible: str) -> list[str | None]:
    return _seats(recipe, recipe.students, lambda: list(visible))


def test_each_gets_gpus_of_its_own(tmp_path: Path) -> None:
    three = recipe_of(tmp_path, "auto", "cuda", "auto", side_by_side=2)
    assert seats(three, "4", "5", "6") == ["4", "5"]
    assert seats(three) == [None, None], "no GPU here: they share the CPU"
    pairs = recipe_of(tmp_path, "auto", "auto", side_by_side=8, processes=2)
    assert seats(pairs, "0", "1", "2", "3") == ["0,1", "2,3"]
    with pytest.raises(RecipeError, match="side_by_side is 2, of 2 GPUs each; this machine has 3"):
        seats(pairs, "0", "1", "2")


def test_what_the_recipe_names_is_left_alone(tmp_path: Path) -> None:
    assert seats(recipe_of(tmp_path, "cuda:0", "cuda:1", side_by_side=2), "0", "1") == [None, None]
    assert seats(recipe_of(tmp_path, "cpu", "cpu", side_by_side=2), "0") == [None, None]


def test_one_at_a_time_beside_the_teachers(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="leave one of both out"):
        recipe_of(tmp_path, "cpu", side_by_side=2, read_through=True)
