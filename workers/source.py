"""Where a teacher's files come from.

Enters: what a recipe calls a teacher: a folder, a `.gguf` file, `package:NAME` or a Hugging Face id. Leaves: a folder
with config.json, safetensors and a tokenizer. Costs: nothing for a folder; a dequantisation once (20 s and four bytes
per weight for 135M weights); a download once, kept in the hub's own cache.
"""

import difflib
import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from stillroom.storage.errors import TeacherError, first_line
from stillroom.storage.remote.cache import cache_folder as cache_folder
from stillroom.workers.dequantise import dequantised
from stillroom.workers.digests import weight_files

#: What a teacher needs of a hub repository: weights, settings, tokenizer; code runs only with trust_remote_code.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve_model(reference: str, *, cache_dir: Path | None = None) -> Path:
    """The folder of a model.

    reference: a folder; a `.gguf` file or `package:NAME` (an installed distribution that ships one), which is
        dequantised once into the cache; or a Hugging Face id, `org/name` or `org/name@revision`.
    cache_dir: default `cache_folder()`. Hub downloads go to the hub's own cache.

    Raises TeacherError with the remedy.
    """
    cache = cache_dir or cache_folder()
    if reference.startswith("package:"):
        return _dequantised(_gguf_of_package(reference.removeprefix("package:").strip()), cache)
    path = Path(reference).expanduser()
    if path.is_dir():
        weight_files(path)
        return path.absolute()
    if path.suffix == ".gguf" or reference.startswith((".", "/", "~")):
        if not path.is_file() or path.suffix != ".gguf":
            raise TeacherError(f"teacher {reference}: there is no such model folder or .gguf file; correct the path")
        return _dequantised(path.absolute(), cache)
    return _from_hub(reference)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's fast tokenizer. Raises TeacherError if it has none."""
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TeacherError(f"{folder} has no tokenizer that transformers can load: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise TeacherError(
            f"{folder} has a slow tokenizer ({type(tokenizer).__name__}), expected one with tokenizer.json; "
            "its digest and offsets come from there, convert it with transformers' convert_slow_tokenizer"
        )
    return tokenizer


def positions_of(folder: Path, *, trust_remote_code: bool = False) -> int | None:
    """How many tokens the folder's model reads at once, by its config; None where that says nothing.

    Raises TeacherError if transformers does not know the model.
    """
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TeacherError(f"{folder} has a config.json that transformers cannot use: {first_line(error)}") from error
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers inside; errors still come as exceptions."""
    messages = transformers.utils.logging
    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.CRITICAL)
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()


def _dequantised(gguf: Path, cache: Path) -> Path:
    with quiet():
        return dequantised(gguf, cache)


def _gguf_of_package(name: str) -> Path:
    """The one .gguf file of an installed distribution, found by its file list; nothing of it is imported."""
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise TeacherError(
            f"teacher package:{name}: no such distribution is installed{_nearest(name)}; correct the name or install it"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise TeacherError(f"teacher package:{name} ships {len(found)} .gguf files, expected 1; name the file itself")
    return found[0]


def _nearest(name: str) -> str:
    """Never a hint to install what was mistyped: somebody may have registered just that."""
    installed = {str(each.metadata["Name"]) for each in importlib.metadata.distributions() if each.metadata["Name"]}
    near = difflib.get_close_matches(name, sorted(installed), 1, 0.8)
    return f" (did you mean {near[0]}?)" if near else ""


def _from_hub(reference: str) -> Path:
    name, _, revision = reference.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_PATTERNS))
    except HFValidationError as error:
        raise TeacherError(
            f"teacher {reference!r} is no folder here and no Hugging Face id (org/name); correct one or the other"
        ) from error
    except OSError as error:  # every error of the hub is one, a missing network and a missing repository alike
        raise TeacherError(
            f"teacher {reference} is neither a folder here nor in the hub's cache, and could not be fetched "
            f"({first_line(error)}); check the name, or fetch it where there is a network and give the folder"
        ) from error
    weight_files(folder)
    return folder
