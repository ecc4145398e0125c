"""Students from folders and cuts, and the ones that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.student.config import ModelConfig
from stillroom.pipeline.student.cut import choose_layers, cut_config, layer_list_name
from stillroom.pipeline.student.model import build_student
from stillroom.storage.errors import StudentError, TokenizerMismatch
from stillroom.storage.identity import tokenizer_digest
from tests.tiny import tiny_model, tiny_teacher, tiny_tokenizer

ARCHITECTURES = ["llama", "qwen3", "gpt2", "gemma3_text"]
IDS = torch.tensor([[5, 9, 30, 7, 60, 11]])


def build(model: dict[str, Any], teacher: Path, *, vocabulary: int | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    return build_student(
        ModelConfig.model_validate(model),
        teacher=teacher,
        tokenizer=tokenizer,
        expected_tokenizer=tokenizer_digest(tokenizer.backend_tokenizer.to_str()),
        vocabulary=vocabulary or len(tokenizer),
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize(
    ("wanted", "available", "chosen"),
    [
        (1, 30, [0]),
        (2, 30, [0, 29]),
        (10, 30, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]),
        (4, 4, [0, 1, 2, 3]),
        ([1, 3], 4, [1, 3]),
    ],
)
def test_layers_are_spread_with_both_ends(wanted: int | list[int], available: int, chosen: list[int]) -> None:
    assert choose_layers(wanted, available) == chosen


@pytest.mark.parametrize("wanted", [5, [0, 4]])
def test_layers_that_the_teacher_lacks_are_refused(wanted: int | list[int], tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path, layers=4)
    with pytest.raises(StudentError, match="the teacher has"):
        build({"cut": {"layers": wanted}}, teacher)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cut_of_all_layers_is_the_teacher(arch: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path, arch=arch, layers=3)
    original = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    assert torch.equal(logits(build({"cut": {"layers": 3}}, teacher)), logits(original))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cut_is_the_teacher_with_the_other_layers_taken_out(arch: str, tmp_path: Path) -> None:
    extra: dict[str, Any] = (
        {"layer_types": ["sliding_attention", "full_attention"] * 2} if arch == "gemma3_text" else {}
    )
    teacher = tiny_teacher(tmp_path, arch=arch, layers=4, **extra)
    student = build({"cut": {"layers": [0, 3]}}, teacher)
    original = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layers = original.get_decoder()
    name = layer_list_name(student.config)
    stack = getattr(layers, name)
    setattr(layers, name, torch.nn.ModuleList([stack[0], stack[3]]))
    for position, layer in enumerate(getattr(layers, name)):
        attention = getattr(layer, "self_attn", None) or layer.attn
        attention.layer_idx = position
    original.config = layers.config = cut_config(original.config, [0, 3])
    assert torch.equal(logits(student), logits(original))
    assert student.config.num_hidden_layers == 2
    if extra:
        assert student.config.layer_types == ["sliding_attention", "full_attention"]


def test_a_cut_reads_only_what_it_keeps(tmp_path: Path) -> None:
    """A layer's tensors missing from a sharded teacher hurt only the cut that wants them."""
    teacher = tiny_teacher(tmp_path, layers=3)
    tensors = load_file(teacher / "model.safetensors")
    (teacher / "model.safetensors").unlink()
    parts = {
        "a.safetensors": {k: t for k, t in tensors.items() if ".layers." not in k},
        "b.safetensors": {k: t for k, t in tensors.items() if ".layers.0." in k or ".layers.2." in k},
    }
    for file, part in parts.items():
        save_file(part, teacher / file)
    index = {"weight_map": {key: file for file, part in parts.items() for key in part}}
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    assert build({"cut": {"layers": 2}}, teacher).config.num_hidden_layers == 2
    with pytest.raises(StudentError, match=r"no tensors of layers \[1\]"):
        build({"cut": {"layers": [0, 1]}}, teacher)


def test_lists_as_long_as_the_model_is_deep_are_not_all_per_layer() -> None:
    config = AutoConfig.for_model("qwen3", num_hidden_layers=2, eos_token_id=[1, 2], layer_types=["full_attention"] * 2)
    cut = cut_config(config, [1])
    assert cut.eos_token_id == [1, 2]
    assert cut.layer_types == ["full_attention"]
    assert config.num_hidden_layers == 2


def test_an_untied_and_padded_head_is_kept(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path, layers=2, padded=7, tie_word_embeddings=False)
    student = build({"cut": {"layers": 1}}, teacher)
    assert student.lm_head.weight is not student.model.embed_tokens.weight
    assert torch.equal(student.lm_head.weight, load_file(teacher / "model.safetensors")["lm_head.weight"])


def test_parameters_have_aligned_memory_of_their_own_and_ties_stay(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path, layers=2)
    for model in ({"cut": {"layers": 2}}, {"from": str(teacher)}):
        student = build(model, teacher)
        assert all(p.data_ptr() % 64 == 0 and p.dtype == torch.float32 for p in student.parameters())
        assert student.lm_head.weight is student.model.embed_tokens.weight


def test_another_tokenizer_is_refused_with_both_digests(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    other = tiny_teacher(tmp_path / "other", vocabulary=300)
    with pytest.raises(TokenizerMismatch, match="sequence-level distillation") as caught:
        build({"from": str(other)}, teacher, vocabulary=290)
    digests = {tokenizer_digest((folder / "tokenizer.json").read_text()) for folder in (teacher, other)}
    assert all(digest in str(caught.value) for digest in digests)


def test_a_head_smaller_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    tiny_tokenizer(tmp_path / "small")
    tiny_model(tmp_path / "small", vocabulary=100)
    with pytest.raises(TokenizerMismatch, match="has 100 output columns"):
        build({"from": str(tmp_path / "small")}, teacher)


def test_a_folder_without_weights_or_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    (tmp_path / "bare").mkdir()
    AutoConfig.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
    with pytest.raises(StudentError, match="no tokenizer can be loaded") as caught:
        build({"from": str(tmp_path / "bare")}, teacher)
    assert "\n" not in str(caught.value)
    tiny_tokenizer(tmp_path / "bare")
    with pytest.raises(StudentError, match="cannot be loaded"):
        build({"from": str(tmp_path / "bare")}, teacher)
    with pytest.raises(StudentError, match="no model config"):
        build({"from": str(tmp_path / "nowhere")}, teacher)


def test_weights_with_holes_are_refused_and_not_made_up(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path)
    tensors = load_file(teacher / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    for model in ({"from": str(teacher)}, {"cut": {"layers": 2}}):
        with pytest.raises(StudentError, match=r"missing keys model\.layers\.1\.mlp\.up_proj"):
            build(model, teacher)
