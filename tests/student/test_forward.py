"""Logits at single positions, and sequences kept apart: on real architectures, good ones and bad ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stillroom.pipeline.student.collate import collate
from stillroom.pipeline.student.forward import check_selection, logits_at, model_inputs
from stillroom.pipeline.student.packing import check_packing, segments_of
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
