"""Windows: every token is new once, and documents come back from their windows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.pipeline.corpus.windows import Window, split
from tests.pipeline.corpora import by_document, counts, ingested, write_jsonl
from tests.tiny import tiny_tokenizer


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    window = draw(st.integers(2, 40))
    return draw(st.integers(1, 300)), window, draw(st.integers(0, window - 1))


@given(cuts())
def test_every_token_is_new_in_exactly_one_window(cut: tuple[int, int, int]) -> None:
    length, window, overlap = cut
    found = list(split(length, window=window, overlap=overlap))
    new = [i for w in found for i in range(w.start + w.context, w.end)]
    assert new == list(range(length))
    assert all(1 <= w.end - w.start <= window and w.end - w.start > w.context for w in found)
    assert [w.context for w in found] == [0, *[overlap] * (len(found) - 1)]
    assert all(w.end - w.start == window for w in found[:-1])


def test_the_drawing_in_the_docstring() -> None:
    assert list(split(11, window=6, overlap=2)) == [Window(0, 6, 0), Window(4, 10, 2), Window(8, 11, 2)]


def test_a_document_that_just_fits_is_one_window() -> None:
    assert list(split(6, window=6, overlap=5)) == [Window(0, 6, 0)]


TEXT = "every drop is weighed twice before it is written down in the book of waters " * 9


@pytest.mark.parametrize("overlap", [0, 1, 5, 15])
def test_a_long_document_comes_back_from_its_windows(tmp_path: Path, overlap: int) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "tok")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "short"}, {"text": TEXT}])
    manifest = ingested(tokenizer, tmp_path, "c.jsonl", window=16, overlap=overlap)
    rows = by_document(manifest)[1]
    whole = np.concatenate([row.sequence.input_ids[row.sequence.context :] for row in rows])
    expected = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    assert whole.tolist() == expected
    assert [row.window for row in rows] == list(range(len(rows)))
    predicted = _predicted(rows)
    unpredicted = counts(manifest).unpredicted_tokens
    if overlap:
        assert predicted == list(range(1, len(expected))), "each token but the first, once"
        assert unpredicted == 0
    else:
        assert sorted({*range(1, len(expected))} - set(predicted)) == list(range(16, len(expected), 16))
        assert unpredicted == len(rows) - 1
    assert counts(manifest).trained_tokens == len(predicted) + len(tokenizer("short")["input_ids"])


def _predicted(rows: list[Any]) -> list[int]:
    """The document's tokens that some row trains on, by position, by the contract's rule."""
    found, new_before = [], 0
    for row in rows:
        start = new_before - row.sequence.context
        for t in range(row.sequence.first_position, len(row.mask) - 1):
            if row.mask[t + 1]:
                found.append(start + t + 1)
        new_before += len(row.mask) - row.sequence.context
    return found
