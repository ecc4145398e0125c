"""uses.py: the ledgers of a store: what comes back, what is refused, and what they add up to."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.storage.catalog.uses import (
    TAUGHT,
    USES,
    TaughtRun,
    Use,
    load_taught,
    load_uses,
    record_taught,
    record_use,
    reuse,
    utc_now,
)
from stillroom.storage.errors import CorruptShard
from stillroom.storage.files import LocalFiles

USE = Use("small", "demo", "2026-11-24T08:00:00Z", "topk", 2.0, 10, 1000, 500, 5, None)
RUN = TaughtRun("demo", "2026-11-24T07:00:00Z", 2, 10, 1000, 40.0, 30.0, 2, "cpu")
KEYS = [f"{number:032x}" for number in range(8)]


def test_what_is_entered_comes_back_by_time(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    later = replace(USE, student="späť", finished_at="2026-12-01T00:00:00Z", epochs=1.5)
    assert record_use(files, KEYS[0], later)
    assert record_use(files, KEYS[1], USE)
    assert load_uses(files) == [USE, later]
    record_taught(files, KEYS[0], RUN)
    assert load_taught(files) == [RUN]


def test_a_use_said_twice_counts_once_and_a_teaching_run_is_replaced(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    assert record_use(files, KEYS[0], USE)
    assert not record_use(files, KEYS[0], replace(USE, tokens=9))
    assert load_uses(files) == [USE]
    record_taught(files, KEYS[0], RUN)
    record_taught(files, KEYS[0], replace(RUN, units=3))
    assert [run.units for run in load_taught(files)] == [3]


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda key: record_use(LocalFiles(tmp_path), key, replace(USE, run=key)), KEYS))
    assert all(done)
    assert sorted(use.run for use in load_uses(LocalFiles(tmp_path))) == KEYS


@pytest.mark.parametrize("key", ["", "A" * 32, "0" * 31, "0" * 33, "../" + "0" * 29])
def test_a_key_is_no_path(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="32 hex digits"):
        record_use(LocalFiles(tmp_path), key, USE)
    with pytest.raises(ValueError, match="32 hex digits"):
        record_taught(LocalFiles(tmp_path), key, RUN)


def test_other_files_are_let_be_and_a_later_releases_words_too(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write(f"{USES}/notes.txt", b"mine")
    files.write(f"{USES}/{KEYS[0]}.json", json.dumps(asdict(USE) | {"carbon_g": 3}).encode())
    assert load_uses(files) == [USE]


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", "many"), ("tokens", 1.5), ("tokens", -1), ("tokens", True), ("tokens", None), ("student", 3),
     ("temperature", float("inf")), ("temperature", "2"), ("epochs", "one"), ("epochs", float("nan"))],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused(tmp_path: Path, name: str, value: object) -> None:
    files = LocalFiles(tmp_path)
    files.write(f"{USES}/{KEYS[0]}.json", json.dumps(asdict(USE) | {name: value}).encode())
    with pytest.raises(CorruptShard, match=f"{KEYS[0]}.json cannot be read") as caught:
        load_uses(files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", [USES, TAUGHT])
def test_a_flipped_bit_is_seen_or_harmless(tmp_path: Path, folder: str) -> None:
    """A bit of every byte of both kinds of file: an error that names it, or the same record."""
    files = LocalFiles(tmp_path)
    record_use(files, KEYS[0], USE)
    record_taught(files, KEYS[0], RUN)
    name = f"{folder}/{KEYS[0]}.json"
    whole = files.read(name)
    held: dict[str, Callable[[], Any]] = {USES: lambda: load_uses(files), TAUGHT: lambda: load_taught(files)}
    errors = []
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        (tmp_path / name).write_bytes(damaged)
        try:
            found = held[folder]()
        except CorruptShard as error:
            errors.append(str(error))
        else:
            assert found == [USE if folder == USES else RUN]
    assert len(errors) > 0.7 * len(whole)
    assert all(name in line for line in errors)


@pytest.mark.parametrize("missing", list(asdict(RUN)))
def test_a_file_that_lacks_a_number_is_refused(tmp_path: Path, missing: str) -> None:
    files = LocalFiles(tmp_path)
    files.write(f"{TAUGHT}/{KEYS[0]}.json", json.dumps({k: v for k, v in asdict(RUN).items() if k != missing}).encode())
    with pytest.raises(CorruptShard, match=missing):
        load_taught(files)


@given(
    passes=st.lists(st.integers(0, 10**9), max_size=4),
    parts=st.lists(st.integers(1, 10**9), min_size=1, max_size=4),
    speed=st.floats(0.1, 1e6),
    overhead=st.floats(1, 10),
)
def test_saved_and_break_even_agree(passes: list[int], parts: list[int], speed: float, overhead: float) -> None:
    """Saved is zero at the break-even, negative before it."""
    held = sum(parts)
    runs = [replace(RUN, tokens=t, actor_seconds=t / speed, wall_s=overhead * t / speed, actors=1) for t in parts]
    found = reuse([replace(USE, tokens=t) for t in passes], runs, store_tokens=held)
    assert found.teacher_hours_spent == pytest.approx(overhead * held / speed / 3600)
    assert found.break_even_passes == pytest.approx(overhead)
    assert found.passes == sum(passes) / held
    assert found.teacher_hours_saved is not None
    expected = (found.passes - overhead) * held / speed / 3600
    assert found.teacher_hours_saved == pytest.approx(expected, rel=1e-6, abs=1e-9 * held / speed)


def test_work_done_twice_is_paid_twice() -> None:
    """After a repair, say: the runs have scored more than the store holds."""
    found = reuse([], [RUN, RUN], store_tokens=1000)
    assert found.teacher_hours_spent == pytest.approx(2 * 2 * 30 / 3600)
    assert found.break_even_passes == pytest.approx(2 * 60 / 40)


def test_time_is_stated_in_utc() -> None:
    assert utc_now().endswith("Z")
    assert len(utc_now()) == len(USE.finished_at)
