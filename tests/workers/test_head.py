"""workers/head.py: the formula that is stored gives what the model returns, for every architecture or none."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stillroom.pipeline.student.full_logits import load_head, read_head
from stillroom.storage.calibration import head_path
from stillroom.storage.codecs.hidden import HiddenCodec
from stillroom.storage.errors import TeacherError
from stillroom.storage.files import LocalFiles
from stillroom.storage.records import Float32, HiddenSpec
from stillroom.workers.head import OutputHead, calibrate, head_bytes, output_head, save_head, steps_of
from stillroom.workers.sliced import SlicedModel
from tests.strategies import round_trip
from tests.tiny import tiny_model

CPU = torch.device("cpu")
REAL = 300  # of 320 columns: the others are padding of the head

#: Architecture → its configuration, and the (scale, soft cap, bias) that its head must be found to have.
HEADS: dict[str, tuple[dict[str, Any], tuple[float, float | None, bool]]] = {
    "llama": ({}, (1.0, None, False)),
    "qwen3": ({"tie_word_embeddings": False}, (1.0, None, False)),
    "gpt2": ({}, (1.0, None, False)),
    "gemma2": ({"final_logit_softcapping": 2.0}, (1.0, 2.0, False)),
    "gemma3_text": ({"final_logit_softcapping": 5.0}, (1.0, 5.0, False)),
    "cohere": ({"logit_scale": 3.0}, (3.0, None, False)),
    "granite": ({"logits_scaling": 0.25}, (4.0, None, False)),
    "phi": ({"tie_word_embeddings": False}, (1.0, None, True)),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 16}, (1.0, None, False)),
    "mixtral": ({"num_local_experts": 4}, (1.0, None, False)),
    "recurrent_gemma": ({"logits_soft_cap": 2.0}, (1.0, 2.0, False)),
}


def sliced(folder: Path, arch: str, dtype: torch.dtype = torch.float32, **config: Any) -> SlicedModel:
    model = tiny_model(folder, arch=arch, **config)
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        nn.init.normal_(bias)  # as made, biases are zero
    return SlicedModel(model.to(dtype), device=CPU, vocabulary=REAL)


@torch.inference_mode()
def some_hidden(model: SlicedModel) -> torch.Tensor:
    ids = torch.randint(REAL, (3, 20), generator=torch.Generator().manual_seed(7))
    return model.hidden(ids, None).flatten(0, 1)


@pytest.mark.parametrize("arch", HEADS)
def test_a_stored_head_gives_the_models_own_logits(tmp_path: Path, arch: str) -> None:
    config, (scale, softcap, biased) = HEADS[arch]
    model, files = sliced(tmp_path / "model", arch, **config), LocalFiles(tmp_path / "store")
    head = output_head(model)
    assert (head.scale, head.softcap, head.bias is not None) == (scale, softcap, biased)
    assert len(head.weight) == REAL, "padded columns are left out"

    path = save_head(files, head)
    read = load_head(files, CPU)
    assert (read.vocabulary, read.width) == tuple(head.weight.shape)
    hidden = some_hidden(model)
    own = model.logits(hidden)[:, :REAL].detach()
    assert float((read.logits(hidden) - own).abs().max()) <= 1e-5 * float(own.abs().max())
    assert path == head_path(hashlib.sha256(files.read(path)).hexdigest())


@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi"])
def test_a_head_in_bfloat16_is_the_models_but_for_its_rounding(tmp_path: Path, arch: str) -> None:
    config, form = HEADS[arch]
    model = sliced(tmp_path, arch, torch.bfloat16, **config)
    head = output_head(model)
    assert (head.scale, head.softcap, head.bias is not None) == form
    read = read_head(head_bytes(head), CPU, where="here")
    assert read.weight.dtype == torch.bfloat16
    hidden = some_hidden(model)
    own = model.logits(hidden)[:, :REAL].float().detach()
    off = float((read.logits(hidden) - own).abs().max() / own.abs().max())
    assert 0 < off <= 2.0**-7, "the model rounds its logits to bfloat16, the rebuilt ones are not"


def test_weights_take_sixteen_bits_where_that_loses_nothing(tmp_path: Path) -> None:
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    for exact in (torch.bfloat16, torch.float16):
        read = read_head(head_bytes(OutputHead(weight.to(exact).float(), weight[:, 0].clone())), CPU, where="here")
        assert read.weight.dtype == exact
        assert torch.equal(read.weight.float(), weight.to(exact).float())
        assert read.bias is not None
        assert torch.equal(read.bias, weight[:, 0])
        assert read.size_bytes == 40 * 8 * 2 + 40 * 4
    read = read_head(head_bytes(OutputHead(weight, None, 0.3, 30.0)), CPU, where="here")
    assert torch.equal(read.weight, weight)
    assert (read.bias, read.scale, read.softcap) == (None, 0.3, 30.0)


def test_equal_heads_give_equal_bytes(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    made = [output_head(sliced(tmp_path / name, "phi", tie_word_embeddings=False)) for name in ("a", "b")]
    assert made[0].weight.data_ptr() != made[1].weight.data_ptr()
    assert save_head(files, made[0]) == save_head(files, made[1])
    other = OutputHead(made[0].weight, made[0].bias, 2.0)
    assert save_head(files, other) != save_head(files, made[0])


class _Shifted(nn.Linear):
    """A head that does more than its weight shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.05 * x.mean(-1, keepdim=True) * torch.arange(self.out_features)


def test_a_head_that_is_no_such_formula_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    plain = model.get_output_embeddings()
    shifted = _Shifted(plain.weight.shape[1], plain.weight.shape[0], bias=False)
    shifted.weight = plain.weight
    model.set_output_embeddings(shifted)
    with pytest.raises(TeacherError, match="hidden tier is not available for this architecture"):
        output_head(SlicedModel(model, device=CPU, vocabulary=REAL))


class _Capped(nn.Linear):
    """A soft cap that no configuration names."""

    cap = 1e30

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(super().forward(x) / self.cap)


def test_a_cap_that_hardly_shows_in_bfloat16_is_refused(tmp_path: Path) -> None:
    """At a fifth of the cap logits are bent by less than bfloat16's rounding allows; four times as large it is seen."""
    model = tiny_model(tmp_path)
    plain = model.get_output_embeddings()
    capped = _Capped(plain.weight.shape[1], plain.weight.shape[0], bias=False)
    capped.weight = plain.weight
    model.set_output_embeddings(capped)
    made = SlicedModel(model.to(torch.bfloat16), device=CPU, vocabulary=REAL)
    assert output_head(made).softcap is None
    capped.cap = 5.0 * float(made.logits(some_hidden(made)).detach().abs().max())
    with pytest.raises(TeacherError, match="not available for this architecture"):
        output_head(made)


def test_a_scale_the_configuration_does_not_name_is_refused(tmp_path: Path) -> None:
    model = sliced(tmp_path, "cohere", logit_scale=1.01)
    assert output_head(model).scale == 1.01
    model.model.config.logit_scale = None
    with pytest.raises(TeacherError, match=r"off by 0\.0"):
        output_head(model)


def test_a_soft_cap_far_above_the_logits_is_found(tmp_path: Path) -> None:
    assert output_head(sliced(tmp_path, "gemma2", final_logit_softcapping=400.0)).softcap == 400.0


def outlying(rows: int, width: int, seed: int) -> Float32:
    """Channels of different size, a few with a mean far from zero: as final hidden states have them."""
    channels = np.random.default_rng(0)
    spread, mean = channels.lognormal(0.0, 0.4, width), channels.normal(0.0, 0.3, width)
    spread[3], mean[3], mean[5] = 12.0, 28.0, -9.0
    rng = np.random.default_rng(seed)
    return (mean + spread * rng.normal(0.0, 1.0, (rows, width))).astype(np.float32)


def test_calibration_beats_one_scale_for_all(tmp_path: Path) -> None:
    """Error of the logits, not of the channels: what the loss sees."""
    weight = np.random.default_rng(1).normal(0.0, 0.1, (500, 64)).astype(np.float32)
    hidden = outlying(400, 64, seed=2)
    made = calibrate(outlying(2000, 64, seed=3), weight)
    assert made.channel_scale.dtype == made.channel_offset.dtype == np.float32
    assert np.isclose(np.log(made.channel_scale).mean(), 0.0, atol=1e-6), "only their ratios matter"
    plain = type(made)(np.ones(64, np.float32), np.zeros(64, np.float32))

    def error(calibration: Any) -> float:
        codec = HiddenCodec(HiddenSpec(64, "int8", "ab" * 32), calibration)
        return float(((round_trip(codec, hidden) - hidden) @ weight.T).std())

    assert error(made) < 0.4 * error(plain)


def test_steps_add_the_stated_noise_to_the_logits() -> None:
    """The corpus does not matter: whatever the hidden states are, the error is the same."""
    weight = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 0, 64)
    head = OutputHead(weight, None, 0.25)
    made = steps_of(head, noise=0.01)
    dtype: Any = "int16"
    codec = HiddenCodec(HiddenSpec(64, dtype, "ab" * 32), made)
    for size in (1.0, 5.0):
        hidden = outlying(300, 64, seed=2) * np.float32(size)
        off = 0.25 * (round_trip(codec, hidden) - hidden) @ weight.numpy().T
        assert abs((off - off.mean(axis=1, keepdims=True)).std() / 0.01 - 1) < 0.05
    assert np.array_equal(steps_of(head, noise=0.01).channel_scale, made.channel_scale)
    assert not made.channel_offset.any()


def test_channels_that_never_move_still_hold_what_comes_later() -> None:
    weight = np.random.default_rng(1).normal(0.0, 0.1, (50, 4)).astype(np.float32)
    weight[:, 2] = 0.0
    hidden = outlying(100, 6, seed=2)[:, :4]
    hidden[:, 1] = 3.0
    made = calibrate(hidden, weight)
    codec = HiddenCodec(HiddenSpec(4, "int8", "ab" * 32), made)
    assert np.abs(round_trip(codec, hidden)[:, 1] - 3.0).max() < 1e-5
    assert np.isfinite(round_trip(codec, 2 * hidden)).all()
    still = calibrate(np.zeros((3, 4), np.float32), np.zeros((5, 4), np.float32))
    assert np.array_equal(still.channel_scale, np.ones(4, np.float32))


@pytest.mark.parametrize("hidden", [np.zeros((0, 4), np.float32), np.full((2, 4), np.nan, np.float32)])
def test_calibration_needs_finite_positions(hidden: Float32) -> None:
    with pytest.raises(ValueError, match="N ≥ 1"):
        calibrate(hidden, np.ones((5, 4), np.float32))
