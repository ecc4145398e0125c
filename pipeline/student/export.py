"""The finished student: a Hugging Face folder and the run's result.

Enters: model, tokenizer, result. Leaves: `export/` and `result.json`, each whole or not there, in this order: with the
result there, the run is finished. Costs: one copy of the weights on disk.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from stillroom.pipeline.student.bindings import EXPORT, RESULT
from stillroom.pipeline.student.config import ModelConfig, StudentConfig
from stillroom.pipeline.student.lora import merge, save_adapter
from stillroom.pipeline.student.progress import Progress
from stillroom.storage.files import LocalFiles

#: Inside of the export.
ADAPTER_FOLDER = "adapter"


def export_model(model: Any, tokenizer: Any, run_dir: Path, *, dtype: str, adapted: ModelConfig | None = None) -> Path:
    """`save_pretrained` of both. float32 is exactly what was trained and evaluated; bfloat16 half of its size.

    adapted: where the weights of a model with adapters started. The adapters are then written to `adapter/` and merged
    into the weights, also in `model`: equal to what was trained but for rounding.
    """
    final, temporary, old = run_dir / EXPORT, run_dir / f".{EXPORT}.tmp", run_dir / f".{EXPORT}.old"
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    if adapted is not None:
        save_adapter(model, temporary / ADAPTER_FOLDER, base=adapted.from_)
        model = merge(model)
    wanted = getattr(torch, dtype)
    exported = model if wanted == torch.float32 else copy.deepcopy(model).to(wanted)
    exported.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if final.exists():  # of an earlier attempt that ended before its result was written
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return final


def result_of(
    config: StudentConfig, model: Any, progress: Progress, *, after: dict[str, Any] | None, trained: int, scaled: bool
) -> dict[str, Any]:
    """What `result.json` says of the model and of its training. after: metrics of what is exported. trained:
    parameters that were. scaled: whether the loss was, in float16."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        **({"trained_parameters": trained} if config.lora else {}),
        "layers": getattr(model.config, "num_hidden_layers", None),
        "steps": progress.step,
        "packs": progress.packs,
        "tokens": progress.tokens,
        "trained_positions": progress.trained,
        "skipped_steps": progress.skipped,
        **({"scaler_skipped": progress.scaler_skipped} if scaled else {}),
        "seconds": round(progress.seconds, 3),
        "seconds_waited": round(progress.waited, 3),
        "loss": progress.loss,
        "export_dtype": config.export_dtype,
        "before": progress.before,
        "after": after,
    }


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: where it stands, the run is finished."""
    LocalFiles(run_dir).write(RESULT, (json.dumps(result, indent=2) + "\n").encode())
