"""What is measured of a model folder, in this process: its numbers by kind of text, and its answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.measure import measure
from stillroom.pipeline.student.answering import greedy_answers
from stillroom.storage.manifest import Manifest
from tests.pipeline.corpora import write_jsonl
from tests.pipeline.test_answers import corpus, generations
from tests.tiny import tiny_teacher


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return tiny_teacher(tmp_path / "teacher")


def request_of(folder: Path, manifest: Manifest, **more: Any) -> dict[str, Any]:
    return {
        "folder": str(folder), "dtype": "float32", "device": "cpu", "manifest_path": str(manifest.path),
        "latency_tokens": 1, "trust_remote_code": False, **more,
    }  # fmt: skip


@torch.no_grad()
def perplexity_of(model: Any, manifest: Manifest, *, generated: bool) -> float:
    losses: list[float] = []
    for row, written in zip(manifest, manifest.generated(), strict=True):
        if row.heldout and written == generated:
            ids = torch.from_numpy(row.sequence.input_ids.astype(np.int64))
            log_q_TV = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
            nll_T = -log_q_TV.gather(-1, ids[1:, None])[:, 0]
            losses += nll_T[torch.from_numpy(row.mask[1:])].tolist()
    return float(np.exp(np.mean(losses)))


def test_perplexity_by_kind_of_text(teacher: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    generations(tmp_path, tokenizer)
    write_jsonl(tmp_path / "x.jsonl", [{"text": f"{n} drops of thyme and mint"} for n in range(9)])
    both = corpus(tokenizer, tmp_path, "x.jsonl", heldout=0.5)
    found = measure(request_of(teacher, both))
    assert found["perplexity_teacher_text"] == pytest.approx(perplexity_of(model, both, generated=True), rel=1e-4)
    assert found["perplexity_ground_truth"] == pytest.approx(perplexity_of(model, both, generated=False), rel=1e-4)
    assert "answers" not in found
    alone = measure(request_of(teacher, corpus(tokenizer, tmp_path, heldout=0.5)))
    assert "perplexity_teacher_text" not in alone
    assert alone["perplexity"] == pytest.approx(found["perplexity_teacher_text"], rel=1e-5)


def test_answers_are_the_students(teacher: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    write_jsonl(tmp_path / "x.jsonl", [{"text": "thyme"}])
    generations(tmp_path, tokenizer)
    asked: dict[str, Any] = {"prompts": [[5, 6], [7], [5] * 253], "max_tokens": 5, "stop": []}
    found = measure(request_of(teacher, corpus(tokenizer, tmp_path), answers=asked))["answers"]
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    expected = greedy_answers(model, tokenizer, asked["prompts"], max_tokens=5)
    assert json.loads(json.dumps(found)) == [None if a is None else a.as_dict() for a in expected]
    assert found[2] is None
