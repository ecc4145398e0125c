"""LoRA: small matrices beside a student's own, which alone are trained (Hu et al. 2021, arXiv 2106.09685), by `peft`.

    W x  becomes  W x + alpha / rank · B A x,     A [rank, in] random, B [out, rank] zero at first

Enters: a student, `lora` of its recipe. Leaves: the same model with layers of peft in place of the targets; after
training a plain model with the products added to its weights, and the adapter by itself. Costs: 12 bytes for each of
the rank · (in + out) numbers of a target, beside 4 for each of the frozen ones; a checkpoint holds the adapters alone.

The model stays transformers' own class with its own names, so that hooks find layers where they were. Weights that a
checkpoint lacks come from `model` of the recipe; their digest is among what a run is bound to.
"""

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stillroom.pipeline.student.run_config import LoraConfig
from stillroom.storage.errors import StudentError

#: What peft calls an adapter that is given no name.
ADAPTER = "default"


def require_peft() -> None:
    """Raises StudentError where peft is not installed."""
    if find_spec("peft") is None:
        raise StudentError("lora needs peft, which is not installed: pip install 'stillroom[lora]'")


def adapt(model: Any, config: LoraConfig, *, seed: int) -> Any:
    """The same model, its targets replaced by layers with adapters; nothing else has a gradient.

    seed: of the matrices A. Raises StudentError for targets that are not there, and for the embeddings and the head.
    """
    require_peft()
    import peft

    _require_targets(model, config)
    conv1d = any(type(module).__name__ == "Conv1D" for module in model.modules())
    asked = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha_or_default, lora_dropout=config.dropout, fan_in_fan_out=conv1d,
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        task_type="CAUSAL_LM", exclude_modules=_outside(model) if config.targets == "all-linear" else None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.inject_adapter_in_model(asked, model, adapter_name=ADAPTER)
    assert adapted is model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
    return model


def base_digest(model: Any) -> str:
    """64 hex digits over names and bytes of all parameters, before the adapters come."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def merge(model: Any) -> Any:
    """The same model with the products added to its weights, and plain layers again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    del model.peft_config
    return model


def save_adapter(model: Any, folder: Path, *, base: str | None) -> None:
    """The adapter as peft reads it, for the base at `base`; None where that is in no folder of its own: a cut."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    # peft's own models lie one module deeper; names in its files are those.
    save_file(
        {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


class Adapters:
    """The adapters of a model as a thing for a checkpoint, by their names in it."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, p) for name, p in self._model.named_parameters() if p.requires_grad)

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return dict(self.named_parameters())


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _outside(model: Any) -> list[str]:
    """Names of the embeddings and of the output head."""
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is o for o in outer)]


def _require_targets(model: Any, config: LoraConfig) -> None:
    """peft passes over a target that no module has where another is found, and adapts a head that is tied to the
    embeddings, which merging would then change as well."""
    if isinstance(config.targets, str):
        return
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    outer = _outside(model)
    choices = sorted({name.rpartition(".")[2] for name in linear if name not in outer})
    for target in config.targets:
        found = [name for name in [*linear, *outer] if name == target or name.endswith(f".{target}")]
        if not found:
            raise StudentError(
                f"lora.targets: {type(model).__name__} has no linear layer {target}; it has {', '.join(choices)}"
            )
        if set(found) & set(outer):
            raise StudentError(
                f"lora.targets: {target} is the student's embedding or output head, which stay as they are; choose "
                f"among {', '.join(choices)}"
            )
