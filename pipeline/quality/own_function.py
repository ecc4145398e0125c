"""A user's own judgement: a Python function that a recipe names.

Enters: `module:name` or `path/file.py:name`. Leaves: a function of (prompt, response, reference) that gives a score or
a verdict. Costs: its import. It runs in the driver: only code that the recipe's writer trusts is named.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillroom.storage.errors import RecipeError, first_line

Judge = Callable[[str, str, str | None], bool | float]


def load_function(named: str) -> Judge:
    """Raises RecipeError where it cannot be imported, or is no function."""
    place, _, name = named.rpartition(":")
    try:
        module: Any = _of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(module, name)
    except Exception as error:
        raise RecipeError(f"generate.quality.function {named} cannot be imported: {first_line(error)}") from error
    if not callable(found):
        raise RecipeError(f"generate.quality.function {named} is {type(found).__name__}, expected a function")

    def judge(prompt: str, response: str, reference: str | None) -> bool | float:
        try:
            answer = found(prompt, response, reference)
        except Exception as error:
            raise RecipeError(
                f"generate.quality.function {named} failed on the prompt {prompt[:60]!r}: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
        if isinstance(answer, bool):
            return answer
        if isinstance(answer, int | float) and math.isfinite(answer):
            return float(answer)
        raise RecipeError(f"generate.quality.function {named} gave {answer!r}, expected true, false or a finite number")

    return judge


def _of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path.expanduser())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
