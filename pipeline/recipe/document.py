"""A recipe as written: YAML read into plain values, with the line on which each key stands.

Enters: a YAML file, and `key=value` words from the command line. Leaves: a `Document`: nested dicts and lists, and
for every dotted path the place to name in a message. Costs: one read of a small file.

The scalars are those of YAML 1.2's core schema, not PyYAML's 1.1: `1e-5` is a number (1.1 wants `1.0e-5`), `no` and
`on` are text (1.1: booleans), `2024-01-01` and `1:30` are text (1.1: a date, and 90). Underscores in numbers stay.
"""

import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stillroom.storage.errors import RecipeError

KeyPath = tuple[str | int, ...]

_SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", [*"~nN", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"^[-+]?(?:0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$", [*"-+0123456789"]),
    (
        "float",
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        [*"-+.0123456789"],
    ),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way: a table of the class's own)


class _Dumper(yaml.SafeDumper):
    """Quotes what either dialect would not read as text; writes a list's dashes indented; no anchors."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_PLAIN = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))

_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_SCALARS[3][1]), _SCALARS[3][2])


@dataclass(frozen=True)
class Document:
    """A recipe's plain values and where each was given.

    data: nested dicts and lists. name: the file, for messages.
    lines: line number of each key, by path. given: the paths set on the command line.
    """

    data: dict[str, Any]
    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    given: frozenset[KeyPath] = frozenset()

    def where(self, path: KeyPath) -> str:
        """`file:line`, or `command line`, of the key or of the nearest section around it."""
        if path not in self.lines and any(given[: len(path)] == path for given in self.given):
            return "command line"
        for end in range(len(path), -1, -1):
            if path[:end] in self.given:
                return "command line"
            if path[:end] in self.lines:
                return f"{self.name}:{self.lines[path[:end]]}"
        return self.name


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean …?)` for the closest of `known`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: Any) -> str:
    """A value as a message shows it, on one line of at most 60 characters."""
    text = "nothing (null)" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def read_document(path: Path) -> Document:
    """Read a recipe file.

    Raises RecipeError naming the file and line if there is none, it is not YAML, it is no mapping, or a key stands
    twice in one section.
    """
    if path.is_dir():
        raise RecipeError(f"{path}: a folder; expected a recipe file (YAML)")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = nearest_file(path)
        raise RecipeError(f"{path}: no such recipe file{hint}; `stillroom init MODEL CORPUS` writes one") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text at byte {error.start}") from None
    return parse_document(text, str(path))


def parse_document(text: str, name: str) -> Document:
    """The same for text at hand; `name` stands for the file in messages."""
    lines: dict[KeyPath, int] = {}
    data = _load(text, name, lines)
    if data is None:
        raise RecipeError(f"{name}: an empty recipe; `stillroom init MODEL CORPUS` writes a starter")
    if not isinstance(data, dict):
        raise RecipeError(f"{name}:1: expected a mapping of keys at the top, got {shown(data)}")
    return Document(data, name, lines)


def parse_value(text: str, name: str) -> Any:
    """A value given on the command line, read as YAML."""
    return _load(text, name, {})


def to_yaml(data: dict[str, Any]) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def nearest_file(path: Path) -> str:
    """`nearest` among the files beside a missing one; where its folder is missing too, says so."""
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    names = sorted(entry.name for entry in folder.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {folder / close[0]}?)" if close else ""


def _load(text: str, name: str, lines: dict[KeyPath, int]) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_odd_keys(node, name, [])
        data = loader.construct_document(node)
        _note_lines(node, (), lines)
        return data
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context).split())
        raise RecipeError(f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        raise RecipeError(f"{name}: not valid YAML: character #x{error.character:04x} at {error.position}") from None
    except ValueError as error:
        raise RecipeError(f"{name}: not valid YAML: {error}") from None


def _refuse_odd_keys(node: yaml.Node, name: str, above: list[yaml.Node]) -> None:
    """Refuse a key that stands twice, a key that is not plain text, a tag, and an anchor inside itself."""
    line = node.start_mark.line + 1
    if any(node is other for other in above):
        raise RecipeError(f"{name}:{line}: an anchor that contains itself")
    if node.tag not in _PLAIN:
        raise RecipeError(f"{name}:{line}: expected plain YAML, got a value tagged {node.tag}")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_odd_keys(item, name, [*above, node])
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag.rpartition(":")[2] not in ("str", "merge"):
            what = f"{key.value}" if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            raise RecipeError(f"{name}:{line}: expected a key that is text, got {what}")
        if key.value in seen:
            raise RecipeError(f"{name}:{line}: key {key.value} stands twice in this section, first in line "
                              f"{seen[key.value]}: remove one")  # fmt: skip
        seen[key.value] = line
        _refuse_odd_keys(value, name, [*above, node])


def _note_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    """Record each key's line. Runs after construction, when merge keys have been replaced by what they merge."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _note_lines(item, (*path, index), lines)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*path, key.value)] = key.start_mark.line + 1
            _note_lines(value, (*path, key.value), lines)
