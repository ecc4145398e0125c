"""Lines for people: plain streams get few of them, results say their units, stdout stays machine-readable."""

import io
import json

import pytest

from stillroom.pipeline.console import Console, format_bytes, format_count, format_duration
from stillroom.pipeline.results import cell, print_json, print_tables


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_300_000, "1.3 MB"), (99_960, "100 kB"), (999_600, "1.0 MB"),
     (123_456_789, "123 MB"), (5e12, "5.0 TB"), (2.5e15, "2.5 PB")],
)  # fmt: skip
def test_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4242, "0.42 s"), (9.6, "9.6 s"), (59.4, "59 s"), (200, "3 min 20 s"), (3599.7, "1 h 00 min"),
     (7500, "2 h 05 min"), (273_600, "3 d 04 h")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(113108, "113,108"), (168.4, "168"), (0.25, "0.25"), (3.0, "3"), (1.23456, "1.23")]
)
def test_counts(number: float, text: str) -> None:
    assert format_count(number) == text


class TestPlainProgress:
    def test_one_line_in_five_seconds_and_one_at_the_end(self) -> None:
        stream, clock = io.StringIO(), Clock()
        with Console(stream=stream, clock=clock).progress(100, "tokens", label="teach") as progress:
            for _ in range(10):
                clock.now += 1.0
                progress.advance(10)
                progress.note("loss 2.5")
        assert stream.getvalue().splitlines() == [
            "teach: 50 of 100 tokens, 10 tokens/s, 5 s left, loss 2.5",
            "teach: 100 of 100 tokens, 10 tokens/s, 0 s left, loss 2.5",
            "teach: 100 of 100 tokens, 10 tokens/s, loss 2.5, in 10 s",
        ]

    def test_an_end_that_becomes_known_on_the_way(self) -> None:
        stream, clock = io.StringIO(), Clock()
        with Console(stream=stream, clock=clock).progress(None, "shards") as progress:
            clock.now += 6.0
            progress.update(3)
            clock.now += 6.0
            progress.update(6, 12)
        assert stream.getvalue().splitlines()[:2] == [
            "3 shards, 0.5 shards/s",
            "6 of 12 shards, 0.5 shards/s, 12 s left",
        ]

    def test_no_closing_line_after_an_error(self) -> None:
        stream = io.StringIO()
        with pytest.raises(RuntimeError), Console(stream=stream, clock=Clock()).progress(9, "steps"):
            raise RuntimeError
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_lines_above_it() -> None:
    stream = Terminal()
    console = Console(stream=stream)
    with console.progress(10, "steps", label="[train]") as progress:
        progress.update(10)
        progress.note("[loss]")
        console.notice("a [bracket] stays")
    text = stream.getvalue()
    assert "10 of 10 steps" in text
    assert "notice: a [bracket] stays\n" in text
    assert "[train]" in text
    assert "[loss]" in text


def test_quiet_keeps_notices() -> None:
    stream = io.StringIO()
    console = Console(quiet=True, stream=stream)
    console.info("not this")
    console.table(["a"], [["1"]])
    with console.progress(1, "steps") as progress:
        progress.advance()
    console.notice("but this")
    assert stream.getvalue() == "notice: but this\n"


def test_a_table_on_a_plain_stream_is_wide_and_literal() -> None:
    stream = io.StringIO()
    Console(stream=stream).table(["name", "loss"], [["[a]" * 40, "1.5"], ["b", "12"]], title="[runs]")
    lines = [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]
    assert lines[0] == "[runs]"
    assert f"{'[a]' * 40}    1.5" in lines[3]
    assert lines[4].endswith("     12")  # numbers flush right


class TestResults:
    RESULT = {  # noqa: RUF012
        "store": "here", "size_bytes": 1_300_000, "wall_s": 200, "tokens_per_s": 168.25, "ratio": None, "done": True,
        "signal": {"topk": {"k": 64}}, "problems": [],
        "stores": [{"name": "a", "inner": {"bytes": 10}}, {"name": "b", "x": [1, 2]}],
    }  # fmt: skip

    def test_json_is_one_object(self) -> None:
        stream = io.StringIO()
        print_json(self.RESULT, stream)
        assert json.loads(stream.getvalue()) == self.RESULT
        assert stream.getvalue().count("\n") == 1

    def test_what_json_has_no_word_for_is_null(self) -> None:
        stream = io.StringIO()
        print_json({"loss": float("nan"), "rows": [{"ppl": float("inf")}]}, stream)
        assert stream.getvalue() == '{"loss": null, "rows": [{"ppl": null}]}\n'

    def test_tables_in_the_units_of_the_names(self) -> None:
        stream = io.StringIO()
        print_tables(self.RESULT, stream)
        words = [line.split() for line in stream.getvalue().splitlines() if line.split()]
        for row in (["store", "here"], ["size", "bytes", "1.3", "MB"], ["wall", "s", "3", "min", "20", "s"],
                    ["tokens", "per", "s", "168"], ["ratio", "–"], ["done", "yes"], ["signal.topk.k", "64"],
                    ["problems", "none"], ["stores"], ["name", "inner.bytes", "x"], ["a", "10", "B", "–"],
                    ["b", "–", "1,", "2"]):  # fmt: skip
            assert row in words

    def test_a_path_stays_whole_where_no_terminal_ends(self) -> None:
        path, row = "/deep" * 50, {"other": "words " * 40}
        for stream, whole in ((io.StringIO(), True), (Terminal(), False)):
            print_tables({"stores": [{"store": path} | row], "next": [row]}, stream)
            above, below = stream.getvalue().split("next")
            assert (path in above) is whole
            assert max(map(len, below.splitlines())) <= 160  # the width is of the one table

    def test_tables_inside_of_rows(self) -> None:
        stream = io.StringIO()
        print_tables({"rows": [{"id": 1, "positions": [{"at": 5}]}]}, stream)
        assert "rows 0: positions" in stream.getvalue()

    def test_seconds_are_not_rates(self) -> None:
        assert (cell("wall_s", 90), cell("a.tokens_per_s", 90), cell("n_bytes", 1e9)) == ("1 min 30 s", "90", "1.0 GB")
