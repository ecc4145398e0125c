"""Which responses are kept, and the reason of those that are not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.pipeline.corpus.verdicts import KEPT, read_verdicts, write_verdicts
from stillroom.pipeline.quality.judge import judge_prompt
from stillroom.pipeline.quality.own_function import load_function
from stillroom.pipeline.quality.scores import agrees, last_number, repetition
from stillroom.pipeline.recipe.generate_schema import QualityConfig
from stillroom.storage.errors import CorruptShard, RecipeError
from stillroom.storage.generations.records import Generation
from tests.storage.generations.builders import response

PROMPT = [1, 5, 9]


def reasons(found: list[Generation], *, reference: str | None = None, **over: Any) -> list[str]:
    config = QualityConfig(**over)
    verdicts = judge_prompt(found, config, unit="u" * 32, prompt="2 + 2?", reference=reference, function=None)
    assert [(v.prompt, v.sample) for v in verdicts] == [(g.prompt, g.sample) for g in found]
    return [v.reason for v in verdicts]


class TestScores:
    @pytest.mark.parametrize(
        ("ids", "n", "expected"),
        [
            ((), 2, 0),
            ((1,), 2, 0),
            ((1, 2, 3), 2, 0),
            ((1, 2, 1, 2), 2, 1 / 3),
            ((5,) * 9, 2, 7 / 8),
            ((5,) * 4, 1, 3 / 4),
        ],
    )
    def test_repetition(self, ids: tuple[int, ...], n: int, expected: float) -> None:
        assert repetition(np.array(ids, np.int32), n) == pytest.approx(expected)

    @given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
    def test_repetition_is_a_share_and_grows_with_a_copy(self, ids: list[int], n: int) -> None:
        once, twice = repetition(np.array(ids, np.int32), n), repetition(np.array(ids * 2, np.int32), n)
        assert 0 <= once < 1
        if len(ids) >= n:
            assert twice > 0

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("so it is 1,234.50.", "1234.50"),
            ("-3", "-3"),
            ("2e3 apples", "2e3"),
            ("none", None),
            ("3 of 4", "4"),
            ("", None),
        ],
    )
    def test_last_number(self, text: str, number: str | None) -> None:
        assert last_number(text) == (None if number is None else last_number(number))
        assert (last_number(text) is None) == (number is None)

    def test_agreement(self) -> None:
        assert agrees(" Paris\n", "Paris", "exact")
        assert not agrees("paris", "Paris", "exact")
        assert agrees("The answer is 1,000.", "#### 1000.0", "numeric")
        assert not agrees("The answer is 1,001.", "1000", "numeric")
        assert not agrees("4", "four", "numeric")


class TestVerdicts:
    def test_each_reason(self) -> None:
        found = [
            response(PROMPT, 0, (7, 8, 2), text="good"),
            response(PROMPT, 1, (2,), text=""),
            response(PROMPT, 2, tuple(range(3, 23)), text="long"),
            response(PROMPT, 3, (7, 8, 9), finish="length", text="cut"),
            response(PROMPT, 4, (5,) * 12, text="loop"),
            response(PROMPT, 5, (7, 6, 2), logprobs=np.full(3, -9, np.float32), text="odd"),
            response(PROMPT, 6, (7, 8, 2), text="good"),
        ]
        over: dict[str, Any] = {"min_tokens": 2, "max_tokens": 15, "min_mean_logprob": -5.0}
        assert reasons(found, **over) == [
            KEPT, "too short", "too long", "truncated", "repetitive", "unlikely", "duplicate"
        ]  # fmt: skip
        loose: dict[str, Any] = {"min_tokens": 0, "truncated": "keep", "max_repetition": None, "duplicates": "keep"}
        assert set(reasons(found, **loose)) == {KEPT}

    def test_a_reference_is_asked_only_where_there_is_one(self) -> None:
        found = [response(PROMPT, 0, (7, 2), text="It is 4."), response(PROMPT, 1, (8, 2), text="5")]
        assert reasons(found, reference="4") == [KEPT, KEPT]
        config = QualityConfig(reference="numeric")
        verdicts = judge_prompt(found, config, unit="", prompt="", reference="4", function=None)
        assert [v.reason for v in verdicts] == [KEPT, "wrong answer"]
        verdicts = judge_prompt(found, config, unit="", prompt="", reference=None, function=None)
        assert [(v.reason, v.agrees) for v in verdicts] == [(KEPT, None)] * 2

    def test_the_best(self) -> None:
        found = [
            response(PROMPT, s, (7, 8 + s, 2), logprobs=np.full(3, lp, np.float32))
            for s, lp in enumerate([-1.0, -0.5, -0.5, -0.1])
        ]
        found[3] = response(PROMPT, 3, (7, 1, 4), logprobs=np.full(3, -0.1, np.float32), finish="length")
        assert reasons(found, keep="best") == ["not the best", KEPT, "not the best", "truncated"]
        by_score = QualityConfig(keep="best", best_by="score", function="a:b")
        longest = judge_prompt(
            found[:3], by_score, unit="", prompt="", reference=None, function=lambda p, r, _: float("9" in r)
        )
        assert [v.kept for v in longest] == [False, True, False]
        assert reasons([found[3]], keep="best") == ["truncated"]

    def test_a_users_function(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.py"
        path.write_text(
            "def yes_or_no(prompt, response, reference):\n    return 'a' in response\n"
            "def score(prompt, response, reference):\n    return len(response) / 10\n"
            "def broken(prompt, response, reference):\n    return 1 / 0\n"
            "def odd(prompt, response, reference):\n    return 'yes'\nnumber = 3\n"
        )
        found = [response(PROMPT, 0, (7, 2), text="abc"), response(PROMPT, 1, (8, 2), text="bb")]
        judge = load_function(f"{path}:yes_or_no")
        config = QualityConfig(function=f"{path}:yes_or_no")
        verdicts = judge_prompt(found, config, unit="", prompt="", reference=None, function=judge)
        assert [(v.reason, v.score) for v in verdicts] == [(KEPT, 1.0), ("low score", 0.0)]
        config = QualityConfig(function=f"{path}:score", min_score=0.25)
        verdicts = judge_prompt(
            found, config, unit="", prompt="", reference=None, function=load_function(f"{path}:score")
        )
        assert [(v.reason, v.score) for v in verdicts] == [(KEPT, 0.3), ("low score", 0.2)]
        for name, what in (("broken", "ZeroDivisionError"), ("odd", "expected true, false")):
            with pytest.raises(RecipeError, match=what):
                load_function(f"{path}:{name}")("a prompt", "b", None)
        for name, what in (("missing", "cannot be imported"), ("number", "expected a function")):
            with pytest.raises(RecipeError, match=what):
                load_function(f"{path}:{name}")


class TestTable:
    def test_is_written_once_for_equal_verdicts(self, tmp_path: Path) -> None:
        path = tmp_path / "run" / "verdicts.parquet"
        verdicts = judge_prompt(
            [response(PROMPT, s, (7, 8 + s, 2)) for s in range(3)],
            QualityConfig(), unit="u" * 32, prompt="", reference=None, function=None,
        )  # fmt: skip
        assert write_verdicts(path, verdicts, {"store": "x"})[KEPT] == 3
        before = path.stat().st_mtime_ns
        write_verdicts(path, verdicts, {"store": "x"})
        assert path.stat().st_mtime_ns == before
        table, meta = read_verdicts(path)
        assert meta == {"store": "x"}
        assert table["sequence"].to_pylist() == [v.sequence for v in verdicts]
        assert write_verdicts(path, [], {"store": "x"}).total() == 0
        assert len(read_verdicts(path)[0]) == 0

    def test_none_and_a_damaged_one_are_told(self, tmp_path: Path) -> None:
        path = tmp_path / "verdicts.parquet"
        with pytest.raises(RecipeError, match="stillroom generate"):
            read_verdicts(path)
        path.write_bytes(b"PAR1 and nothing")
        with pytest.raises(CorruptShard, match="remove it"):
            read_verdicts(path)
