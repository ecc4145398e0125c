"""Logits at single positions, and sequences kept apart: on real architectures, good ones and bad ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stillroom.pipeline.student.collate import collate
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.forward import check_selection, hidden_at, logits_at, model_inputs, student_head
from stillroom.pipeline.student.losses import StudentHead
from stillroom.pipeline.student.packing import check_packing, segments_of
from stillroom.pipeline.student.trainer import choose_head
from stillroom.storage.errors import PackingUnsafe, StudentError
from stillroom.storage.records import Pack, Sequence
from tests.student.world import pack_of
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def packs(*lengths: tuple[int, ...]) -> list[Pack]:
    generator = np.random.default_rng(0)
    return [
        pack_of([Sequence(generator.integers(3, 90, n).astype(np.int32)) for n in row], None, window=40)
        for row in lengths
    ]


def random_model(arch: str, **config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, vocab_size=96, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
       "word_embed_proj_dim": 32, "max_position_embeddings": 64}  # fmt: skip
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_logits_at_positions_are_the_models_own(arch: str, tmp_path: Path) -> None:
    extra: dict[str, Any] = {"final_logit_softcapping": 3.0} if arch == "gemma3_text" else {}
    model = tiny_model(tmp_path, arch=arch, vocabulary=96, **extra)
    check_selection(model, device=CPU)
    batch = collate(packs((9, 5, 12), (20,)), packing=True, temperature=1.0, vocabulary=96)
    with torch.no_grad():
        own_MV = model(**model_inputs(batch)).logits[batch.keep]
        selected_MV = logits_at(model, batch)
    assert selected_MV.shape == (23 + 19, 96)
    assert torch.allclose(selected_MV, own_MV, atol=1e-4 * float(own_MV.abs().max()))
    if extra:
        assert selected_MV.abs().max() <= 3.0


def test_a_head_that_mixes_positions_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, vocabulary=96)

    embeddings: torch.Tensor = model.model.embed_tokens.weight

    class Mixing(torch.nn.Module):
        def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
            mixed: torch.Tensor = hidden_BTD - hidden_BTD.mean(-2, keepdim=True)
            return mixed @ embeddings.T

    model.lm_head = Mixing()
    with pytest.raises(StudentError, match="differ from the model's own"):
        check_selection(model, device=CPU)


def test_weights_that_are_no_numbers_are_told_at_once(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, vocabulary=96)
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
        model.model.norm.weight[3] = torch.inf
    with pytest.raises(StudentError, match="NaN or infinite logits before its first step"):
        check_selection(model, device=CPU)


HEADS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "gpt2": {}, "gemma3_text": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25}, "granite": {"logits_scaling": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("arch", HEADS)
def test_a_head_is_known_as_a_formula(arch: str, tmp_path: Path) -> None:
    """Scales and soft caps too: the formula on what the head is given is what the model itself says."""
    model = tiny_model(tmp_path, arch=arch, vocabulary=96, **HEADS[arch]).train()
    head = student_head(model, device=CPU)
    assert isinstance(head, StudentHead)
    assert head.weight is model.get_output_embeddings().weight, "the parameter itself, so that a tied one stays one"
    assert model.training
    expected = (1.0, 3.0) if arch == "gemma3_text" else ({"cohere": 0.25, "granite": 0.25}.get(arch, 1.0), None)
    assert (head.scale, head.softcap) == expected
    model.eval()
    batch = collate(packs((9, 5, 12), (20,)), packing=True, temperature=1.0, vocabulary=96)
    with torch.no_grad():
        hidden_MD, own_MV = hidden_at(model, batch), logits_at(model, batch)
    assert torch.allclose(head.logits(hidden_MD), own_MV, atol=1e-4 * float(own_MV.abs().max()))


def test_the_head_runs_on_no_position_where_hidden_states_are_asked_for(tmp_path: Path) -> None:
    model, rows = tiny_model(tmp_path, vocabulary=96), []
    model.lm_head.register_forward_hook(lambda _head, _args, logits: rows.append(logits.numel()))
    batch = collate(packs((9, 5)), packing=True, temperature=1.0, vocabulary=96)
    hidden_at(model, batch).sum().backward()
    assert rows == [0]
    assert model.model.norm.weight.grad is not None


def test_where_there_is_no_formula_the_plain_form_is_used_and_said(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, vocabulary=96)

    def chosen(fused: bool | str) -> tuple[StudentHead | None, str]:
        settings = {"name": "a", "model": {"from": "x"}, "losses": {"fused": fused}}
        return choose_head(model, StudentConfig.model_validate(settings), CPU)

    assert "fused, in slices" in chosen("auto")[1]
    head, said = chosen(False)
    assert head is None
    assert "losses.fused is false" in said
    model.lm_head = torch.nn.Sequential(model.lm_head)
    head, said = chosen("auto")
    assert head is None
    assert "plain form (LlamaForCausalLM: its output head is a Sequential" in said
    with pytest.raises(StudentError, match=r"losses\.fused is true, but LlamaForCausalLM"):
        chosen(True)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_packing_is_safe_where_positions_isolate(arch: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, arch=arch, vocabulary=96)
    assert check_packing(model, packs((9, 5, 12))[0], device=CPU) < 1e-4


@pytest.mark.parametrize(("arch", "config"), [("opt", OPT), ("bloom", BLOOM)])
def test_packing_is_refused_where_sequences_see_each_other(arch: str, config: dict[str, Any]) -> None:
    with pytest.raises(PackingUnsafe, match="packing: false"):
        check_packing(random_model(arch, **config), packs((9, 5, 12))[0], device=CPU)


def test_a_pack_of_one_sequence_is_checked_by_its_halves() -> None:
    (only,) = packs((9,))
    assert [len(s) for s in segments_of(only)] == [4, 5]
    with pytest.raises(PackingUnsafe):
        check_packing(random_model("opt", **OPT), only, device=CPU)
    assert [len(s) for s in segments_of(packs((1,))[0])] == [1, 1]


@pytest.mark.parametrize(("arch", "config"), [("opt", OPT), ("bloom", BLOOM)])
def test_without_packing_padding_changes_nothing(arch: str, config: dict[str, Any]) -> None:
    model = random_model(arch, **config)
    rows = packs((9,), (20,))
    together = collate(rows, packing=False, temperature=1.0, vocabulary=96)
    alone = [collate([row], packing=False, temperature=1.0, vocabulary=96) for row in rows]
    with torch.no_grad():
        expected_MV = torch.cat([model(input_ids=one.input_ids).logits[one.keep] for one in alone])
        got_MV = logits_at(model, together)
    assert torch.allclose(got_MV, expected_MV, atol=1e-4 * float(expected_MV.abs().max()))
