"""`key=value` words from the command line, laid over a recipe before it is validated.

Enters: a `Document` and words such as `signal.topk.k=32` or `students.0.steps=10`. Leaves: a new `Document`, the old
one untouched. Costs: a copy of the values.

A value is read as YAML (`[1, 2]`, `null`, `1e-5`, `true`). A list's items go by their number, from 0; a list is not
grown this way, but may be given whole. Whether a key exists is not judged here: validation refuses unknown keys in
one place, whether they come from the file or from the command line.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stillroom.pipeline.recipe.document import Document, KeyPath, dotted, parse_value, shown
from stillroom.storage.errors import RecipeError


def apply_overrides(document: Document, words: Sequence[str]) -> Document:
    """Raises RecipeError for a word that is no `key=value`, or whose key leads through a value without keys."""
    data = copy.deepcopy(document.data)
    given: set[KeyPath] = set()
    for word in words:
        path, value = parse_word(word)
        _set(data, path, value, word)
        given.add(path)
    return replace(document, data=data, given=frozenset(document.given | given))


def parse_word(word: str) -> tuple[KeyPath, Any]:
    """`students.0.lr=1e-5` → (("students", 0, "lr"), 1e-5)."""
    key, equals, value = word.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"command line: {word}: expected key=value, as in signal.topk.k=32 or students.0.seed=1")
    path = tuple(int(part) if part.isascii() and part.isdigit() else part for part in parts)
    return path, parse_value(value, f"command line: {key}")


def _set(data: dict[str, Any], path: KeyPath, value: Any, word: str) -> None:
    node: Any = data
    for depth, part in enumerate(path[:-1]):
        node = _child(node, part, path[:depth], word)
    _check(node, path[-1], path[:-1], word)
    node[path[-1]] = value


def _child(node: Any, part: str | int, above: KeyPath, word: str) -> Any:
    """The value under `part`; a section that the file leaves out, or empty, is begun."""
    _check(node, part, above, word)
    if isinstance(node, dict) and node.get(str(part)) is None:
        node[str(part)] = {}
    return node[part]


def _check(node: Any, part: str | int, above: KeyPath, word: str) -> None:
    if isinstance(node, list):
        if not isinstance(part, int) or part >= len(node):
            items = f"its items are 0 to {len(node) - 1}" if node else "the list is empty"
            raise RecipeError(f"command line: {word}: {dotted(above)} has no item {part}; {items}")
    elif not isinstance(node, dict):
        raise RecipeError(f"command line: {word}: {dotted(above)} is {shown(node)} and has no key {part}")
    elif isinstance(part, int):
        where = dotted(above) or "the recipe"
        raise RecipeError(f"command line: {word}: {where} is no list and has no item {part}")
