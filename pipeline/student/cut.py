"""A student cut from its teacher: the same embeddings, head and norms, fewer layers.

Enters: the teacher's folder and a choice of layers. Leaves: a config and the student's own tensors. Costs: reads
from disk only what the student keeps; the teacher as a whole is never in memory, and never on a GPU.

Nothing here knows an architecture by name: the list of layers is found in the model's skeleton (`layers` in Llama,
`h` in GPT-2, …), and the same word with a number marks a layer's tensors in the files.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from stillroom.storage.errors import StudentError

#: Lists of a config that may have as many entries as the model has layers and do not speak of layers.
NOT_PER_LAYER = re.compile(r"token_id|architectures|id2label|label2id|sections?$")


def choose_layers(wanted: int | list[int], available: int) -> list[int]:
    """Numbers of the teacher's layers: as listed, or `wanted` of them spread evenly, the first and last included.

    The ends do what no other layer does (reading embeddings, writing for the head), so they stay; a single
    layer is the first. Raises StudentError for layers that the teacher does not have.
    """
    if isinstance(wanted, int):
        if wanted > available:
            raise StudentError(f"model.cut.layers asks for {wanted} layers, the teacher has {available}")
        return [round(i * (available - 1) / max(wanted - 1, 1)) for i in range(wanted)]
    missing = [number for number in wanted if number >= available]
    if missing:
        raise StudentError(f"model.cut.layers asks for layers {missing}, the teacher has 0 … {available - 1}")
    return wanted


def cut_config(teacher: Any, layers: list[int]) -> Any:
    """The teacher's config with those layers; lists with one entry per layer (`layer_types` …) are cut alike."""
    available = teacher.num_hidden_layers
    config = copy.deepcopy(teacher)
    for key, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == available and not NOT_PER_LAYER.search(key):
            setattr(config, key, type(value)(value[number] for number in layers))
    config.num_hidden_layers = len(layers)
    return config


def layer_list_name(config: Any) -> str:
    """The attribute that holds the model's layers, such as `layers` or `h`. Raises StudentError if none does."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    names = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not names:
        raise StudentError(
            f"{type(skeleton).__name__} keeps its layers in no list of {config.num_hidden_layers} modules, so it "
            "cannot be cut. Give a student of its own with model.from."
        )
    outermost: str = min(names, key=lambda name: name.count("."))
    return outermost.rpartition(".")[2]


def cut_tensors(folder: Path, layers: list[int], list_name: str) -> dict[str, Tensor]:
    """The student's tensors by their new names, in the files' dtype, on the CPU."""
    place = {number: new for new, number in enumerate(layers)}
    pattern = re.compile(rf"(^|\.){re.escape(list_name)}\.(\d+)\.")
    tensors: dict[str, Tensor] = {}
    for file, names in _files(folder):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in names:
                new = _renumber(name, pattern, place)
                if new is not None:
                    tensors[new] = opened.get_tensor(name)
    found = {int(match[2]) for name in tensors if (match := pattern.search(name))}
    lost = [number for number, new in place.items() if new not in found]
    if lost:
        raise StudentError(f"the teacher's files in {folder} hold no tensors of layers {lost} (named `{list_name}.N.`)")
    return tensors


def _renumber(name: str, pattern: re.Pattern[str], place: dict[int, int]) -> str | None:
    """A tensor's name in the student, or None if the student does not have it."""
    match = pattern.search(name)
    if match is None:
        return name
    new = place.get(int(match[2]))
    return None if new is None else f"{name[: match.start(2)]}{new}{name[match.end(2) :]}"


def _files(folder: Path) -> Iterator[tuple[Path, Iterable[str]]]:
    """Safetensors files of a model folder with the names of their tensors."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    for file in files:
        path = folder / file
        if not path.exists():
            raise StudentError(f"teacher folder {folder} has no {file}: a cut reads safetensors only")
        with safe_open(path, framework="pt", device="cpu") as opened:
            names = list(opened.keys())
        yield path, names


def layers_of(teacher: Any, folder: Path, wanted: int | list[int]) -> list[int]:
    """`choose_layers` for a teacher's config. Raises StudentError, also if the config does not count its layers."""
    if not isinstance(getattr(teacher, "num_hidden_layers", None), int):
        raise StudentError(
            f"the config in {folder} ({teacher.model_type}) does not state num_hidden_layers; it cannot be cut"
        )
    return choose_layers(wanted, teacher.num_hidden_layers)


def build_cut(folder: Path, wanted: int | list[int]) -> tuple[Any, Any, dict[str, Tensor]]:
    """(model class, config, tensors) of the student, ready for `from_pretrained(None, …)`."""
    teacher = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    layers = layers_of(teacher, folder, wanted)
    config = cut_config(teacher, layers)
    tensors = cut_tensors(folder, layers, layer_list_name(config))
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    return model_class, config, tensors
