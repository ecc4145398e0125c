"""What a recipe names on this machine must be there, before anything starts.

Enters: a `Recipe`. Leaves: nothing, or one `RecipeError` that names the key and the nearest match. Costs: a few stats;
no network is asked, so a Hugging Face id is taken at its word.
"""

import glob
from collections.abc import Callable, Iterator
from pathlib import Path

from stillroom.pipeline.recipe.document import KeyPath, dotted, nearest_file
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.storage.errors import RecipeError


def check_files(recipe: Recipe, where: Callable[[KeyPath], str] | None = None, *, teacher: bool = True) -> None:
    """Raises RecipeError for the first model or source that is a path and does not exist.

    where: the place in the recipe to name, `Document.where`. teacher: whether it must be there by now.
    """
    for path, value, missing in _named(recipe):
        if missing(value) and (teacher or path != ("teacher", "model")):
            place = f"{where(path)}: " if where is not None else ""
            raise RecipeError(f"{place}{dotted(path)}: no such file or folder: {value}{nearest_file(Path(value))}")


def missing_model(model: str) -> bool:
    """Whether a model is named by a path, and the path is not there.

    `org/name` may be a folder or a Hugging Face id. It counts as a path if it begins like one, has more parts than
    an id can have, or its first part is a folder here that holds something of a similar name.
    """
    path = Path(model).expanduser()
    if path.exists() or ":" in model.split("/")[0]:
        return False
    if path.is_absolute() or model.startswith(("./", "../", "~")) or len(path.parts) > 2:
        return True
    return len(path.parts) == 2 and "did you mean" in nearest_file(path)


def missing_source(source: str) -> bool:
    """Whether a corpus source is a file, folder or glob that matches nothing here."""
    if ":" in source.split("/")[0]:
        return False
    path = Path(source).expanduser()
    return not path.exists() and not any(glob.iglob(str(path), recursive=True))


def _named(recipe: Recipe) -> Iterator[tuple[KeyPath, str, Callable[[str], bool]]]:
    yield ("teacher", "model"), recipe.teacher.model, missing_model
    for number, source in enumerate(recipe.corpus.sources):
        yield ("corpus", "sources", number, "path"), source.path, missing_source
    if recipe.evaluate.lm_eval and recipe.evaluate.lm_eval.include_path:
        yield ("evaluate", "lm_eval", "include_path"), str(recipe.evaluate.lm_eval.include_path), missing_source
    for number, prompts in enumerate(recipe.generate.prompts if recipe.generate else ()):
        yield ("generate", "prompts", number, "path"), prompts.path, missing_source
    for number, student in enumerate(recipe.students):
        if student.model.from_ is not None:
            yield ("students", number, "model", "from"), student.model.from_, missing_model
