"""From a recipe file to a `Recipe`, and back.

Enters: a path and `key=value` words. Leaves: a validated `Recipe`, or one `RecipeError`. Costs: milliseconds; no
model, no corpus and no network is touched.
"""

import typing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from stillroom.pipeline.recipe.complaints import refusal
from stillroom.pipeline.recipe.document import Document, dotted, read_document, shown, to_yaml
from stillroom.pipeline.recipe.fields import is_list, keys_of, models_in, type_words
from stillroom.pipeline.recipe.files import check_files
from stillroom.pipeline.recipe.overrides import apply_overrides
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.recipe.stages import stage_documents
from stillroom.pipeline.recipe.strict import wrong_kinds
from stillroom.storage.errors import RecipeError, StoreError
from stillroom.storage.files import LocalFiles


def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, files: bool = True) -> Recipe:
    """Read, override and validate a recipe.

    files: also check that what the recipe names on this machine exists (`check_files`).
    Raises RecipeError: one line that names the place (file and line, or the command line), the key, what was
    expected and what was given, with the nearest match where there is one.
    """
    stages = stage_documents(apply_overrides(read_document(Path(path)), overrides))
    if stages[0].name:
        raise RecipeError(f"{path}: a recipe with stages: {', '.join(stage.name for stage in stages)}")
    document = stages[0].document
    recipe = validate(document)
    if files:
        check_files(recipe, document.where)
    return recipe


def validate(document: Document) -> Recipe:
    """Raises RecipeError for the first thing to put right."""
    data = _begin_empty_sections(document.data, Recipe)
    document = replace(document, data=data)
    for path, info, value in wrong_kinds(data, Recipe):
        raise RecipeError(f"{document.where(path)}: {dotted(path)}: expected {type_words(info)}, got {shown(value)}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise refusal(error, document, Recipe) from None


def save_resolved(recipe: Recipe, path: Path) -> None:
    """Write every value of a recipe as YAML, atomically; loading the file gives an equal recipe."""
    text = (
        "# The resolved recipe of a run: every value, defaults and command line included.\n"
        + to_yaml(recipe.model_dump(mode="json", by_alias=True))
    )  # fmt: skip
    write_atomically(path, text)


def write_atomically(path: Path, text: str) -> None:
    """A reader finds the old file or the new one, never half of one.

    Raises RecipeError if the folder cannot be written.
    """
    try:
        LocalFiles(path.parent).write(path.name, text.encode())
    except StoreError as error:
        raise RecipeError(str(error)) from error


def _begin_empty_sections(data: Any, model: type[BaseModel]) -> Any:
    """`ray:` with nothing under it, or only comments, is a section of defaults; `students:` is an empty list."""
    if not isinstance(data, dict):
        return data
    filled = dict(data)
    for key, info in keys_of(model).items():
        if key not in data or type(None) in typing.get_args(info.annotation):
            continue
        for section in models_in(info.annotation):
            listed = is_list(info)
            if data[key] is None:
                filled[key] = [] if listed else {}
            elif listed and isinstance(data[key], list):
                filled[key] = [_begin_empty_sections(item, section) for item in data[key]]
            elif not listed:
                filled[key] = _begin_empty_sections(data[key], section)
    return filled
