"""Validation errors as one line each: where, which key, what was expected, what was given, the nearest match.

Enters: pydantic's list of errors, the document and the model it was to become. Leaves: a `RecipeError`; pydantic's own
text of several lines never reaches the user. Costs: nothing that counts.
"""

import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stillroom.pipeline.recipe.document import Document, KeyPath, dotted, nearest, shown
from stillroom.pipeline.recipe.fields import fields_of, keys_of, meaning, models_at
from stillroom.pipeline.recipe.stages import LAYOUT
from stillroom.storage.errors import RecipeError

#: What each of pydantic's error types wanted, in the words of a recipe.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "dataclass_type": "a section with keys of its own",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
}


def refusal(error: ValidationError, document: Document, model: type[BaseModel]) -> RecipeError:
    """The first thing to put right, as one line; how many more there are stands at its end.

    Unknown keys come first: a mistyped key is also a missing one, and only the first says what happened.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_path.setdefault(_path(detail, document.data), []).append(detail)
    # A union complains once for each member: where one member got further in, the others were not meant.
    deepest = {path: found for path, found in by_path.items() if not any(_inside(other, path) for other in by_path)}
    path, details = min(deepest.items(), key=lambda item: item[1][0]["type"] != "extra_forbidden")
    line = f"{document.where(path)}: {_complaint(path, details, model)}"
    others = len(deepest) - 1
    more = f" (and {others} more to put right)" if others else ""
    return RecipeError(" ".join((line + more).split()))


def _inside(path: KeyPath, section: KeyPath) -> bool:
    return len(path) > len(section) and path[: len(section)] == section


def _path(detail: ErrorDetails, data: Any) -> KeyPath:
    """The keys that lead to the error, without pydantic's own marks for the members of a union."""
    path: KeyPath = ()
    for number, part in enumerate(detail["loc"], 1):
        absent = detail["type"] == "missing" and number == len(detail["loc"])
        if absent or (isinstance(data, dict) and part in data):
            data = None if absent else data[part]
            path = (*path, part)
        elif isinstance(data, list) and isinstance(part, int):
            data = data[part]
            path = (*path, part)
    return path


def _complaint(path: KeyPath, details: list[ErrorDetails], model: type[BaseModel]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key {dotted(path)}{_instead(path, model)}"
    if first["type"] == "missing":
        return f"{dotted(path)} is missing; expected {_meaning(path, model)}"
    if first["type"] in ("value_error", "assertion_error"):
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
        return f"{dotted(path)}: {reason}" if path else reason
    if first["type"] == "string_pattern_mismatch":  # a pattern says less than the field's own words
        return f"{dotted(path)}: expected {_meaning(path, model)}, got {shown(first['input'])}"
    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    given = first["input"]
    hint = nearest(given, _choices(details)) if isinstance(given, str) else ""
    return f"{dotted(path)}: expected {expected}, got {shown(given)}{hint}"


def _expected(detail: ErrorDetails) -> str:
    phrase = _EXPECTED.get(detail["type"])
    if phrase is None:
        return detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    bounds = {name: f"{v:g}" if isinstance(v, float) else v for name, v in detail.get("ctx", {}).items()}
    return phrase.format(**bounds).replace("'", "")


def _choices(details: list[ErrorDetails]) -> list[str]:
    """The words that a literal or an enumeration allows, out of pydantic's `'a', 'b' or 'c'`."""
    return [word for d in details for word in re.findall(r"'([^']*)'", d.get("ctx", {}).get("expected", ""))]


def _instead(path: KeyPath, model: type[BaseModel]) -> str:
    """What an unknown key may have meant: its neighbour's name, the same name in another section, or the list."""
    known = [name for section in models_at(model, path[:-1]) for name in keys_of(section)]
    known += LAYOUT if len(path) == 1 and "corpus" in known else ()
    hint = nearest(str(path[-1]), known)
    if hint:
        return hint
    elsewhere = [dotted(other) for other, _ in fields_of(model) if other[-1] == path[-1]]
    if elsewhere:
        return f" (did you mean {' or '.join(elsewhere)}?)"
    return f"; expected one of {', '.join(known)}"


def _meaning(path: KeyPath, model: type[BaseModel]) -> str:
    """The first sentence of a field's documentation, to stand after `expected`."""
    infos = [keys_of(section)[str(path[-1])] for section in models_at(model, path[:-1])]
    sentence = meaning(infos[0]).split(". ")[0].rstrip(".")
    return f"{sentence[:1].lower()}{sentence[1:]}"
