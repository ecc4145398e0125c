"""What pydantic would convert without a word is refused: `"3"` is no number, `true` is no 1, `1` is no `true`.

Enters: plain values and the model they are to become. Leaves: nothing, or the first value of another kind. Costs: a
walk over the values.

pydantic's own strict mode also refuses a list for a tuple once a validator has touched it, so it cannot read YAML; here
only scalars are judged, and everything else is left to pydantic. A field with a validator of its own that runs before
pydantic's (a fraction, a bare path) judges for itself.
"""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from stillroom.pipeline.recipe.document import KeyPath
from stillroom.pipeline.recipe.fields import is_list, keys_of, models_in

_KINDS: dict[Any, frozenset[type]] = {
    int: frozenset({int, float}),  # pydantic takes 1e9 and refuses 1.5
    float: frozenset({int, float}),
    bool: frozenset({bool}),
    str: frozenset({str}),
    Path: frozenset({str}),
}
_SCALARS = frozenset({int, float, bool, str})


def wrong_kinds(data: Any, model: type[BaseModel], above: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo, Any]]:
    """Each scalar of a kind that its field does not take: its path, the field, the value."""
    if not isinstance(data, dict):
        return
    names = {info.alias or name: name for name, info in model.model_fields.items()}
    for key, info in keys_of(model).items():
        if key not in data or _judges_itself(model, names[key], info):
            continue
        value, path = data[key], (*above, key)
        kinds = _kinds(info.annotation)
        if type(value) in _SCALARS - kinds:
            yield path, info, value
        for section in models_in(info.annotation):
            items = value if is_list(info) and isinstance(value, list) else [value]
            for number, item in enumerate(items):
                yield from wrong_kinds(item, section, (*path, number) if is_list(info) else path)


def _kinds(annotation: Any) -> frozenset[type]:
    """The kinds of scalar that an annotation takes; all of them where pydantic will say more than we could."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal or origin in (list, tuple, dict) or any(models_in(annotation)):
        return _SCALARS
    if arguments:
        inner = arguments[:1] if origin is typing.Annotated else arguments
        return frozenset().union(*(_kinds(argument) for argument in inner if argument is not type(None)))
    return _KINDS.get(annotation, _SCALARS)


def _judges_itself(model: type[BaseModel], name: str, info: FieldInfo) -> bool:
    validators = model.__pydantic_decorators__.field_validators.values()
    return any(isinstance(item, BeforeValidator) for item in info.metadata) or any(
        validator.info.mode == "before" and name in validator.info.fields for validator in validators
    )
