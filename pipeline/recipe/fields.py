"""A model's fields by the keys that a recipe writes: for messages, for the reference and for the starter.

Enters: a pydantic model. Leaves: its keys, sections and types as words. Costs: nothing.
"""

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stillroom.pipeline.recipe.document import KeyPath

_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by their keys: the alias where there is one (`from` is no name in Python)."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every section named in an annotation: `tuple[Student, ...]` → Student."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """The sections that may stand at a path: one, or the members of a union."""
    found = [model]
    for part in path:
        if isinstance(part, str):
            fields = [keys_of(section)[part] for section in found if part in keys_of(section)]
            found = [inner for info in fields for inner in models_in(info.annotation)]
    return found


def fields_of(model: type[BaseModel], above: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every field by its path, sections before what they hold; a list's items stand under 0."""
    for key, info in keys_of(model).items():
        path = (*above, key)
        yield path, info
        for inner in models_in(info.annotation):
            yield from fields_of(inner, (*path, 0) if is_list(info) else path)


def is_list(info: FieldInfo) -> bool:
    return typing.get_origin(info.annotation) in (list, tuple)


def meaning(info: FieldInfo) -> str:
    """A field's documentation on one line."""
    return " ".join((info.description or "").split())


def type_words(info: FieldInfo) -> str:
    """`whole number, at least 1, or null`."""
    bounds = [text for item in info.metadata if (text := _bound(item))]
    return ", ".join([_words(info.annotation), *bounds])


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        bounds = [text for item in arguments[1:] if (text := _bound(item))]
        return ", ".join([_words(arguments[0]), *bounds])
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin in (list, tuple):
        if arguments[-1] is not Ellipsis and origin is tuple:
            return f"list of {len(arguments)}: {', '.join(_words(argument) for argument in arguments)}"
        return f"list of {_words(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if hasattr(annotation, "WORDS"):
        return str(annotation.WORDS)
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bound(item: Any) -> str:
    match item:
        case annotated_types.Ge(ge=bound):
            return f"at least {bound}"
        case annotated_types.Gt(gt=bound):
            return f"more than {bound}"
        case annotated_types.Le(le=bound):
            return f"at most {bound}"
        case annotated_types.Lt(lt=bound) if not isinstance(bound, int) or bound < 2**31:
            return f"less than {bound}"
    return ""
