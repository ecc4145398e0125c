"""The starter that `stillroom init` writes: a recipe that runs, with every other value as a comment beside its meaning.

Enters: a model and a corpus. Leaves: a YAML file. Costs: nothing; the text is generated from the schema, and loaded
once before it is written.
"""

import json
import textwrap
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from stillroom.pipeline.recipe.document import nearest_file, parse_document
from stillroom.pipeline.recipe.fields import is_list, keys_of, meaning, models_in
from stillroom.pipeline.recipe.files import check_files, missing_model, missing_source
from stillroom.pipeline.recipe.load import validate, write_atomically
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.storage.errors import UsageError

_HEAD = """\
# A recipe for stillroom, written by `stillroom init`. What stands behind a `#` is a default; take the `#` away to
# change it. Paths are relative to the folder in which stillroom is started.
#
#   stillroom plan {path}     what the teacher's work will take
#   stillroom run {path}      all of it; started again, it continues where it stopped"""


def write_starter(path: Path, model: str, corpus: str, *, force: bool = False) -> Recipe:
    """Write a starter for this teacher and this text, and return what it says.

    Raises UsageError if the model is a path or the corpus a file that is not there, or if `path` exists and
    `force` is not given.
    """
    for what, value, missing in (("MODEL", model, missing_model), ("CORPUS", corpus, missing_source)):
        if missing(value):
            raise UsageError(f"{what}: no such file or folder: {value}{nearest_file(Path(value))}")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force overwrites it, -o FILE writes another")
    text = starter_text(path, model, corpus)
    recipe = validate(parse_document(text, str(path)))
    check_files(recipe)
    write_atomically(path, text)
    return recipe


def starter_text(path: Path, model: str, corpus: str) -> str:
    values = {
        "name": "".join(c if c.isascii() and c.isalnum() else "-" for c in path.stem).strip("-") or "first",
        "teacher": {"model": model},
        "corpus": {"sources": [{"path": corpus}]},
        "students": [{"name": "student", "model": {"cut": {"layers": _half_the_layers(model)}}}],
    }
    return "\n".join([_HEAD.format(path=path), *_section(Recipe, values, values, 0)]) + "\n"


def _section(model: type[BaseModel], values: dict[str, Any], known: dict[str, Any], depth: int) -> list[str]:
    """The lines of a section. values: what is set in it; known: the same at the top, for defaults made of it."""
    indent = "  " * depth
    lines: list[str] = []
    for key, info in keys_of(model).items():
        if depth == 0:
            lines.append("")
        lines += textwrap.wrap(meaning(info), width=110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        section = next(models_in(info.annotation), None)
        if section is None:
            plain = key in values
            shown = _scalar(values[key] if plain else _default(info, known))
            lines.append(f"{indent}{key}: {shown}" if plain else f"{indent}# {key}: {shown}")
        elif is_list(info):
            lines.append(f"{indent}{key}:")
            for item in values.get(key, []):
                lines += _item(_section(section, item, known, depth + 2), indent)
        elif key in values or (not info.is_required() and info.default is not None):
            lines.append(f"{indent}{key}:")
            lines += _section(section, values.get(key) or _started(section, info, known), known, depth + 1)
        else:
            lines.append(f"{indent}# {key}: null")
    return lines


def _started(section: type[BaseModel], info: FieldInfo, known: dict[str, Any]) -> dict[str, Any]:
    """What is set in a section of defaults: what it has in this place alone, or its first key where an empty section
    would read as null."""
    if isinstance(info.default, BaseModel) and info.default.model_fields_set:
        return {key: getattr(info.default, key) for key in sorted(info.default.model_fields_set)}
    if type(None) not in typing.get_args(info.annotation):
        return {}
    key, first = next(iter(keys_of(section).items()))
    return {key: _default(first, known)}


def _item(lines: list[str], indent: str) -> list[str]:
    """A section's lines as an item of a list: the dash goes before its first key."""
    first = next(number for number, line in enumerate(lines) if not line.lstrip().startswith("#"))
    dashed = f"{indent}  - {lines[first].lstrip()}"
    return [*lines[:first], dashed, *lines[first + 1 :]]


def _default(info: FieldInfo, known: dict[str, Any]) -> Any:
    return to_jsonable_python(info.get_default(call_default_factory=True, validated_data=known))


def _scalar(value: Any) -> str:
    """A value in YAML's one-line style."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _half_the_layers(model: str) -> int:
    """Half of a teacher's layers if it is a folder with its config at hand, else 8."""
    config = Path(model).expanduser() / "config.json"
    if not config.is_file():
        return 8
    try:
        facts = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"MODEL: {config} is not JSON: {error}") from None
    return max(int(facts.get("num_hidden_layers") or facts.get("n_layer") or 16) // 2, 1)
