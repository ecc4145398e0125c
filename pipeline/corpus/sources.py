"""Which files a source means.

Enters: a `SourceConfig` and the folder that relative paths start from. Leaves: the files in reading order, and what
was passed over. Costs: a listing; no file is opened but a saved dataset's small JSON files.
"""

import difflib
import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillroom.pipeline.corpus import python_text
from stillroom.pipeline.corpus.config import SourceConfig
from stillroom.pipeline.corpus.generations import PREFIX
from stillroom.storage.errors import RecipeError

Kind = Literal["txt", "jsonl", "jsonl.zst", "parquet", "arrow", "python", "generations"]
_ENDINGS: dict[str, Kind] = {
    ".txt": "txt", ".jsonl": "jsonl", ".jsonl.zst": "jsonl.zst", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
SUPPORTED = "a .txt, .jsonl, .jsonl.zst or .parquet file, a folder or glob of them, a saved dataset or python:NAME"


@dataclass(frozen=True)
class SourceFile:
    """One file to read. name: how reports and the manifest call it, the recipe's spelling and what lies under it."""

    path: Path
    name: str
    kind: Kind
    settings: SourceConfig


@dataclass(frozen=True)
class Passed:
    """A file in a folder or glob that is of no kind that can be read."""

    name: str


def find(settings: SourceConfig, root: Path) -> list[SourceFile | Passed]:
    """The files of a source, folders in sorted order. Raises RecipeError if there are none to read."""
    if settings.path.startswith("python:"):
        module = settings.path.removeprefix("python:")
        return [SourceFile(path, name, "python", settings) for path, name in python_text.find(module)]
    if settings.path.startswith(PREFIX):
        return [SourceFile(_verdicts(root, settings.path), settings.path, "generations", settings)]
    found: list[SourceFile | Passed] = []
    for path, name in _starting_points(settings.path, root):
        if path.is_dir():
            found.extend(_folder(path, name, settings))
        else:
            kind = _kind(path)
            if kind is None and not glob.has_magic(settings.path):
                raise RecipeError(f"corpus source {settings.path} is of no kind that can be read: give {SUPPORTED}")
            found.append(SourceFile(path, name, kind, settings) if kind else Passed(name))
    if not any(isinstance(file, SourceFile) for file in found):
        raise RecipeError(f"corpus source {settings.path} holds no file that can be read: give {SUPPORTED}")
    return found


def _verdicts(root: Path, given: str) -> Path:
    path = root / given.removeprefix(PREFIX)
    if not path.is_file():
        raise RecipeError(f"corpus source {given} is not there yet: run `stillroom generate` on the recipe first")
    return path


def _starting_points(given: str, root: Path) -> list[tuple[Path, str]]:
    path = root / Path(given).expanduser()
    if path.exists():
        return [(path, given)]
    if not glob.has_magic(given):
        raise RecipeError(f"corpus source {given} does not exist{_nearest(path)}")
    base = "" if Path(given).expanduser().is_absolute() else str(root)
    matches = sorted(glob.glob(str(Path(given).expanduser()), root_dir=base or None, recursive=True))
    if not matches:
        raise RecipeError(f"corpus source {given} matches no file{_nearest(_fixed_part(path))}")
    return [(Path(base, match), match) for match in matches if "**" not in given or not Path(base, match).is_dir()]


def _fixed_part(path: Path) -> Path:
    parts = path.parts
    magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:magic])


def _nearest(path: Path) -> str:
    """What the folder that does exist has instead of the first part that does not."""
    if path.exists():
        return ""
    parent = next(p for p in path.parents if p.is_dir())
    wanted = path.relative_to(parent).parts[0]
    close = difflib.get_close_matches(wanted, sorted(p.name for p in parent.iterdir()), n=1, cutoff=0.5)
    return f"; the closest in {parent} is {close[0]}" if close else f"; {parent} has nothing of a similar name"


def _kind(path: Path) -> Kind | None:
    return next((kind for ending, kind in _ENDINGS.items() if path.name.lower().endswith(ending)), None)


def _folder(folder: Path, name: str, settings: SourceConfig) -> Iterator[SourceFile | Passed]:
    if (folder / "dataset_dict.json").is_file():
        for split in _chosen_splits(folder, name, settings):
            yield from _dataset(folder / split, f"{name.rstrip('/')}/{split}", settings)
        return
    if (folder / "state.json").is_file():
        yield from _dataset(folder, name, settings)
        return
    for entry in sorted(folder.iterdir()):
        inner = f"{name.rstrip('/')}/{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _folder(entry, inner, settings)
        else:
            kind = _kind(entry)
            yield SourceFile(entry, inner, kind, settings) if kind else Passed(inner)


def _chosen_splits(folder: Path, name: str, settings: SourceConfig) -> tuple[str, ...]:
    there = tuple(str(split) for split in _json(folder / "dataset_dict.json", "splits"))
    chosen = settings.splits or there
    if settings.splits is None and len(there) > 1:
        raise RecipeError(
            f"corpus source {name} is a dataset of the splits {', '.join(there)}: say which to read, "
            f"for example `splits: [{there[0]}]`"
        )
    for split in chosen:
        if split not in there:
            raise RecipeError(f"corpus source {name} has no split {split}: it has {', '.join(there)}")
    return chosen


def _dataset(folder: Path, name: str, settings: SourceConfig) -> Iterator[SourceFile]:
    for entry in _json(folder / "state.json", "_data_files"):
        file = str(entry["filename"])
        if not (folder / file).is_file():
            raise RecipeError(
                f"corpus source {name} is an incomplete dataset: its state.json names {file}, which is missing"
            )
        yield SourceFile(folder / file, f"{name.rstrip('/')}/{file}", "arrow", settings)


def _json(path: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(path.read_bytes())[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path} is not what `save_to_disk` of Hugging Face datasets writes: no {key} ({error})"
        ) from error
