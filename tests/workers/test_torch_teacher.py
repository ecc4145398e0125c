"""The teacher against a naive reference: one document at a time, full logits, float32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.storage.errors import BadLogits, RecipeError, TeacherError
from stillroom.storage.identity import Identity, real_vocabulary
from stillroom.storage.records import (
    BETAS,
    HiddenSpec,
    NucleusSpec,
    SampledSpec,
    Sequence,
    Signal,
    SignalSpec,
    TopK,
    TopKSpec,
)
from stillroom.workers.sanity import require_batch_free
from stillroom.workers.sliced import SlicedModel
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.strategies import exact_lse
from tests.tiny import tiny_teacher

K = 16
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "gemma3_text": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.25},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "bloom": {},
    "mixtral": {"num_local_experts": 4},
    "mamba": {},
    "phi": {"tie_word_embeddings": False},  # its head has a bias
}
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Tiny teachers, each made once."""
    made: dict[str, Path] = {}

    def make(arch: str, **options: Any) -> Path:
        key = f"{arch}{sorted(options.items())}"
        if key not in made:
            made[key] = tiny_teacher(tmp_path_factory.mktemp(arch), arch=arch, **(ARCHITECTURES[arch] | options))
        return made[key]

    return make


def spec(folder: Path, **options: Any) -> TeacherSpec:
    defaults: dict[str, Any] = {"device": "cpu", "threads": 1}
    return TeacherSpec(folder=folder, **(defaults | options))


def sequences(vocabulary: int, lengths: tuple[int, ...] = (40, 7, 1, 23, 23, 2)) -> list[Sequence]:
    rng = np.random.default_rng(0)
    contexts = [0, 3, 0, 10, 0, 1]
    return [
        Sequence(rng.integers(0, vocabulary, length).astype(np.int32), context)
        for length, context in zip(lengths, contexts, strict=True)
    ]


def score(teacher: TorchTeacher, sequences: list[Sequence], *, k: int) -> list[TopK]:
    """The k largest logits and the tail of each sequence, as the teacher gives them."""
    blocks = [signal.topk for signal in teacher.score(sequences, signal=SignalSpec(TopKSpec(k)))]
    return [block for block in blocks if block is not None]


@torch.inference_mode()
def full_logits(
    folder: Path, sequence: Sequence, vocabulary: int, dtype: torch.dtype = torch.float32
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[R, V] of one document alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    logits = model(torch.from_numpy(sequence.input_ids.astype(np.int64))[None]).logits[0]
    return np.asarray(logits[sequence.first_position :, :vocabulary].float().numpy(), np.float64)


def assert_rows(block: TopK, logits_RV: np.ndarray[Any, np.dtype[np.float64]], tolerance: float = 1e-4) -> None:
    """Kept logits are the document's own at the kept ids and its largest; kept and tail make up the full partition."""
    ids = block.ids.astype(np.int64)
    np.testing.assert_allclose(block.logits, np.take_along_axis(logits_RV, ids, 1), atol=tolerance)
    np.testing.assert_allclose(block.logits, -np.sort(-logits_RV, 1)[:, : ids.shape[1]], atol=tolerance)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    order = np.argsort(-logits_RV, axis=1, kind="stable")[:, : ids.shape[1] + 1]
    steps = -np.diff(np.take_along_axis(logits_RV, order, axis=1), axis=1, prepend=np.inf)  # to the one before
    steps = np.concatenate([steps, np.full((len(steps), 1), np.inf)], axis=1)
    apart = (np.minimum(steps[:, :-1], steps[:, 1:]) > 2 * tolerance)[:, : ids.shape[1]]
    np.testing.assert_array_equal(ids[apart], order[:, : ids.shape[1]][apart])  # all but ties
    for g, beta in enumerate(BETAS):
        kept = np.logaddexp.reduce(beta * block.logits.astype(np.float64), axis=1)
        full = np.logaddexp.reduce(beta * logits_RV, axis=1)
        np.testing.assert_allclose(np.logaddexp(kept, block.tail_lse[:, g]), full, atol=tolerance)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("padded", [0, 16])
def test_like_each_document_alone(folder: Folder, arch: str, padded: int) -> None:
    where = folder(arch, padded=padded)
    teacher = TorchTeacher(spec(where, batch_tokens=64, slice_positions=9))
    asked = sequences(teacher.vocabulary)
    turned = (4, 0, 5, 3, 1, 2)
    blocks = score(teacher, asked, k=K) + score(teacher, [asked[i] for i in turned], k=K)
    for sequence, block in zip([*asked, *(asked[i] for i in turned)], blocks, strict=True):
        assert len(block) == sequence.rows
        assert int(block.ids.max()) < teacher.vocabulary
        assert_rows(block, full_logits(where, sequence, teacher.vocabulary))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_in_bfloat16_batches_move_rows_within_the_band_that_is_measured(
    folder: Folder, arch: str, batch_tokens: int
) -> None:
    """What is stored, against each document alone through the model's own forward in bfloat16.

    Within twice the band that the teacher's own probe measures. So small a teacher's probe finds none, but what moves
    at all moves by a step of bfloat16: the band is at least that of the largest logit, 1/128 or 1/64 here. Measured:
    at most one such step, in at most 4% of the logits; the others are the same bits.
    """
    where = folder(arch, padded=16)
    teacher = TorchTeacher(spec(where, dtype="bfloat16", batch_tokens=batch_tokens, slice_positions=9))
    asked = sequences(teacher.vocabulary)
    alone = {s.digest: full_logits(where, s, teacher.vocabulary, torch.bfloat16) for s in asked}
    probe = require_batch_free(teacher, asked, signal=SignalSpec(TopKSpec(K)), dtype="bfloat16")
    assert probe.positions > 0
    largest = max(float(np.abs(logits_RV).max()) for logits_RV in alone.values())
    # KL is half the variance of the logits' differences.
    band = max((2 * probe.kl_worst_nats) ** 0.5, bfloat16_step(largest))
    for order in (range(6), (4, 0, 5, 3, 1, 2)):
        batch = [asked[i] for i in order]
        for sequence, block in zip(batch, score(teacher, batch, k=K), strict=True):
            assert_rows(block, alone[sequence.digest], 2 * band)


def test_bfloat16_scores_are_not_those_of_float32(folder: Folder) -> None:
    """Else the test above compares nothing of bfloat16."""
    where = folder("llama", padded=16)
    teacher = TorchTeacher(spec(where, dtype="bfloat16"))
    (block,) = score(teacher, sequences(teacher.vocabulary)[:1], k=K)
    assert (torch.from_numpy(block.logits).bfloat16().float().numpy() == block.logits).all()
    exact_RV = full_logits(where, sequences(teacher.vocabulary)[0], teacher.vocabulary)
    assert (np.abs(block.logits - np.take_along_axis(exact_RV, block.ids.astype(np.int64), 1)) > 0).mean() > 0.5


def bfloat16_step(value: float) -> float:
    """To the next number: 8 bits of significand."""
    return float(2.0 ** (np.floor(np.log2(value)) - 7))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_teacher_gives_the_eager_ones_rows_but_for_rounding(folder: Folder) -> None:
    """By inductor's own kernels, which need a C++ compiler, for batches of two shapes. Costs minutes on a busy machine.

    `teacher.compile` shifts rows within the noise band: here as far as float32 does between batch shapes, 1e-4.
    """
    where = folder("llama", padded=16, layers=1)
    eager, compiled = (
        TorchTeacher(spec(where, batch_tokens=80, slice_positions=9, compile=compiles)) for compiles in (False, True)
    )
    rng = np.random.default_rng(0)
    asked = [Sequence(rng.integers(0, eager.vocabulary, length).astype(np.int32)) for length in (40, 30, 20, 15)]
    assert [len(group) for group in eager.batches(asked)] == [2, 2]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    blocks = score(compiled, asked, k=K)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    for sequence, got, want in zip(asked, blocks, score(eager, asked, k=K), strict=True):
        assert_rows(got, full_logits(where, sequence, eager.vocabulary))
        np.testing.assert_allclose(got.logits, want.logits, atol=1e-4)
        np.testing.assert_allclose(got.tail_lse, want.tail_lse, atol=1e-4)
    assert compiled.provenance(asked)["compile"] is True


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "phi"])  # plain, tied, soft-capped, with a bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_lie_in_one_memory_and_are_what_the_head_gives(folder: Folder, arch: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder(arch), dtype=dtype).eval()
    sliced = SlicedModel(model, device=torch.device("cpu"), vocabulary=model.config.vocab_size)
    hidden_SD = torch.randn(40, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():  # where the memory is not used
        expected = [sliced.logits(part) for part in hidden_SD.split(20)]
    with torch.inference_mode():
        sliced.logits(hidden_SD)
        found = []
        for part in hidden_SD.split(20):
            logits_SV = sliced.logits(part)
            found.append(logits_SV.clone())
            if arch != "gemma2":  # whose cap makes tensors of its own
                assert logits_SV.data_ptr() == sliced.logits(hidden_SD).data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("batch_tokens", [1, 46, 80, 4096])
@pytest.mark.parametrize("slice_positions", [1, 7, None])
def test_batch_and_slice_sizes_change_nothing_but_last_bits(
    folder: Folder, batch_tokens: int, slice_positions: int | None
) -> None:
    teacher = TorchTeacher(spec(folder("llama"), batch_tokens=batch_tokens, slice_positions=slice_positions))
    asked = sequences(teacher.vocabulary)
    for order in (list(range(6)), [5, 2, 0, 4, 1, 3]):
        for i, block in zip(order, score(teacher, [asked[i] for i in order], k=K), strict=True):
            assert_rows(block, full_logits(folder("llama"), asked[i], teacher.vocabulary))


def test_rows_are_bit_equal_for_any_thread_count(folder: Folder) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            # torch's attention itself differs for heads of 8 channels, as the other tests have them.
            where = folder("qwen3", head_dim=16)
            teacher = TorchTeacher(spec(where, batch_tokens=64, slice_positions=9, threads=threads))
            asked = sequences(teacher.vocabulary)
            results.append(score(teacher, asked, k=K) + score(teacher, [Sequence(asked[1].input_ids)], k=K))
    finally:
        torch.set_num_threads(before)
    for blocks in results[1:]:
        for got, want in zip(blocks, results[0], strict=True):
            for name in ("ids", "logits", "tail_lse"):
                np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_rows_are_bit_equal_for_any_order_of_equal_shapes(folder: Folder) -> None:
    teacher = TorchTeacher(spec(folder("llama"), batch_tokens=64))
    asked = [Sequence(s.input_ids) for s in sequences(teacher.vocabulary, (16,) * 6)]
    forward, backward = score(teacher, asked, k=K), score(teacher, asked[::-1], k=K)[::-1]
    for got, want in zip(backward, forward, strict=True):
        for name in ("ids", "logits", "tail_lse"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_longrope_companions_do_not_move_each_other(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    }  # fmt: skip
    where = tiny_teacher(tmp_path / "teacher", rope_parameters=rope)
    teacher = TorchTeacher(spec(where, batch_tokens=4096))
    asked = sequences(teacher.vocabulary)
    assert [len(group) for group in teacher.batches(asked)] == [1, 5]
    for sequence, block in zip(asked, score(teacher, asked, k=K), strict=True):
        assert_rows(block, full_logits(where, sequence, teacher.vocabulary))


def test_all_but_one_id_and_one_id(folder: Folder) -> None:
    where = folder("llama", padded=16)
    teacher = TorchTeacher(spec(where))
    asked = sequences(teacher.vocabulary)[:3]
    for k in (1, teacher.vocabulary - 1):
        for sequence, block in zip(asked, score(teacher, asked, k=k), strict=True):
            assert block.ids.shape[1] == k
            assert_rows(block, full_logits(where, sequence, teacher.vocabulary))


def test_a_nucleus_is_the_fewest_ids_that_hold_the_mass(folder: Folder) -> None:
    """Over batches and slices of different widths; the tail takes up what is cut from the k largest."""
    where = folder("llama", padded=16)
    teacher = TorchTeacher(spec(where, batch_tokens=64, slice_positions=9))
    asked, kept = sequences(teacher.vocabulary), set()
    keeping = SignalSpec(TopKSpec(40, nucleus=NucleusSpec(0.05)))
    for sequence, signal in zip(asked, teacher.score(asked, signal=keeping), strict=True):
        assert signal.topk is not None
        assert signal.topk.counts is not None
        logits_RV = full_logits(where, sequence, teacher.vocabulary)
        held = np.cumsum(-np.sort(-np.exp(logits_RV - exact_lse(logits_RV)[:, None]), axis=1), axis=1)
        for row, count in enumerate(signal.topk.counts.tolist()):
            assert count == 40 or held[row, count - 1] > 0.05 - 1e-6
            assert count == 1 or held[row, count - 2] < 0.05 + 1e-6
            block = signal.topk[row : row + 1]
            alone = TopK(block.ids[:, :count], block.logits[:, :count], block.tail_lse)
            assert_rows(alone, logits_RV[row : row + 1])
            kept.add(count)
    assert len(kept) > 3


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_hidden_states_are_what_the_output_head_reads(folder: Folder, arch: str) -> None:
    """Times its weights they are the document's own logits."""
    where = folder(arch)
    teacher = TorchTeacher(spec(where, batch_tokens=64, slice_positions=9))
    asked = sequences(teacher.vocabulary)
    head = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).get_output_embeddings().weight
    blocks = teacher.score(asked, signal=SignalSpec(hidden=HiddenSpec(32, "bfloat16")))
    for sequence, signal in zip(asked, blocks, strict=True):
        assert signal.topk is None
        assert signal.sampled is None
        assert signal.hidden is not None
        assert signal.hidden.shape == (sequence.rows, 32)
        assert signal.hidden.dtype == np.float32
        logits = signal.hidden.astype(np.float64) @ head.detach().numpy().astype(np.float64).T
        np.testing.assert_allclose(logits, full_logits(where, sequence, teacher.vocabulary), atol=1e-4)


def test_a_part_is_the_same_with_others_beside_it(folder: Folder) -> None:
    teacher = TorchTeacher(spec(folder("llama"), batch_tokens=64, slice_positions=9))
    asked = sequences(teacher.vocabulary)
    parts = {"topk": TopKSpec(K), "sampled": SampledSpec(20), "hidden": HiddenSpec(32, "bfloat16")}
    together = Signal.concatenate(teacher.score(asked, signal=SignalSpec(**parts)))  # type: ignore[arg-type]
    assert len(together) == sum(s.rows for s in asked)
    for name, part in parts.items():
        alone = Signal.concatenate(teacher.score(asked, signal=SignalSpec(**{name: part})))  # type: ignore[arg-type]
        assert [other for other in parts if getattr(alone, other) is not None] == [name]
        for field in ("ids", "logits", "tail_lse", "counts"):
            got, want = (getattr(getattr(signal, name), field, None) for signal in (together, alone))
            np.testing.assert_array_equal(got, want)
        if name == "hidden":
            np.testing.assert_array_equal(together.hidden, alone.hidden)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(folder: Folder, dtype: Any) -> None:
    where = folder("llama")
    teacher = TorchTeacher(spec(where, dtype=dtype))
    asked = sequences(teacher.vocabulary)
    for sequence, block in zip(asked, score(teacher, asked, k=K), strict=True):
        exact = np.take_along_axis(full_logits(where, sequence, teacher.vocabulary), block.ids.astype(np.int64), 1)
        assert np.abs(block.logits - exact).mean() < 0.02


def test_what_it_says_of_itself(folder: Folder) -> None:
    where = folder("llama", padded=16)
    teacher = TorchTeacher(spec(where, batch_tokens=64))
    tokenizer_json = (where / "tokenizer.json").read_text()
    parts = teacher.identity_parts()
    identity = Identity(teacher="tiny", signal=SignalSpec(TopKSpec(K)), **parts)
    assert identity.vocabulary == real_vocabulary(tokenizer_json) == len(AutoTokenizer.from_pretrained(where))
    assert identity.dtype == "float32"
    assert identity.quantisation is None
    asked = sequences(teacher.vocabulary)
    said = teacher.provenance(asked)
    assert said["batch_shapes"] == [[1, 40], [2, 23], [3, 7]]
    assert len(said["batch_shapes"]) == len(teacher.batches(asked))
    assert json.dumps(said) == json.dumps(TorchTeacher(spec(where, batch_tokens=64)).provenance(asked))
    assert str(where) not in json.dumps(said)


def test_released_teacher_scores_nothing(folder: Folder) -> None:
    teacher = TorchTeacher(spec(folder("llama")))
    teacher.release()
    with pytest.raises(TeacherError, match="was released"):
        score(teacher, [Sequence(np.array([1], np.int32))], k=K)


def test_damaged_weights_are_refused_on_loading(tmp_path: Path) -> None:
    where = tiny_teacher(tmp_path / "teacher")
    file = where / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][250] = torch.nan  # the head is tied, so every position has one NaN logit
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(BadLogits, match=r"NaN or infinite logits in torch.float32 to any input"):
        TorchTeacher(spec(where))


@pytest.mark.parametrize(
    "signal",
    [
        SignalSpec(TopKSpec(K)),
        SignalSpec(sampled=SampledSpec(5)),
        SignalSpec(hidden=HiddenSpec(32, "bfloat16")),
    ],
    ids=SignalSpec.in_words,
)
def test_bad_logits_name_their_sequence(tmp_path: Path, signal: SignalSpec) -> None:
    where = tiny_teacher(tmp_path / "teacher", tie_word_embeddings=False)
    file = where / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][250] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    teacher = TorchTeacher(spec(where))  # a NaN value times an attention weight of 0 is NaN: it spoils all positions
    fine, bad = Sequence(np.array([5, 6, 7], np.int32)), Sequence(np.array([5, 6, 250, 8, 9], np.int32))
    teacher.score([fine], signal=signal)
    with pytest.raises(BadLogits, match=f"at 5 of 8 positions, the first is position 0 of sequence {bad.digest}"):
        teacher.score([fine, bad], signal=signal)


@pytest.mark.parametrize(
    ("ids", "k", "message"),
    [
        (range(257), 4, "has 257 tokens, the teacher's positions end at 256"),
        ([1, 100_000], 4, "has ids 1..100000, the teacher's vocabulary is 0..319"),
        ([-1, 2], 4, "has ids -1..2"),
        ([1, 2], 0, "signal.topk.k is 0, expected 1 to 319"),
        ([1, 2], 320, "signal.topk.k is 320, expected 1 to 319"),
    ],
)
def test_what_cannot_be_scored_is_refused(folder: Folder, ids: Any, k: int, message: str) -> None:
    teacher = TorchTeacher(spec(folder("llama")))
    assert teacher.vocabulary == 320
    with pytest.raises(TeacherError, match=message):
        score(teacher, [Sequence(np.array(ids, np.int32))], k=k)


def test_a_head_narrower_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="304 output columns, its tokenizer 320 ids"):
        TorchTeacher(spec(tiny_teacher(tmp_path / "teacher", padded=-16)))


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="is not causal"):
        TorchTeacher(spec(tiny_teacher(tmp_path / "teacher", arch="bert")))


def test_missing_weights_are_not_filled_with_random_ones(tmp_path: Path) -> None:
    where = tiny_teacher(tmp_path / "teacher")
    file = where / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"1 weights are not in its files .*layers.1.mlp.up_proj.weight"):
        TorchTeacher(spec(where))


def test_an_unknown_architecture_and_a_missing_gpu_are_refused(tmp_path: Path) -> None:
    where = tiny_teacher(tmp_path / "teacher")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="sees no GPU"):
            TorchTeacher(spec(where, device="cuda"))
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(TeacherError, match=r"cannot load|no tokenizer"):
        TorchTeacher(spec(where))
