"""The student as training finds it: built, with its adapters, on its device, and able to read the corpus.

Enters: job, manifest, tokenizer. Leaves: a model before its first step, the same each time; RecipeError or
StudentError for one that cannot train. Costs: its weights once.
"""

from typing import Any

import torch

from stillroom.pipeline.student.config import StudentConfig, StudentJob
from stillroom.pipeline.student.forward import check_selection
from stillroom.pipeline.student.lora import adapt, base_digest
from stillroom.pipeline.student.model import build_student
from stillroom.storage.errors import StudentError
from stillroom.storage.manifest import Manifest


def prepared(
    job: StudentJob,
    manifest: Manifest,
    *,
    tokenizer: Any,
    vocabulary: int,
    longest: int,
    device: torch.device,
) -> tuple[Any, str | None]:
    """(model, digest of the weights that adapters stand beside; None where all are trained).

    vocabulary: the teacher's. longest: tokens of the longest sequence that it will read.
    """
    config, base = job.student, None
    model = build_student(
        config.model, teacher=job.teacher, tokenizer=tokenizer, expected_tokenizer=manifest.meta.tokenizer,
        vocabulary=vocabulary,
    )  # fmt: skip
    if config.lora:
        base = base_digest(model)
        model = adapt(model, config.lora, seed=config.seed)
    model = model.to(device)
    _require_length(model, longest)
    if reads_maps(config):
        model.set_attn_implementation("eager")  # the one that has maps
    check_selection(model, device=device)
    if config.gradient_checkpointing:
        # transformers renamed it between 5.19 and 5.23.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model, base


def reads_maps(config: StudentConfig) -> bool:
    """Whether any phase learns from attention maps."""
    return any("attention" in features.parts() for features in config.all_features())


def _require_length(model: Any, longest: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise StudentError(
            f"the corpus has sequences of {longest} tokens, the student reads at most {limit}: "
            f"set corpus.window to {limit} or less, or choose another student"
        )
