"""Layers and attention maps that are captured are what transformers returns, whatever the batch, and a store of them is
as whole as any other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stillroom.storage.care.verify import verify_store
from stillroom.storage.catalog.inspect import inspect_store
from stillroom.storage.errors import BadLogits, TeacherError
from stillroom.storage.identity import Identity
from stillroom.storage.records import (
    AttentionSpec,
    HiddenSpec,
    LayersSpec,
    Receipt,
    SampledSpec,
    Sequence,
    Signal,
    SignalSpec,
    TopKSpec,
)
from stillroom.storage.shard import write_shard
from stillroom.storage.store import create_store
from stillroom.workers.hooks import Hooks
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.strategies import unit_of
from tests.tiny import tiny_teacher

BLOCKS, HEADS = 3, 4
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "gemma3_text": {},  # its embeddings are scaled, its windows slide
    "gemma2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "mixtral": {"num_local_experts": 4},
    "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # its rows have a sink, and sum to less than 1
}
Folder = Callable[..., Path]
LAYERS = LayersSpec(tuple(range(BLOCKS + 1)), 32, "float32")
PER_HEAD = AttentionSpec(tuple(range(BLOCKS)), 256, "per_head", HEADS, "float32")
MEAN = AttentionSpec(tuple(range(BLOCKS)), 256, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Tiny teachers, each made once."""
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            options = ARCHITECTURES[arch]
            made[arch] = tiny_teacher(tmp_path_factory.mktemp(arch), arch=arch, layers=BLOCKS, **options)
        return made[arch]

    return make


def load(folder: Path, **options: Any) -> TorchTeacher:
    defaults: dict[str, Any] = {"device": "cpu", "threads": 1, "attention": "eager", "batch_tokens": 64}
    return TorchTeacher(TeacherSpec(folder=folder, **(defaults | options)))


def sequences(vocabulary: int) -> list[Sequence]:
    rng = np.random.default_rng(0)
    shapes = zip((40, 7, 1, 23, 23, 2), (0, 3, 0, 10, 0, 1), strict=True)
    return [Sequence(rng.integers(0, vocabulary, length).astype(np.int32), context) for length, context in shapes]


@torch.inference_mode()
def own(folder: Path, sequence: Sequence) -> tuple[Any, Any]:
    """What transformers returns of one document alone: [R, L + 1, D] and [L, H, R, T]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids_1T = torch.from_numpy(sequence.input_ids.astype(np.int64))[None]
    out = model(ids_1T, attention_mask=torch.ones_like(ids_1T), output_hidden_states=True, output_attentions=True)
    first = sequence.first_position
    states_RnD = np.stack([states[0, first:].numpy() for states in out.hidden_states], axis=1)
    return states_RnD, np.stack([maps[0, :, first:].numpy() for maps in out.attentions])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_are_the_hidden_states_of_transformers(folder: Folder, arch: str) -> None:
    """Of sdpa, which a teacher runs by itself: the states are those of eager to float32's last bits."""
    teacher = load(folder(arch), attention=None)
    asked = sequences(teacher.vocabulary)
    for order in (range(6), (5, 2, 0, 4, 1, 3)):
        blocks = teacher.score([asked[i] for i in order], signal=SignalSpec(layers=LAYERS))
        for i, block in zip(order, blocks, strict=True):
            states, _ = own(folder(arch), asked[i])
            assert block.layers is not None
            assert block.layers.shape == (asked[i].rows, BLOCKS + 1, 32)
            assert block.layers.dtype == np.float32
            np.testing.assert_allclose(block.layers, states, atol=2e-6 * np.abs(states).max())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_maps_are_those_of_transformers(folder: Folder, arch: str) -> None:
    """Per head, and averaged."""
    teacher = load(folder(arch))
    asked = sequences(teacher.vocabulary)
    for order in (range(6), (5, 2, 0, 4, 1, 3)):
        for spec in (PER_HEAD, MEAN):
            blocks = teacher.score([asked[i] for i in order], signal=SignalSpec(attention=spec))
            for i, block in zip(order, blocks, strict=True):
                _, maps_nHRT = own(folder(arch), asked[i])
                if spec is MEAN:
                    maps_nHRT = maps_nHRT.mean(axis=1, keepdims=True)
                assert block.attention is not None
                assert block.attention.widths[0] == asked[i].first_position + 1
                np.testing.assert_allclose(block.attention.dense(), maps_nHRT, atol=1e-6)


@torch.inference_mode()
def test_of_one_batch_they_are_bit_equal(folder: Folder) -> None:
    """Nothing is added to what the modules give, and what is not asked for is left out."""
    teacher = load(folder("llama"))
    asked = [s for s in sequences(teacher.vocabulary) if len(s.input_ids) == 23]
    model = AutoModelForCausalLM.from_pretrained(folder("llama"), attn_implementation="eager").eval()
    ids_BT = torch.from_numpy(np.stack([s.input_ids for s in asked]).astype(np.int64))
    out = model(ids_BT, output_hidden_states=True, output_attentions=True)
    spec = SignalSpec(layers=replace(LAYERS, layers=(0, 2, 3)), attention=replace(PER_HEAD, layers=(1,)))
    for i, block in enumerate(teacher.score(asked, signal=spec)):
        first = asked[i].first_position
        assert block.layers is not None
        assert block.attention is not None
        for at, layer in enumerate((0, 2, 3)):
            np.testing.assert_array_equal(block.layers[:, at], out.hidden_states[layer][i, first:].numpy())
        np.testing.assert_array_equal(block.attention.dense()[0], out.attentions[1][i, :, first:].numpy())


def test_bfloat16_is_what_the_teacher_computed(folder: Folder) -> None:
    """Rounded before they leave the device, and the codec then has nothing to round."""
    asked = sequences(300)
    rough = load(folder("llama"), dtype="bfloat16").score(asked, signal=SignalSpec(layers=LAYERS))
    kept = load(folder("llama"), dtype="bfloat16").score(
        asked, signal=SignalSpec(layers=replace(LAYERS, dtype="bfloat16"))
    )
    for one, other in zip(rough, kept, strict=True):
        np.testing.assert_array_equal(one.layers, other.layers)
        assert one.layers is not None
        assert (one.layers.view(np.uint32) & 0xFFFF == 0).all()


def test_the_other_parts_are_the_same_with_and_without(folder: Folder) -> None:
    teacher = load(folder("qwen3"))
    asked = sequences(teacher.vocabulary)
    parts = SignalSpec(TopKSpec(8), SampledSpec(20), HiddenSpec(32, "bfloat16"))
    alone = Signal.concatenate(teacher.score(asked, signal=parts))
    together = Signal.concatenate(teacher.score(asked, signal=replace(parts, layers=LAYERS, attention=MEAN)))
    assert len(together) == sum(s.rows for s in asked)
    assert alone.topk is not None
    assert together.topk is not None
    assert alone.sampled is not None
    assert together.sampled is not None
    for name in ("ids", "logits", "tail_lse"):
        np.testing.assert_array_equal(getattr(together.topk, name), getattr(alone.topk, name))
    np.testing.assert_array_equal(together.sampled.counts, alone.sampled.counts)
    np.testing.assert_array_equal(together.hidden, alone.hidden)
    assert together.layers is not None
    np.testing.assert_array_equal(together.layers[:, -1], alone.hidden, "the last layer is the final hidden state")


def test_no_hook_stays_behind(folder: Folder) -> None:
    teacher = load(folder("llama"))
    spec = SignalSpec(layers=LAYERS, attention=MEAN)
    asked = sequences(teacher.vocabulary)
    teacher.score(asked, signal=spec)  # the probe leaves those of transformers, which do nothing unless they are asked
    assert teacher._model is not None

    def count() -> int:
        modules = teacher._model.body.modules() if teacher._model else ()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = count()
    teacher.score(asked, signal=spec)
    with pytest.raises(TeacherError, match="asks for layer 9"):
        teacher.score(asked, signal=SignalSpec(layers=replace(LAYERS, layers=(1, 9))))
    assert count() == before


def test_a_store_of_every_part_is_whole(folder: Folder, tmp_path: Path) -> None:
    """Scored, written, committed, read back within the bounds, verified, and told in words and bytes."""
    teacher = load(folder("llama"))
    spec = SignalSpec(
        TopKSpec(8), SampledSpec(20), None, LayersSpec((0, 2), 32), AttentionSpec((0, 2), 64, "per_head", HEADS)
    )
    store = create_store(str(tmp_path / "store"), Identity(teacher="tiny", signal=spec, **teacher.identity_parts()))
    asked = sequences(teacher.vocabulary)
    store.save_plan([unit_of(asked[:4]), unit_of(asked[4:])])
    for part in (asked[:4], asked[4:]):
        unit, blocks = unit_of(part), teacher.score(part, signal=spec)
        ref = write_shard(store.files, store.identity, unit, part, blocks, teacher.provenance(part))
        assert write_shard(store.files, store.identity, unit, part, blocks, teacher.provenance(part)) == ref
        store.commit([Receipt(ref, len(part), sum(unit.tokens), sum(unit.rows), 1, 0.0)])

    found = {stored.sequence.digest: stored.signal for stored in store.sequences()}
    exact = SignalSpec(layers=replace(LAYERS, layers=(0, 2)), attention=replace(PER_HEAD, layers=(0, 2)))
    for sequence, block in zip(asked, teacher.score(asked, signal=exact), strict=True):
        stored = found[sequence.digest]
        assert stored is not None
        assert stored.layers is not None
        assert stored.attention is not None
        assert block.layers is not None
        assert block.attention is not None
        assert (np.abs(stored.layers - block.layers) <= 2.0**-8 * np.abs(block.layers) + 1e-5).all()
        assert stored.attention.widths.tolist() == block.attention.widths.tolist()
        assert np.abs(stored.attention.values - block.attention.values).max() <= 1 / 250
    assert verify_store(store.uri)["problems"] == []
    told = inspect_store(store.uri)
    assert told["signal"] == (
        "top-8 (1/8 nat) + 20 draws + layers 0,2 bfloat16 (32) + attention 0,2 (uint8, 4 heads, up to 64 tokens)"
    )
    assert {"layer_0", "layer_2", "attention_0", "attention_2", "attention_2_scale"} <= set(
        told["columns_bytes_per_token"]
    )
    assert all(size > 0 for size in told["columns_bytes_per_token"].values())
    assert told["provenance_of_first_shard"]["attention"] == "eager"


def test_a_shard_whose_maps_begin_elsewhere_is_not_written(folder: Folder, tmp_path: Path) -> None:
    teacher = load(folder("llama"))
    spec = SignalSpec(attention=MEAN)
    store = create_store(str(tmp_path / "store"), Identity(teacher="t", signal=spec, **teacher.identity_parts()))
    whole, cut = Sequence(np.arange(3, 9, dtype=np.int32)), Sequence(np.arange(3, 9, dtype=np.int32), 3)
    blocks = [teacher.score([whole], signal=spec)[0][:4]]
    with pytest.raises(ValueError, match="has attention from position 0 on, expected 2"):
        write_shard(store.files, store.identity, unit_of([cut]), [cut], blocks, {})


def test_maps_longer_than_the_cap_are_refused_with_their_cost(folder: Folder) -> None:
    teacher = load(folder("llama"))
    spec = SignalSpec(attention=AttentionSpec((0, 1), 30, "per_head", HEADS))
    with pytest.raises(TeacherError, match=r"40 tokens, signal.attention.max_tokens is 30: .* 164 bytes a token"):
        teacher.score(sequences(teacher.vocabulary), signal=spec)


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({"attention": "sdpa"}, SignalSpec(attention=MEAN), "the teacher runs sdpa: set teacher.attention to eager"),
        ({}, SignalSpec(attention=replace(MEAN, layers=(3,))), "attention asks for layer 3, the teacher's are 0 … 2"),
        ({}, SignalSpec(layers=replace(LAYERS, layers=(4,))), "layers asks for layer 4, the teacher's are 0 … 3"),
        ({}, SignalSpec(layers=replace(LAYERS, width=16)), "layer 0, which has 32 channels, expected 16"),
        ({}, SignalSpec(attention=replace(PER_HEAD, head_count=3)), "asks for 3 heads, layer 0 has 4"),
        ({"compile": True}, SignalSpec(layers=LAYERS), "teacher.compile with signal.layers"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile's own imports
def test_what_cannot_be_captured_is_refused(
    folder: Folder, options: dict[str, Any], spec: SignalSpec, message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        load(folder("llama"), **options).score(sequences(300), signal=spec)


@pytest.mark.parametrize(
    ("arch", "spec", "message"),
    [
        # Its first hidden state is what leaves the first block.
        ("mamba", SignalSpec(layers=LAYERS), "is not what transformers calls its hidden states"),
        ("qwen3_next", SignalSpec(attention=MEAN), "no attention maps"),
    ],
)
def test_architectures_that_are_otherwise_are_refused(
    tmp_path: Path, arch: str, spec: SignalSpec, message: str
) -> None:
    teacher = load(tiny_teacher(tmp_path / "teacher", arch=arch, layers=BLOCKS))
    with pytest.raises(TeacherError, match=message):
        teacher.score(sequences(300), signal=spec)


def test_modules_that_are_not_those_of_transformers_are_refused(folder: Folder) -> None:
    """Found by comparison, not by name: here a block that gives away something else than what goes on."""
    teacher = load(folder("llama"))
    assert teacher._model is not None
    body: Any = teacher._model.body
    options: dict[str, Any] = {"layers": BLOCKS, "vocabulary": 300, "device": torch.device("cpu"), "maps": True}
    body.layers[1].self_attn.register_forward_hook(lambda _m, _a, out: (out[0], out[1] * (body.calls == 1)))
    body.calls = 1
    body.register_forward_hook(lambda module, _a, _o: setattr(module, "calls", module.calls + 1))
    with pytest.raises(TeacherError, match="no module returns the attention map of layer 1"):
        Hooks(body, **options)
    with pytest.raises(TeacherError, match="returns 4 hidden states of it, expected 3"):
        Hooks(body, **(options | {"layers": 2, "maps": False}))


def test_what_is_not_finite_stops_with_its_position(tmp_path: Path) -> None:
    where = tiny_teacher(tmp_path / "teacher", layers=BLOCKS, tie_word_embeddings=False)
    file = where / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][250] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    bad = Sequence(np.array([5, 6, 250, 8, 9], np.int32))
    fine = Sequence(np.array([5, 6, 7], np.int32))
    teacher = load(where)
    with pytest.raises(
        BadLogits, match=f"between layers at 1 of 8 positions, the first is position 2 of .* {bad.digest}"
    ):
        teacher.score([fine, bad], signal=SignalSpec(layers=replace(LAYERS, layers=(0,))))
    with pytest.raises(BadLogits, match=f"attention weights, the first is position . of sequence {bad.digest}"):
        teacher.score([fine, bad], signal=SignalSpec(attention=replace(MEAN, layers=(0,))))
