"""A teacher's weights, onto the device or the devices that run it.

Enters: a `TeacherSpec`. Leaves: a transformers model in eval mode. Costs: its weights, once; those that are quantised
pass through the host in the dtype of the forward pass first, a module at a time.

    split    what is spread                                        how
    -        nothing: one device                                   model.to(device)
    layers   blocks, over the GPUs of this process                 transformers' device_map
    tensors  each matrix, over the ranks of a process group        transformers' tp_plan; see workers/ranks.py

Quantised weights are torchao's, made when the model is loaded, through transformers; a folder may also hold weights
that are quantised already. Either is part of the identity. Embeddings and output head stay as they are.
"""

import importlib.metadata
from typing import Any

import torch
import transformers

from stillroom.storage.errors import TeacherError, first_line
from stillroom.workers.source import quiet
from stillroom.workers.teacher import TeacherSpec

#: Weights in a row or a group share a scale: int8 and fp8 a row, int4 this many.
INT4_GROUP = 128


def load(spec: TeacherSpec, device: torch.device) -> Any:
    """The spec's model. Raises TeacherError where it cannot be loaded as it is asked for."""
    options: dict[str, Any] = {}
    if spec.quantisation:
        options["quantization_config"] = _quantisation(spec.quantisation, device)
    if spec.split == "layers":
        options["device_map"] = device_map(device)
    elif spec.split == "tensors":
        options["tp_plan"] = "auto"
    try:
        with quiet():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                spec.folder,
                dtype=getattr(torch, spec.dtype),
                attn_implementation=spec.attention,
                trust_remote_code=spec.trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            model = (model if spec.split else model.to(device)).eval()
    except (OSError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        raise TeacherError(f"cannot load teacher {spec.folder}: {first_line(error)}") from error
    _require_whole(spec, info)
    if spec.split == "layers":
        _require_on_gpus(spec, model, device)
    if spec.split == "tensors":
        _require_sharded(spec, model)
    return model


def device_map(device: torch.device) -> Any:
    """What transformers takes: blocks in equal shares over the GPUs that this process sees."""
    return "balanced" if device.type == "cuda" else {"": device.type}


def input_device(model: Any, default: torch.device) -> torch.device:
    """Where token ids go: the device of the input embeddings, which in a split model is not that of the output."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return weight.device if isinstance(weight, torch.Tensor) and weight.device.type != "meta" else default


def versions(spec: TeacherSpec) -> dict[str, Any]:
    """What of the loading may shift rows within the noise band; nothing for a model on one device."""
    found: dict[str, Any] = {}
    if spec.split:
        found["split"] = spec.split if spec.split == "layers" else f"tensors over {spec.ranks} ranks"
    if spec.quantisation:
        found["torchao"] = importlib.metadata.version("torchao")
    return found


def _quantisation(kind: str, device: torch.device) -> Any:
    if kind == "int4" and device.type != "cuda":
        raise TeacherError("teacher.quantisation int4 has kernels for GPUs only: use int8 or fp8 here")
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise TeacherError(
            f"teacher.quantisation {kind} needs torchao, which is not installed: pip install stillroom[quantised]"
        ) from error
    kinds = {
        "int8": Int8WeightOnlyConfig,
        "fp8": Float8WeightOnlyConfig,
        # Tiles of torch's own kernel; the plain layout asks for another package.
        "int4": lambda: Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d"),
    }
    return transformers.TorchAoConfig(quant_type=kinds[kind]())


def _require_whole(spec: TeacherSpec, info: Any) -> None:
    missing = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
    if missing:
        raise TeacherError(
            f"teacher {spec.folder}: {len(missing)} weights are not in its files or have another shape, "
            f"e.g. {missing[0]}; transformers would fill them with random numbers; fetch the folder anew"
        )


def _require_on_gpus(spec: TeacherSpec, model: Any, device: torch.device) -> None:
    """Blocks that find no room on the GPUs would run from the host's memory or disk, at a hundredth of the speed."""
    places = getattr(model, "hf_device_map", {})
    off = sorted(name for name, place in places.items() if str(place) in ("cpu", "disk"))
    if device.type == "cuda" and off:
        raise TeacherError(
            f"teacher {spec.folder}: {len(off)} of {len(places)} parts do not fit on the {torch.cuda.device_count()} "
            f"GPUs of this actor, e.g. {off[0]}: raise ray.gpus_per_actor, or set teacher.quantisation"
        )


def _require_sharded(spec: TeacherSpec, model: Any) -> None:
    """A model without a plan is loaded whole on every rank, without a word."""
    from torch.distributed.tensor import DTensor

    if not any(isinstance(p, DTensor) for p in model.parameters()):
        raise TeacherError(
            f"teacher {spec.folder} ({type(model).__name__}) has no plan for tensor parallelism in transformers, every "
            "rank would hold it whole: use teacher.split layers"
        )
