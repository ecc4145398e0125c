"""The text of a Python package, read and never run.

Enters: a module's name, then its files. Leaves: documents: every value of the dict literals str → str at module level
(as in `pydoc_data.topics`), and every docstring. Costs: one file's syntax tree at a time.
"""

import ast
import difflib
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from stillroom.storage.errors import RecipeError

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def find(module: str) -> list[tuple[Path, str]]:
    """The source files of a module or package, sorted, each with its name. Raises RecipeError if there are none."""
    spec = _spec(module)
    if spec is None:
        raise RecipeError(f"corpus source python:{module} is not installed{_nearest(module)}")
    folders = list(spec.submodule_search_locations or [])
    if folders:
        files = [(Path(f), p) for f in folders for p in sorted(Path(f).rglob("*.py"))]
        return _some(module, [(p, f"python:{module}/{p.relative_to(f).as_posix()}") for f, p in files])
    origin = Path(spec.origin or "")
    return _some(module, [(origin, f"python:{module}")] if origin.suffix == ".py" and origin.is_file() else [])


def _some(module: str, files: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    if not files:
        raise RecipeError(
            f"corpus source python:{module} has no Python source to read: name a package written in Python"
        )
    return files


def _spec(module: str) -> ModuleSpec | None:
    """Like importlib's, which runs the parents of a dotted name to find it; this only looks where they say."""
    first, *rest = module.split(".")
    if not all(part.isidentifier() for part in [first, *rest]):
        raise RecipeError(f"corpus source python:{module}: {module!r} is not the name of a module")
    try:
        # The path first: modules that are frozen into the interpreter have their source there.
        spec = PathFinder.find_spec(first) or find_spec(first)
    except ValueError:  # what importlib says of `__main__`
        return None
    name = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _nearest(module: str) -> str:
    first = module.split(".")[0]
    names = {*sys.stdlib_module_names, *(m.name for m in pkgutil.iter_modules())}
    close = difflib.get_close_matches(first, sorted(names - {first}), n=1)
    if first in names:
        return f"; {first} is, without this part"
    return f"; the closest name is {close[0]}" if close else ""


def documents(source: bytes) -> Iterator[tuple[int, str]]:
    """Line number and text of each document, in line order. Raises SyntaxError or ValueError if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other people's escapes, which are theirs to mend
        tree = ast.parse(source)
    yield from sorted([*_dict_values(tree), *_docstrings(tree)], key=lambda found: found[0])


def _dict_values(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for statement in tree.body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or not isinstance(statement.value, ast.Dict):
            continue
        table = statement.value
        if all(_is_text(key) for key in table.keys) and all(_is_text(value) for value in table.values):
            for value in table.values:
                assert isinstance(value, ast.Constant)
                yield value.lineno, str(value.value)


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, _Documented):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text
