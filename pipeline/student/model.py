"""The student model: built from a folder, an id or a cut, and checked against the store it is to learn from.

Enters: `ModelConfig`, the teacher's folder, the store's tokenizer digest and vocabulary. Leaves: a transformers
causal LM in float32 on the device, and its tokenizer. Costs: 4 bytes a parameter; the checks read configs and
tokenizers only and come first.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stillroom.pipeline.student.config import ModelConfig
from stillroom.pipeline.student.cut import build_cut, layers_of
from stillroom.pipeline.student.features.maps import Shape, shape_of
from stillroom.storage.errors import StudentError, TokenizerMismatch, first_line
from stillroom.storage.identity import tokenizer_digest


def load_tokenizer(source: str | Path) -> Any:
    """Raises StudentError if there is no fast tokenizer at `source`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StudentError(f"no tokenizer can be loaded from {source}: {first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise StudentError(f"the tokenizer at {source} is not a fast one; what its ids mean cannot be compared")
    return tokenizer


def check_tokenizer(tokenizer: Any, *, source: str | Path, expected: str) -> None:
    """Raises TokenizerMismatch with both digests if ids mean something else than in the store."""
    digest = tokenizer_digest(tokenizer.backend_tokenizer.to_str())
    if digest != expected:
        raise TokenizerMismatch(
            f"the student's tokenizer ({source}) has digest {digest}, the store was made with {expected}: its ids mean "
            "other text. Train a student with the teacher's tokenizer (a cut has it), or this one by sequence-level "
            "distillation: `stillroom generate` with the teacher, then `stillroom train` with a recipe that has "
            f"teacher.model {source}, corpus.sources [generations:RUN/verdicts.parquet] and losses.alpha 0 "
            "(deploy/guide/generations.md)."
        )


def check_vocabulary(config: Any, *, source: str | Path, vocabulary: int) -> None:
    """Raises TokenizerMismatch if the student's head has fewer columns than the store has ids."""
    if config.vocab_size < vocabulary:
        raise TokenizerMismatch(
            f"the student ({source}) has {config.vocab_size} output columns, the store's vocabulary is {vocabulary}: "
            "it cannot say every id the teacher can. Give a student with at least as many."
        )


def check_student(
    model: ModelConfig, *, teacher: Path | None, tokenizer: Any, expected_tokenizer: str, vocabulary: int
) -> None:
    """What can be known of a student without its weights, so that a recipe is refused before its teacher has worked.

    Raises StudentError for a model or layers that are not there, TokenizerMismatch.
    """
    source = teacher if model.cut is not None else model.from_
    assert source is not None
    config = _load_config(source)
    if model.cut is not None:
        layers_of(config, Path(source), model.cut.layers)
    else:
        tokenizer = load_tokenizer(source)
    # The tokenizer first: with another one, the vocabulary's size differs as well, and says less.
    check_tokenizer(tokenizer, source=source, expected=expected_tokenizer)
    check_vocabulary(config, source=source, vocabulary=vocabulary)


def student_shape(model: ModelConfig, *, teacher: Path | None) -> Shape:
    """Of a student that `check_student` has passed, by its config alone. Raises StudentError."""
    source = teacher if model.cut is not None else model.from_
    assert source is not None
    config = _load_config(source)
    shape = shape_of(config)
    if model.cut is None:
        return shape
    return replace(shape, layers=len(layers_of(config, Path(source), model.cut.layers)))


def build_student(
    model: ModelConfig, *, teacher: Path | None, tokenizer: Any, expected_tokenizer: str, vocabulary: int
) -> Any:
    """The student in float32 on the CPU, every parameter in memory of its own.

    tokenizer: the store's, which a cut shares. Raises StudentError, TokenizerMismatch.
    """
    check_student(
        model, teacher=teacher, tokenizer=tokenizer, expected_tokenizer=expected_tokenizer, vocabulary=vocabulary
    )
    if model.cut is not None:
        assert teacher is not None
        source: str | Path = teacher
        model_class, config, tensors = build_cut(teacher, model.cut.layers)
        student, info = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
        if (teacher / "generation_config.json").exists():
            student.generation_config = GenerationConfig.from_pretrained(teacher)
    else:
        assert model.from_ is not None
        source = model.from_
        student, info = _load(source)
    _require_complete(info, source)
    return own_memory(student)


def own_memory(model: Any) -> Any:
    """Give every parameter fresh, aligned memory.

    Loading leaves views into a mapped file at odd addresses; vector kernels may round differently there, and a
    resumed run, whose tensors are elsewhere, would not be bit-equal.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def _load_config(source: str | Path) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise StudentError(f"no model config can be loaded from {source}: {first_line(error)}") from error


def _load(source: str) -> tuple[Any, dict[str, Any]]:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise StudentError(f"the student cannot be loaded from {source}: {first_line(error)}") from error
    return model, info


def _require_complete(info: dict[str, Any], source: str | Path) -> None:
    """transformers initialises what the files lack at random and goes on; a student must not start like that."""
    for what in ("missing_keys", "mismatched_keys"):
        if info[what]:
            names = sorted(str(name) for name in info[what])
            raise StudentError(
                f"the weights from {source} do not fill the student: {what.replace('_', ' ')} {', '.join(names[:3])}"
                f"{' …' if len(names) > 3 else ''} ({len(names)} in all)"
            )
