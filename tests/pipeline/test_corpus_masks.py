"""What of a conversation or pair is learned, down to the token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from stillroom.pipeline.corpus.encode import mask_from_spans
from stillroom.storage.errors import CorpusError, RecipeError
from tests.pipeline.corpora import counts, ingested, learned, texts, write_jsonl
from tests.tiny import tiny_tokenizer

SYSTEM = {"role": "system", "content": "You keep the cellar."}
USER = {"role": "user", "content": "Which jar? 🫙"}
ANSWER = {"role": "assistant", "content": "The größte 🌿 jar,\n    with  thyme."}
HEADER = "<|start|>assistant\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return tiny_tokenizer(tmp_path / "tok")


def one(tokenizer: Any, folder: Path, record: dict[str, Any], **settings: Any) -> tuple[str, str]:
    """The only row decoded, and its learned part."""
    write_jsonl(folder / "c.jsonl", [record])
    manifest = ingested(tokenizer, folder, "c.jsonl", **{"window": 512, **settings})
    [row] = manifest
    return texts(tokenizer, manifest)[0], learned(tokenizer, row)


def test_the_assistants_turns_are_learned_to_their_end(tokenizer: Any, tmp_path: Path) -> None:
    again = {"role": "assistant", "content": "No other."}
    text, part = one(tokenizer, tmp_path, {"messages": [SYSTEM, USER, ANSWER, USER, again]})
    assert text == tokenizer.apply_chat_template([SYSTEM, USER, ANSWER, USER, again], tokenize=False)
    assert part == f"{ANSWER['content']}<|end|>\n|No other.<|end|>\n"


def test_consecutive_assistant_turns_leave_the_header_between_them_out(tokenizer: Any, tmp_path: Path) -> None:
    _, part = one(tokenizer, tmp_path, {"messages": [USER, ANSWER, ANSWER]})
    assert part == "|".join([f"{ANSWER['content']}<|end|>\n"] * 2)


def test_a_conversation_may_begin_with_the_assistant(tokenizer: Any, tmp_path: Path) -> None:
    for first in (ANSWER, {"role": "assistant", "content": "a jar"}, {"role": "assistant", "content": "  b"}):
        _, part = one(tokenizer, tmp_path, {"messages": [first, USER]})
        assert part == f"{first['content']}<|end|>\n"
    tokenizer.chat_template = "<|start|>system\nYou are kind.<|end|>\n" + tokenizer.chat_template
    _, part = one(tokenizer, tmp_path, {"messages": [ANSWER, USER]})
    assert part == f"{ANSWER['content']}<|end|>\n", "what the template puts before it is not the assistant's"


def test_a_system_message_alone_teaches_nothing_and_is_counted(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"messages": [SYSTEM]}, {"messages": []}])
    found = counts(ingested(tokenizer, tmp_path, "c.jsonl"))
    assert (found.sequences, found.untrained_sequences, found.trained_tokens, found.empty_documents) == (1, 1, 0, 1)


def test_train_on_all(tokenizer: Any, tmp_path: Path) -> None:
    text, part = one(tokenizer, tmp_path, {"messages": [USER, ANSWER]}, train_on="all")
    assert part == text


def test_windows_of_a_conversation_keep_the_mask(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [{"messages": [USER, ANSWER, USER, ANSWER]}])
    manifest = ingested(tokenizer, tmp_path, "c.jsonl", window=16, overlap=4)
    parts = "".join(learned(tokenizer, row) for row in manifest).replace("|", "")
    whole = one(tokenizer, tmp_path, {"messages": [USER, ANSWER, USER, ANSWER]})[1].replace("|", "")
    assert parts.encode(errors="replace").replace(b"?", b"") != b""
    assert sum(int(row.mask.sum()) for row in manifest) == sum(
        int(row.mask.sum()) for row in ingested(tokenizer, tmp_path, "c.jsonl", window=512)
    )
    assert len(whole) > 40
    assert all(not row.mask[: row.sequence.context].any() for row in manifest)


def test_special_tokens_of_a_template_are_not_added_again(tokenizer: Any, tmp_path: Path) -> None:
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", start), ("<|end|>", end)]
    )
    text, part = one(tokenizer, tmp_path, {"messages": [USER, ANSWER]})
    assert text == tokenizer.apply_chat_template([USER, ANSWER], tokenize=False)
    assert part == f"{ANSWER['content']}<|end|>\n"
    assert one(tokenizer, tmp_path, {"text": "mint"}) == ("<|start|>mint<|end|>",) * 2, "added, and no second end"
    pair = one(tokenizer, tmp_path, {"prompt": "a jar ", "response": "of mint"}, pairs_as="plain")
    assert pair == ("<|start|>a jar of mint<|end|>", " of mint<|end|>")
    assert counts(ingested(tokenizer, tmp_path, "c.jsonl")).empty_documents == 0
    write_jsonl(tmp_path / "e.jsonl", [{"text": ""}, {"text": "x"}])
    assert counts(ingested(tokenizer, tmp_path, "e.jsonl")).empty_documents == 1


def test_pairs_through_the_template(tokenizer: Any, tmp_path: Path) -> None:
    text, part = one(tokenizer, tmp_path, {"prompt": "Which?", "response": "Mint."})
    assert text == f"<|start|>user\nWhich?<|end|>\n{HEADER}Mint.<|end|>\n"
    assert part == "Mint.<|end|>\n"


def test_plain_pairs_and_which_was_chosen(tokenizer: Any, tmp_path: Path) -> None:
    record = {"prompt": "Q: which?\nA:", "response": " Mint 🌿."}
    expected = ("Q: which?\nA: Mint 🌿.<|end|>", " Mint 🌿.<|end|>")
    assert one(tokenizer, tmp_path, record, pairs_as="plain") == expected
    assert one(tokenizer, tmp_path, record, pairs_as="plain", train_on="all")[1] == expected[0]
    assert one(tokenizer, tmp_path, record, pairs_as="plain", append_eos=False)[1] == " Mint 🌿."
    assert "pairs as chat" in counts(ingested(tokenizer, tmp_path, "c.jsonl")).line()
    tokenizer.chat_template = None
    assert one(tokenizer, tmp_path, record) == expected
    assert "pairs as plain" in counts(ingested(tokenizer, tmp_path, "c.jsonl")).line()


def test_forms_are_told_apart_by_their_fields(tokenizer: Any, tmp_path: Path) -> None:
    records = [
        {"text": "a", "prompt": "b"},
        {"prompt": "b", "response": "c", "text": "no"},
        {"messages": [USER], "text": "no"},
    ]
    write_jsonl(tmp_path / "c.jsonl", records)
    assert counts(ingested(tokenizer, tmp_path, "c.jsonl")).forms == {"text": 1, "pairs": 1, "chat": 1}
    as_text = ingested(tokenizer, tmp_path, {"path": "c.jsonl", "form": "text", "text_field": "prompt"})
    assert counts(as_text).forms == {"text": 2}
    assert counts(as_text).bad_examples == ["c.jsonl:3: field prompt is missing; got the fields messages, text"]
    renamed = {"path": "c.jsonl", "prompt_field": "text", "response_field": "prompt", "form": "pairs"}
    assert counts(ingested(tokenizer, tmp_path, renamed)).forms == {"pairs": 1} | {"pairs": 2}


def test_no_template_for_a_conversation(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    with pytest.raises(CorpusError, match=r"c\.jsonl:1 is a conversation and the tokenizer has no chat template"):
        one(tokenizer, tmp_path, {"messages": [USER]})
    with pytest.raises(CorpusError, match=r"c\.jsonl:1 is a conversation"):
        one(tokenizer, tmp_path, {"prompt": "a", "response": "b"}, pairs_as="chat")


# Writes a thought only in the last turn of the assistant, as several reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Opens a thought for the assistant that history does not show.
OPENING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)


def test_a_template_that_rewrites_history_is_refused_with_the_remedy(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(CorpusError, match=r"c\.jsonl:1: .*first 2 turns differently .*<think>.*`train_on: all`"):
        one(tokenizer, tmp_path, {"messages": [USER, ANSWER, USER, ANSWER]})
    text, part = one(tokenizer, tmp_path, {"messages": [USER, ANSWER, USER, ANSWER]}, train_on="all")
    assert part == text
    assert one(tokenizer, tmp_path, {"messages": [USER, ANSWER]})[1] == f"<think></think>{ANSWER['content']}<|end|>\n"


def test_a_header_that_history_does_not_show_ends_where_it_parts(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = OPENING
    assert one(tokenizer, tmp_path, {"messages": [USER, ANSWER, USER, ANSWER]})[1].count("|") >= 1
    assert one(tokenizer, tmp_path, {"messages": [USER, ANSWER]})[1] == f"{ANSWER['content']}<|end|>\n"


def test_a_record_that_the_template_refuses_is_a_bad_line(tokenizer: Any, tmp_path: Path) -> None:
    refusal = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    tokenizer.chat_template = refusal + OPENING
    write_jsonl(tmp_path / "c.jsonl", [{"messages": [SYSTEM]}, {"messages": [USER, ANSWER]}])
    found = counts(ingested(tokenizer, tmp_path, "c.jsonl"))
    assert found.bad_examples == ["c.jsonl:1: the chat template refuses it: user first"]
    assert found.documents == 1


def test_template_options_reach_the_template(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ date_string }}" + OPENING
    text, _ = one(tokenizer, tmp_path, {"messages": [USER]}, chat_template_options={"date_string": "26 Jul"})
    assert text.startswith("26 Jul<|start|>")


def test_a_slow_tokenizer_and_one_without_an_end_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(RecipeError, match="is a slow one"):
        one(ByT5Tokenizer(), tmp_path, {"text": "a"})
    tokenizer.eos_token = None
    with pytest.raises(RecipeError, match=r"no end-of-sequence token: set `append_eos: false`"):
        one(tokenizer, tmp_path, {"text": "a"})


def test_offsets_trimmed_of_blanks_lose_no_token(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    _, part = one(tokenizer, tmp_path, {"messages": [USER, ANSWER]})
    assert part == f"{ANSWER['content']}<|end|>\n"


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(0, 30), st.integers(0, 30))
def test_a_token_is_learned_if_it_holds_a_character_of_the_span(widths: list[int], a: int, b: int) -> None:
    ends = np.cumsum(widths)
    offsets = np.stack([ends - widths, ends], axis=1)
    first, last = sorted((a, b))
    span = set(range(first, last))
    expected = [bool(span & set(range(s, e))) for s, e in offsets.tolist()]
    assert mask_from_spans(offsets, [(first, last)]).tolist() == expected


def test_added_tokens_have_no_characters_and_are_not_learned() -> None:
    offsets = np.array([[0, 0], [0, 3], [3, 3], [3, 5], [0, 0]])
    assert mask_from_spans(offsets, [(0, 5)]).tolist() == [False, True, False, True, False]
    assert mask_from_spans(np.zeros((0, 2), np.int64), [(0, 5)]).tolist() == []
