"""A GGUF file as a safetensors folder, made once.

Enters: a `.gguf` file. Leaves: a folder in the cache, named by the file's content. Costs: 20 s and four bytes per
weight for 135M weights; three times that in memory meanwhile.

Weights are kept in float32: Q4_1 stands for values d·q + m that bfloat16 cannot hold. Rounding them to it moves
SmolLM2-135M by KL 5.3e-5 on average and 1.1e-3 at worst (1,024 positions), as much as the store's codec adds.
"""

import contextlib
import fcntl
import importlib.util
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillroom.storage.errors import TeacherError
from stillroom.storage.files import sync_to_disk
from stillroom.workers.digests import file_sha256

#: Part of the folder's name: raise it when the recipe below gives other bytes.
RECIPE = 1


def dequantised(gguf: Path, cache_dir: Path) -> Path:
    """The folder for `gguf`, built if it is not there. Two processes at once build it once.

    Raises TeacherError if the extra `demo` is missing, the file cannot be read or the cache not written.
    """
    name = f"{gguf.stem}-{gguf.stat().st_size}-{file_sha256(gguf, cache_dir)[:16]}-{RECIPE}"
    models = cache_dir / "models"
    target = models / name
    if target.is_dir():
        return target
    absent = [module for module in ("gguf", "accelerate") if importlib.util.find_spec(module) is None]
    if absent:
        raise TeacherError(f"reading {gguf.name} needs {' and '.join(absent)}; pip install 'stillroom[demo]'")
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{name}.lock"):
            if not target.is_dir():
                _build(gguf, target)
    except OSError as error:
        raise TeacherError(
            f"cannot dequantise {gguf} into {models}: {error}; set STILLROOM_CACHE to a folder with room"
        ) from error
    return target


def _build(gguf: Path, target: Path) -> None:
    """Write beside the target and rename: a folder of that name is always whole. Called under the lock."""
    prefix = f".{target.name}."
    for left_by_a_kill in target.parent.glob(f"{prefix}*.tmp"):
        shutil.rmtree(left_by_a_kill)
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=target.parent))
    try:
        _write(gguf, folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # the writers of safetensors and temporary folders keep theirs private
            sync_to_disk(file)
        folder.chmod(0o755)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        # The reader draws a progress bar that no setting of transformers turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise TeacherError(
            f"transformers cannot read {gguf}: {str(error).splitlines()[0]}; give a safetensors folder"
        ) from error
    # The loaded model counts as quantised and refuses save_pretrained; a fresh one of its class takes its weights.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        settings.pop(key, None)
    with torch.device("meta"):
        fresh = type(loaded)(type(loaded.config).from_dict(settings))
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the system lets it go when the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
