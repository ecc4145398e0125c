"""A training run on disk: whole or not there, without pickle, and only for the run that wrote it.

    checkpoints/step-00000120/
        model.safetensors       parameters and persistent buffers, float32, tied ones once; of adapters, these alone
        optimizer.safetensors   AdamW's moments and step counts, "<parameter>:<what>"
        rng.safetensors         torch (CPU and GPUs), Python and numpy generators as tensors
        state.json              cursor and counters, what the run is bound to, the three files' sha256

Enters: model, optimizer, `Progress`. Leaves: a folder. Costs: 12 bytes a parameter, written to a temporary folder,
synced, then renamed. A folder under its final name is complete; its digests show later damage.
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillroom.pipeline.student import rng
from stillroom.pipeline.student.bindings import Bindings, require_same
from stillroom.pipeline.student.distributed import Ranks
from stillroom.pipeline.student.progress import Progress
from stillroom.pipeline.student.trainer import Trainer
from stillroom.storage.errors import StudentError
from stillroom.storage.files import sync_to_disk

VERSION = 1
PREFIX = "step-"
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


class Checkpoints:
    """Those of a run, for all its ranks: the first one writes, all read. keep_last: how many stay beside the best."""

    def __init__(self, folder: Path, *, trainer: Trainer, bindings: Bindings, keep_last: int, ranks: Ranks) -> None:
        self._folder, self._trainer, self._bindings = folder, trainer, bindings
        self._keep_last, self._ranks = keep_last, ranks

    def restore(self) -> tuple[Progress, list[str]]:
        """`load_latest` into the trainer. One rank after the other: the first sets damaged ones aside, the others then
        find what it found."""
        progress, notices = self._ranks.in_turn(
            lambda: load_latest(
                self._folder, bindings=self._bindings, model=self._trainer.kept, optimizer=self._trainer.optimizer
            )
        )
        self._trainer.scaler.restore(progress.scaler)
        return progress, notices

    def save(self, progress: Progress) -> None:
        """All ranks are here when it is written."""
        if self._ranks.first:
            save(
                self._folder, progress=progress, bindings=self._bindings, model=self._trainer.kept,
                optimizer=self._trainer.optimizer, keep_last=self._keep_last,
            )  # fmt: skip
        self._ranks.barrier()

    def back_to(self, step: int) -> tuple[Path, str | None]:
        """Put the weights after `step` steps into the trainer's model; (checkpoint, what is wrong with it or None)."""
        path = folder_of(self._folder, step)
        return path, load_weights(path, self._trainer.kept)


def save(
    folder: Path,
    *,
    progress: Progress,
    bindings: Bindings,
    model: Any,
    optimizer: torch.optim.Optimizer,
    keep_last: int,
) -> Path:
    """Write a checkpoint of this moment and remove the oldest ones beyond `keep_last`, but for the best."""
    final = folder_of(folder, progress.step)
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    generators, generator_numbers = rng.capture()
    contents = (_model_tensors(model), _optimizer_tensors(model, optimizer), generators)
    for name, tensors in zip(TENSOR_FILES, contents, strict=True):
        save_file({key: t.detach().contiguous().cpu() for key, t in tensors.items()}, temporary / name)
    state = {
        "version": VERSION,
        "progress": asdict(progress),
        "bindings": bindings,
        "rng": generator_numbers,
        "sha256": {name: _sha256(temporary / name) for name in TENSOR_FILES},
    }
    (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for name in (*TENSOR_FILES, "state.json"):
        sync_to_disk(temporary / name)
    sync_to_disk(temporary)
    if final.exists():  # the same step again, after a resume from an earlier one: equal by construction
        shutil.rmtree(final)
    temporary.rename(final)
    sync_to_disk(folder)
    for old in checkpoints(folder)[:-keep_last]:
        if progress.best is None or old != folder_of(folder, progress.best["step"]):
            shutil.rmtree(old)
    return final


def folder_of(folder: Path, step: int) -> Path:
    """The checkpoint after so many steps, whether it is there or not."""
    return folder / f"{PREFIX}{step:08d}"


def load_weights(path: Path, model: Any) -> str | None:
    """The weights of one checkpoint, and nothing else of it. Returns what is wrong with it, or None."""
    fault, _ = _inspect(path)
    if fault is None:
        _copy_model(path / "model.safetensors", model)
    return fault


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.exists():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith(PREFIX) and p.name[len(PREFIX) :].isdigit())


def load_latest(
    folder: Path, *, bindings: Bindings, model: Any, optimizer: torch.optim.Optimizer
) -> tuple[Progress, list[str]]:
    """Restore model, optimizer and generators from the newest sound checkpoint.

    Returns where the run is (a fresh `Progress` if there is no checkpoint) and notices on damaged ones that were
    passed over; those are renamed to `…​.damaged`. Raises StudentError if the run is bound to something else, naming
    it, or if there are checkpoints and none is sound.
    """
    found = checkpoints(folder)
    notices: list[str] = []
    for path in reversed(found):
        fault, state = _inspect(path)
        if fault is None:
            require_same(state["bindings"], bindings, path)
            _restore(path, state, model, optimizer)
            return Progress(**state["progress"]), notices
        damaged = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        path.rename(damaged)
        notices.append(f"checkpoint {path} is damaged ({fault}); kept as {damaged.name}, an earlier one is used")
    if found:
        raise StudentError(
            f"none of the {len(found)} checkpoints in {folder} can be read ({notices[-1]}). "
            "Remove the folder to train from the start."
        )
    return Progress(), notices


def _inspect(path: Path) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong or None, state) of a checkpoint; reads and hashes all of it."""
    try:
        state = json.loads((path / "state.json").read_text())
        for name in TENSOR_FILES:
            if _sha256(path / name) != state["sha256"][name]:
                return f"{name} is not what was written", {}
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}", {}
    if state["version"] != VERSION:
        raise StudentError(f"checkpoint {path} is of version {state['version']}, this release reads {VERSION}")
    return None, state


def _restore(path: Path, state: dict[str, Any], model: Any, optimizer: torch.optim.Optimizer) -> None:
    try:
        _copy_model(path / "model.safetensors", model)
        _copy_optimizer(path / "optimizer.safetensors", model, optimizer)
        with safe_open(path / "rng.safetensors", framework="pt") as file:
            rng.restore({key: file.get_tensor(key) for key in file.keys()}, state["rng"])  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise StudentError(f"checkpoint {path} cannot be read: {error}") from error


def _model_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers; tied parameters appear once, under their first name."""
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


@torch.no_grad()
def _copy_model(file: Path, model: Any) -> None:
    own = _model_tensors(model)
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        if names != own.keys():
            raise StudentError(
                f"{file} holds another model's tensors: {sorted(names ^ own.keys())[:3]} are in one only"
            )
        for name, tensor in own.items():
            tensor.copy_(stored.get_tensor(name))


def _optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{what}": tensor
        for parameter, moments in optimizer.state.items()
        for what, tensor in moments.items()
    }


def _copy_optimizer(file: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    own = dict(model.named_parameters())
    optimizer.state.clear()
    with safe_open(file, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118 - not a mapping
            name, _, what = key.rpartition(":")
            parameter = own[name]
            # The step count stays on the CPU, as AdamW makes it; clone: aligned memory (see model.own_memory).
            device = "cpu" if what == "step" else parameter.device
            optimizer.state[parameter][what] = stored.get_tensor(key).to(device).clone()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
