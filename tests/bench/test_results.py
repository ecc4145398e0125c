"""results.py: a bench leaves its keys beside the others'."""

import json
from pathlib import Path

import pytest

from tests.bench.results import kept, merged


def test_keys_of_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "build" / "bench.json"
    assert kept(path) == {}
    with merged(path) as held:
        held |= {"one": 1, "shared": 1}
    with merged(path) as held:
        held |= {"two": 2, "shared": 2}
    assert kept(path) == json.loads(path.read_text()) == {"one": 1, "two": 2, "shared": 2}


def test_a_bench_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text('{"one": 1}')
    with pytest.raises(ZeroDivisionError), merged(path) as held:
        held["one"] = 1 / 0
    assert kept(path) == {"one": 1}
