"""Greedy answers of a tiny model against the argmax of one forward after the other."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.student.answering import Answer, greedy_answers
from tests.tiny import tiny_teacher

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def student(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tiny_teacher(tmp_path_factory.mktemp("student") / request.param, arch=request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def by_hand(model: Any, prompt: list[int], most: int, end: int | None = None) -> list[int]:
    ids = list(prompt)
    while len(ids) - len(prompt) < most and (len(ids) == len(prompt) or ids[-1] != end):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_are_the_argmax_of_each_step(student: tuple[Any, Any], batch: int) -> None:
    model, tokenizer = student
    expected = [by_hand(model, prompt, 8, end=2) for prompt in PROMPTS]
    found = greedy_answers(model, tokenizer, PROMPTS, max_tokens=8, batch=batch)
    assert found == [
        Answer(tokenizer.decode(ids, skip_special_tokens=True), len(ids), ids[-1] == 2) for ids in expected
    ]


def test_end_at_any_token_that_ends(student: tuple[Any, Any]) -> None:
    model, tokenizer = student
    whole = by_hand(model, PROMPTS[0], 8)
    held = model.generation_config
    model.generation_config = type(held)(eos_token_id=[whole[3]], repetition_penalty=9.0)
    try:
        (answer,) = greedy_answers(model, tokenizer, PROMPTS[:1], max_tokens=8)
        kept = model.generation_config.repetition_penalty
    finally:
        model.generation_config = held
    first = whole.index(whole[3]) + 1
    assert answer == Answer(tokenizer.decode(whole[:first], skip_special_tokens=True), first, True)
    assert kept == 9.0, "the model's own settings are put back"


def test_are_cut_at_a_stop_string(student: tuple[Any, Any]) -> None:
    model, tokenizer = student
    (whole,) = greedy_answers(model, tokenizer, PROMPTS[:1], max_tokens=8)
    assert whole is not None
    word = whole.text[2:4]
    (cut,) = greedy_answers(model, tokenizer, PROMPTS[:1], max_tokens=8, stop=["not in it", word])
    assert cut == Answer(whole.text[: whole.text.index(word)], whole.tokens, True)


def test_a_prompt_without_room_is_not_asked(student: tuple[Any, Any]) -> None:
    model, tokenizer = student
    limit = model.config.max_position_embeddings
    found = greedy_answers(model, tokenizer, [[5] * (limit - 3), [6]], max_tokens=4)
    assert found[0] is None
    assert found[1] is not None
