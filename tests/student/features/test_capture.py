"""What hooks take is what transformers returns, in every architecture, also under checkpointing and in packed rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student.features.capture import Capture
from stillroom.storage.errors import StudentError
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def load(folder: Path, **config: Any) -> Any:
    """A tiny student with eager attention."""
    tiny_model(folder, **config)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_maps_are_those_that_transformers_returns(arch: str, checkpointing: bool, tmp_path: Path) -> None:
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if arch == "gpt2" else {}
    model = load(tmp_path, arch=arch, layers=3, **dropout)
    capture = Capture(model, states=[0, 1, 2, 3], maps=[0, 1, 2], device=CPU)
    ids = torch.randint(0, 320, (2, 9))
    own = model(input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=True)
    expected = _gradient(model, own.hidden_states, own.attentions)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    with capture.listening() as captured:
        model(input_ids=ids, use_cache=False)
    assert sorted(captured.states) == [0, 1, 2, 3]
    assert sorted(captured.maps) == [0, 1, 2]
    for index, state in captured.states.items():
        assert torch.equal(state, own.hidden_states[index])
    for index, maps in captured.maps.items():
        assert torch.equal(maps, own.attentions[index])
    found = _gradient(model, captured.states.values(), captured.maps.values())
    assert all(torch.allclose(found[name], gradient, atol=1e-6) for name, gradient in expected.items())
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert len(captured.states) == 4, "hooks are gone with the block"


def _gradient(model: Any, states: Any, maps: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total = sum((s.square().mean() for s in states), start=torch.zeros(()))
    total = total + sum((m.square().sum() for m in maps), start=torch.zeros(()))
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_packed_row_has_the_maps_of_its_sequences_alone(tmp_path: Path) -> None:
    model = load(tmp_path).eval()
    capture = Capture(model, states=[2], maps=[0, 1], device=CPU)
    first, second = torch.randint(0, 320, (1, 5)), torch.randint(0, 320, (1, 7))
    places = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad(), capture.listening() as packed:
        model(input_ids=torch.cat([first, second], 1), position_ids=places, use_cache=False)
    for ids, part in ((first, slice(0, 5)), (second, slice(5, 12))):
        with torch.no_grad(), capture.listening() as alone:
            model(input_ids=ids, use_cache=False)
        assert torch.allclose(packed.states[2][:, part], alone.states[2], atol=1e-5)
        for index in (0, 1):
            assert torch.allclose(packed.maps[index][..., part, part], alone.maps[index], atol=1e-6)
    assert not packed.maps[0][..., 5:, :5].any()


def test_maps_with_dropout_are_refused_and_the_generators_left_alone(tmp_path: Path) -> None:
    model = load(tmp_path, arch="gpt2")
    state = torch.get_rng_state()
    with pytest.raises(StudentError, match="attn_pdrop"):
        Capture(model, states=[], maps=[1], device=CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    Capture(model, states=[1], maps=[], device=CPU)


def test_without_eager_attention_there_are_no_maps(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa")
    with pytest.raises((StudentError, ValueError), match="attention"):
        Capture(model, states=[], maps=[0], device=CPU)
