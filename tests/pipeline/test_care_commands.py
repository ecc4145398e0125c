"""`stillroom verify --repair`, `--rescore` and `stillroom gc`, as they are typed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.pipeline.arguments import UsageMistake, parse
from stillroom.pipeline.cli import main
from stillroom.storage.identity import Identity
from stillroom.storage.records import SignalSpec, TopKSpec
from stillroom.storage.store import Store, create_store
from stillroom.workers.actor import TeacherActor
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.storage.damage import flip, shards
from tests.strategies import random_sequences, tiny_store, unit_of
from tests.tiny import tiny_teacher


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return tiny_store(tmp_path / "store", random_sequences(np.random.default_rng(3), 15), per_unit=5)


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main([*words, "--json", "--quiet"]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_repair_ends_well_and_says_what_it_did(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    victim = shards(store)[1]
    flip(Path(store.uri, victim.path))
    found = told(capsys, "verify", store.uri, code=1)
    assert found["problems"][0]["shard"] == victim.path
    assert "repaired" not in found["problems"][0]
    done = told(capsys, "verify", store.uri, "--repair")
    assert done["problems"][0]["repaired"] is True
    assert done["repair"]["units_dropped"] == [victim.unit]
    assert done["repair"]["sequences_to_score"] == 5
    assert told(capsys, "verify", store.uri)["problems"] == []


def test_what_is_left_is_exit_code_1(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    entry = Path(store.uri, "_delta_log", f"{1:020d}.json")
    entry.write_text(entry.read_text().replace('{"add"', '{"aed"', 1))
    assert told(capsys, "verify", store.uri, "--repair", code=1)["problems_left"] == 1


def test_people_see_tables(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    flip(Path(store.uri, shards(store)[0].path))
    assert main(["verify", store.uri, "--repair"]) == 0
    printed = capsys.readouterr().out
    assert "repair.tokens to score" in printed
    assert "yes" in printed


def test_gc_spares_an_hour_unless_told_otherwise(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    victim = shards(store)[0]
    flip(Path(store.uri, victim.path))
    told(capsys, "verify", store.uri, "--repair")
    assert told(capsys, "gc", store.uri)["removed_files"] == 0
    path = Path(store.uri, victim.path)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 120))
    assert told(capsys, "gc", store.uri, "--older-than", "3m")["removed_files"] == 0
    tried = told(capsys, "gc", store.uri, "--older-than", "1m", "--dry-run")
    assert (tried["removed_files"], tried["freed_bytes"]) == (1, victim.size_bytes)
    assert path.exists()
    assert main(["gc", store.uri, "--older-than", "1m"]) == 0
    assert "shard that the log does not name" in capsys.readouterr().out
    assert not path.exists()
    assert told(capsys, "verify", store.uri)["problems"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gc"], "required: STORE"),
        (["gc", "s", "--older-than", "soon"], "'soon' is no time such as 30s"),
        (["gc", "s", "--older-than", "h"], "'h' is no time such as 30s"),
        (["verify", "s", "--rescore", "0"], "'0' is no number of 1 and more"),
        (["verify", "s", "--teacher", "t"], "--teacher needs --rescore"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UsageMistake) as caught:
        parse(words)
    assert message in str(caught.value)


@pytest.mark.parametrize(("word", "seconds"), [("30s", 30), ("15m", 900), ("2h", 7200), ("1d", 86_400), ("0s", 0)])
def test_times(word: str, seconds: float) -> None:
    assert parse(["gc", "s", "--older-than", word]).older_than == seconds


def test_rescoring_adds_what_the_teacher_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The broken shard is not scored again: it is said to be broken already."""
    folder = tiny_teacher(tmp_path / "teacher", head_dim=16)
    spec = TeacherSpec(folder=folder, device="cpu", threads=1)
    parts = TorchTeacher(spec).identity_parts()
    store = create_store(
        str(tmp_path / "s"), Identity(teacher="elsewhere/moved", signal=SignalSpec(TopKSpec(8)), **parts)
    )
    sequences = random_sequences(np.random.default_rng(5), 6, vocabulary=300)
    halves = [sequences[:3], sequences[3:]]
    store.save_plan([unit_of(half) for half in halves])
    actor = TeacherActor(spec, store.identity, store.uri)
    store.commit([actor.score_unit(unit_of(half), half) for half in halves])
    words = ["verify", store.uri, "--rescore", "2", "--teacher", str(folder)]
    assert told(capsys, *words)["rescored"]["bit_equal_units"] == 2
    flip(Path(store.uri, shards(store)[0].path))
    found = told(capsys, *words, code=1)
    assert len(found["problems"]) == 1
    assert [unit["unit"] for unit in found["rescored"]["by_unit"]] == [shards(store)[1].unit]
