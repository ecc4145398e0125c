"""What a faulty writer or disk can do beyond a flipped bit in a shard: `verify` says to which file, and what to do."""

from collections.abc import Callable
from dataclasses import replace as but
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stillroom.storage import shard
from stillroom.storage.calibration import Calibration, save_calibration
from stillroom.storage.care.repair import repair_store
from stillroom.storage.care.verify import verify_store
from stillroom.storage.files import open_files, sha256_hex
from stillroom.storage.records import HiddenSpec, SampledSpec, Sequence, SignalSpec, TopKSpec
from stillroom.storage.store import Store
from tests.storage.damage import edit_entry, flip, replace, shards, tampered, values
from tests.strategies import (
    digest_teacher,
    next_token_teacher,
    random_sequences,
    tiny_identity,
    tiny_store,
    unit_of,
    write_unit,
)


@pytest.fixture
def sequences() -> list[Sequence]:
    return random_sequences(np.random.default_rng(3), 30, shortest=10, longest=24)


@pytest.fixture
def store(tmp_path: Path, sequences: list[Sequence]) -> Store:
    return tiny_store(tmp_path / "store", sequences, per_unit=10, teacher=next_token_teacher)


def problem_of(store: Store) -> dict[str, str]:
    """The only problem there is; it says what to do."""
    (problem,) = verify_store(store.uri)["problems"]
    assert problem.keys() in ({"shard", "problem", "remedy"}, {"file", "problem", "remedy"})
    assert problem["remedy"]
    return dict(problem)


def put(at: int, value: float) -> Callable[[Any], Any]:
    def change(found: Any) -> Any:
        found[at] = value
        return found

    return change


def swap(one: int, other: int) -> Callable[[Any], Any]:
    def change(found: Any) -> Any:
        found[[one, other]] = found[[other, one]]
        return found

    return change


def same(to: int, of: int) -> Callable[[Any], Any]:
    def change(found: Any) -> Any:
        found[to] = found[of]
        return found

    return change


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("top_logit", put(5, np.nan), "not finite"),
        ("top_logit", put(5, -np.inf), "not finite"),
        ("topk_gap", swap(1, 3), "do not fall with rank"),
        ("topk_ids", put(9, 40), "outside 0 … 39"),
        ("topk_ids", put(9, -1), "outside 0 … 39"),
        ("topk_ids", same(9, 8), "stands twice"),
        ("tail_code", put(3, -5000), "not convex"),
        # Straight up from log(V − K) is convex; no ids below the lowest kept logit can make it so steep.
        ("tail_code", put(0, 60_000), "more than V − K ids"),
    ],
)
def test_rows_that_break_the_contract_are_reported(store: Store, column: str, change: Any, words: str) -> None:
    ref = shards(store)[1]
    fresh = tampered(store, ref, values(column, change))
    problem = problem_of(store)
    assert problem["shard"] == fresh.path
    assert words in problem["problem"]
    assert f"`stillroom verify {store.uri} --repair`" in problem["remedy"]


def test_text_that_is_not_what_was_planned_is_reported(store: Store) -> None:
    tampered(store, shards(store)[0], values("input_ids", put(0, 39)))
    assert "do not give the digests of the planned sequences" in problem_of(store)["problem"]


def test_a_column_of_wrong_digests_is_reported(store: Store) -> None:
    def change(table: pa.Table) -> pa.Table:
        digests = pa.array(["0" * 32] * table.num_rows)
        return table.set_column(0, table.schema.field("sequence"), digests)

    tampered(store, shards(store)[0], change)
    assert "column `sequence`" in problem_of(store)["problem"]


def test_many_bad_sequences_of_a_shard_are_one_problem(store: Store) -> None:
    tampered(store, shards(store)[0], values("top_logit", lambda found: found * np.nan))
    assert "(and 9 more of its sequences)" in problem_of(store)["problem"]


@pytest.mark.parametrize("column", ["sampled_ids", "sampled_draws"])
def test_draws_that_cannot_be_are_reported(tmp_path: Path, sequences: list[Sequence], column: str) -> None:
    identity = tiny_identity(signal=SignalSpec(sampled=SampledSpec(9)))
    store = tiny_store(tmp_path / "s", sequences, identity=identity, per_unit=30, teacher=next_token_teacher)
    assert verify_store(store.uri)["alignment"]["+1"] > 0.98  # of the first id instead of the most drawn: 0.91
    fresh = tampered(store, shards(store)[0], values(column, put(7, 41)))
    assert problem_of(store)["shard"] == fresh.path


def test_draws_that_are_shifted_are_reported(tmp_path: Path, sequences: list[Sequence]) -> None:
    def late(sequence: Sequence, vocabulary: int) -> Any:
        return np.roll(next_token_teacher(sequence, vocabulary), 1, axis=0)

    identity = tiny_identity(signal=SignalSpec(sampled=SampledSpec(9)))
    store = tiny_store(tmp_path / "s", sequences, identity=identity, teacher=late)
    problem = problem_of(store)
    assert problem["shard"] == "all"
    assert "repeat their input" in problem["problem"]
    assert f"`stillroom verify {store.uri} --rescore 4`" in problem["remedy"]


class TestLog:
    def test_a_size_that_is_not_the_files_is_reported(self, store: Store) -> None:
        ref = shards(store)[2]
        replace(store, ref, but(ref, size_bytes=7), 10)
        problem = problem_of(store)
        assert problem["shard"] == ref.path
        assert "7 bytes" in problem["problem"]

    def test_a_count_that_is_not_the_files_is_reported(self, store: Store) -> None:
        ref = shards(store)[2]
        replace(store, ref, ref, 11)
        assert "11 sequences, the file" in problem_of(store)["problem"]

    def test_a_count_that_is_not_stated_is_reported(self, store: Store) -> None:
        edit_entry(store, 1, lambda text: text.replace("numRecords", "numRecordt"))
        problems = verify_store(store.uri)["problems"]
        assert len(problems) == 3
        assert all("an unknown number of sequences" in p["problem"] for p in problems)

    def test_an_action_that_delta_passes_over_is_reported(self, store: Store) -> None:
        """A flipped bit in "add" takes a shard out, and every reader of the log agrees."""
        name = edit_entry(store, 1, lambda text: text.replace('{"add"', '{"aed"', 1))
        assert len(store.committed()) == 2
        problem = problem_of(store)
        assert problem["file"] == name
        assert "'aed' is no action" in problem["problem"]

    def test_an_entry_that_is_missing_is_reported(self, store: Store, sequences: list[Sequence]) -> None:
        store.commit([write_unit(store, sequences[:1])])
        store.commit([write_unit(store, sequences[1:2])])
        store.save_plan([unit_of(sequences[:1]), unit_of(sequences[1:2])])
        name = f"_delta_log/{2:020d}.json"
        Path(store.uri, name).unlink()
        first, *_ = verify_store(store.uri)["problems"]
        assert (first["file"], first["problem"]) == (name, "this entry of the log is missing")

    @pytest.mark.parametrize(
        ("old", "new"),
        [('{"add"', '{"add'), ('"path"', '"qath"'), ('"size"', '"tize"'), ('"path":"shards', '"path":"shbrds')],
    )
    def test_an_entry_that_nobody_can_read_is_named(self, store: Store, old: str, new: str) -> None:
        """The log cannot be opened then, and delta-rs does not say which file of it is at fault."""
        name = edit_entry(store, 1, lambda text: text.replace(old, new, 1))
        first, *_ = verify_store(store.uri)["problems"]
        assert first["file"] == name
        assert first["problem"].startswith("line ")

    def test_columns_that_shards_do_not_have_are_reported(self, store: Store) -> None:
        """Polars and DuckDB go by them."""
        name = edit_entry(store, 0, lambda text: text.replace("top_logit", "top_logiu"))
        problem = problem_of(store)
        assert problem["file"] == name
        assert "top_logiu" in problem["problem"]


def test_a_damaged_plan_is_reported_beside_healthy_ones(store: Store, sequences: list[Sequence]) -> None:
    extra = random_sequences(np.random.default_rng(9), 4)
    store.save_plan([unit_of(extra)])
    first, _ = sorted(Path(store.uri, "_stillroom/plans").iterdir())
    flip(first)
    problems = verify_store(store.uri)["problems"]
    assert {p.get("file") for p in problems} == {f"_stillroom/plans/{first.name}", None}
    assert sum("no saved plan names this unit" in p["problem"] for p in problems) == 3


def test_a_plan_that_gives_other_lengths_is_reported(store: Store, sequences: list[Sequence]) -> None:
    """Its name holds the digests of the units alone."""
    for path in Path(store.uri, "_stillroom/plans").iterdir():
        path.unlink()
    units = [unit_of(sequences[at : at + 10]) for at in range(0, 30, 10)]
    store.save_plan([but(units[0], tokens=tuple(t + 1 for t in units[0].tokens)), *units[1:]])
    problem = problem_of(store)
    assert problem["shard"] == store.committed()[units[0].id].path
    assert "other lengths" in problem["problem"]


def test_a_damaged_identity_is_reported(store: Store) -> None:
    path = Path(store.uri, "_stillroom/identity.json")
    path.write_text(path.read_text().replace("float32", "float16"))
    problem = problem_of(store)
    assert problem["file"] == "_stillroom/identity.json"
    assert "states id" in problem["problem"]
    path.write_text("{")
    assert "damaged" in problem_of(store)["problem"]


@pytest.fixture
def hidden(tmp_path: Path, sequences: list[Sequence]) -> Store:
    """With all three kinds of side files."""
    files = open_files(str(tmp_path / "hidden"))
    sha256 = save_calibration(files, Calibration(np.full(8, 0.5, np.float32), np.zeros(8, np.float32)))
    files.write(f"_stillroom/head-{sha256_hex(b'head')}.safetensors", b"head")
    unit = unit_of(sequences[:10])
    files.write(f"_stillroom/truth/{unit.id}-{sha256_hex(b'truth')}.parquet", b"truth")
    identity = tiny_identity(signal=SignalSpec(TopKSpec(4), hidden=HiddenSpec(8, "int8", sha256)))
    return tiny_store(tmp_path / "hidden", sequences, identity=identity, per_unit=10, teacher=next_token_teacher)


def side_file(store: Store, kind: str) -> Path:
    (found,) = Path(store.uri, "_stillroom").glob(f"**/{kind}*.*")
    return found


def test_a_store_with_side_files_has_no_problems(hidden: Store) -> None:
    assert verify_store(hidden.uri)["problems"] == []


def test_a_hidden_state_without_a_scale_is_reported(hidden: Store) -> None:
    fresh = tampered(hidden, shards(hidden)[0], values("hidden_scale", put(3, -1.0)))
    problem = problem_of(hidden)
    assert problem["shard"] == fresh.path
    assert "hidden_scale" in problem["problem"]


@pytest.mark.parametrize("kind", ["head-", "truth/"])
def test_a_damaged_side_file_is_reported(hidden: Store, kind: str) -> None:
    path = side_file(hidden, kind)
    flip(path)
    problem = problem_of(hidden)
    assert problem["file"] == path.relative_to(hidden.uri).as_posix()
    assert "sha256" in problem["problem"]


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_without_its_calibration_no_shard_is_called_broken(
    hidden: Store, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be decoded then; a repair that took that for damage would throw the store away."""
    monkeypatch.setattr(shard, "_calibrations", {})  # as in a process that has not read it
    path = side_file(hidden, "calibration")
    damage(path)
    problem = problem_of(hidden)
    assert problem["file"] == path.relative_to(hidden.uri).as_posix()
    assert "put back a copy" in problem["remedy"]
    done = repair_store(hidden.uri)
    assert done["repair"]["units_dropped"] == []
    assert done["problems_left"] == 1
    assert len(hidden.committed()) == 3


def test_without_its_calibration_damaged_shards_are_still_found(hidden: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "_calibrations", {})
    side_file(hidden, "calibration").unlink()
    one, other, _ = shards(hidden)
    flip(Path(hidden.uri, one.path))
    Path(hidden.uri, other.path).unlink()
    found = {p.get("shard") for p in verify_store(hidden.uri)["problems"]}
    assert found == {one.path, other.path, None}


@pytest.mark.parametrize("name", ["int16", "float32"])
def test_a_store_of_format_1_is_clean(name: str) -> None:
    report = verify_store(str(Path(__file__).parents[2] / "golden" / "v1" / name))
    assert report["problems"] == []
    assert (report["shards"], report["sequences"]) == (2, 5)


def test_a_store_of_hidden_states_alone_says_nothing_of_alignment(tmp_path: Path, sequences: list[Sequence]) -> None:
    identity = tiny_identity(signal=SignalSpec(hidden=HiddenSpec(8, "bfloat16")))
    store = tiny_store(tmp_path / "h", sequences, identity=identity, teacher=digest_teacher)
    report = verify_store(store.uri)
    assert report["problems"] == []
    assert report["alignment"] is None
