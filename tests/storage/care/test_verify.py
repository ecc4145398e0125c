"""verify.py and query.py: what is wrong is reported by name, what is right is not."""

from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.care.verify import verify_store
from stillroom.storage.catalog.inspect import inspect_store, list_stores
from stillroom.storage.errors import StoreError
from stillroom.storage.records import HiddenSpec, NucleusSpec, SampledSpec, Sequence, Signal, SignalSpec, TopKSpec
from stillroom.storage.shard import write_shard
from stillroom.storage.store import Store, create_store
from tests.strategies import (
    digest_teacher,
    named_receipt,
    next_token_teacher,
    random_sequences,
    tiny_identity,
    tiny_store,
    topk_of,
    unit_of,
    write_unit,
)


@pytest.fixture
def sequences() -> list[Sequence]:
    """More than 200 positions, so that the alignment is judged."""
    return random_sequences(np.random.default_rng(3), 30, shortest=10, longest=24)


@pytest.fixture
def store(tmp_path: Path, sequences: list[Sequence]) -> Store:
    return tiny_store(tmp_path / "store", sequences, per_unit=10, teacher=next_token_teacher)


def path_of(store: Store, number: int = 0) -> Path:
    return Path(store.uri, sorted(ref.path for ref in store.committed().values())[number])


def test_a_clean_store_has_no_problems(store: Store, sequences: list[Sequence]) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_store(store.uri, lambda done, of: seen.append((done, of)))
    assert report["problems"] == []
    assert report["shards"] == 3
    assert report["rows"] == sum(s.rows for s in sequences)
    assert report["alignment"]["+1"] == 1.0
    assert report["uncommitted_files"] == 0
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_an_empty_store_has_no_problems(tmp_path: Path) -> None:
    create_store(str(tmp_path), tiny_identity())
    assert verify_store(str(tmp_path))["problems"] == []


def test_leftovers_are_counted_and_no_problem(store: Store) -> None:
    write_unit(store, random_sequences(np.random.default_rng(1), 2, shortest=30, longest=40))
    report = verify_store(store.uri)
    assert report["uncommitted_files"] == 1
    assert report["problems"] == []


@pytest.mark.parametrize("number", range(3))
def test_a_flipped_bit_is_reported_by_name(store: Store, number: int) -> None:
    path = path_of(store, number)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (problem,) = verify_store(store.uri)["problems"]
    assert problem["shard"] == f"shards/{path.name}"
    assert "sha256" in problem["problem"]


def test_a_missing_shard_is_reported_by_name_and_the_rest_is_read(store: Store) -> None:
    path_of(store, 1).unlink()
    report = verify_store(store.uri)
    (problem,) = report["problems"]
    assert problem["shard"] == sorted(ref.path for ref in store.committed().values())[1]
    assert problem["problem"] == "the log names it, and it is not in the store"
    assert report["alignment"]["+1"] == 1.0


def _commit(store: Store, sequences: list[Sequence], blocks: list[Signal]) -> str:
    """Commit blocks that the codec accepts, whatever they mean."""
    unit = unit_of(sequences)
    store.save_plan([unit])
    ref = write_shard(store.files, store.identity, unit, sequences, blocks, {})
    receipt = named_receipt(0)
    store.commit([type(receipt)(ref, len(sequences), 0, 0, 1, 0.0)])
    return ref.path


@pytest.mark.parametrize(("roll", "at"), [(1, "+0"), (-1, "+2")])
def test_shifted_rows_are_reported(tmp_path: Path, sequences: list[Sequence], roll: int, at: str) -> None:
    """The mistake that trains every student a token too late: digests are right, rows are in the wrong place."""
    store = create_store(str(tmp_path / "s"), tiny_identity())
    blocks = [Signal(topk_of(np.roll(next_token_teacher(s, 40), roll, axis=0), 4)) for s in sequences]
    _commit(store, sequences, blocks)
    (problem,) = verify_store(store.uri)["problems"]
    assert "rows look shifted" in problem["problem"]
    assert f"the token at {at}" in problem["problem"]


def test_a_teacher_that_knows_nothing_is_not_reported_as_shifted(tmp_path: Path) -> None:
    """Agreement at every shift is chance, and one of five chances is the largest."""
    for seed in range(5):
        sequences = random_sequences(np.random.default_rng(seed), 30, shortest=10, longest=24)
        store = tiny_store(tmp_path / str(seed), sequences, per_unit=30, teacher=digest_teacher)
        assert verify_store(store.uri)["problems"] == []


def test_a_text_of_one_token_is_not_reported_as_shifted(tmp_path: Path) -> None:
    """Every shift agrees always: a tie is no evidence."""
    sequences = [Sequence(np.full(length, 7, np.int32)) for length in range(20, 40)]
    store = tiny_store(tmp_path / "s", sequences, per_unit=20, teacher=next_token_teacher)
    assert verify_store(store.uri)["problems"] == []


def test_a_tail_that_is_no_log_partition_is_reported(tmp_path: Path, sequences: list[Sequence]) -> None:
    store = create_store(str(tmp_path / "s"), tiny_identity())
    topks = [topk_of(next_token_teacher(s, 40), 4) for s in sequences]
    topks[2].tail_lse[1, 4] += 0.5
    path = _commit(store, sequences, [Signal(topk) for topk in topks])
    (problem,) = verify_store(store.uri)["problems"]
    assert problem["shard"] == path
    assert sequences[2].digest in problem["problem"]
    assert "not convex" in problem["problem"]


def test_a_shard_that_no_plan_names_is_reported(store: Store) -> None:
    for plan in Path(store.uri, "_stillroom/plans").iterdir():
        plan.unlink()
    problems = verify_store(store.uri)["problems"]
    assert len(problems) == 3
    assert all("no saved plan names this unit" in p["problem"] for p in problems)


def test_stores_below_a_folder_are_listed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "bad" / "_stillroom").mkdir(parents=True)
    (tmp_path / "bad" / "_stillroom" / "identity.json").write_text("{")
    bad, good = list_stores(str(tmp_path))
    assert bad["store"] == str(tmp_path / "bad")
    assert "cannot be read" in bad["error"]
    assert good["store"] == store.uri
    assert (good["shards"], good["sequences"]) == (3, 30)
    assert good["bytes"] == sum(path_of(store, n).stat().st_size for n in range(3))
    assert good["units_planned_not_committed"] == 0
    with pytest.raises(StoreError, match="is no folder"):
        list_stores(str(tmp_path / "nowhere"))


def test_inspection_tells_sizes_and_positions(store: Store, sequences: list[Sequence]) -> None:
    tokens = sum(len(s.input_ids) for s in sequences)
    report = inspect_store(store.uri)
    assert report["tokens"] == tokens
    assert report["rows"] == sum(s.rows for s in sequences)
    assert report["bytes_per_token"] == pytest.approx(report["bytes"] / tokens, abs=0.01)
    assert set(report["columns_bytes_per_token"]) == {
        "sequence", "context", "input_ids", "topk_ids", "topk_gap", "top_logit", "tail_code"
    }  # fmt: skip
    assert sum(report["columns_bytes_per_token"].values()) < report["bytes_per_token"]
    unit = unit_of(sequences[:10])
    shown = inspect_store(store.uri, unit.id[:8], positions=3)
    first = shown["sequences"][0]
    assert first["sequence"] == sequences[0].digest
    assert [p["position"] for p in first["positions"]] == [0, 1, 2]
    for p in first["positions"]:
        assert p["top_ids"][0] == int(sequences[0].input_ids[p["position"] + 1])
        assert sum(p["top_probabilities"]) + p["tail_probability"] == pytest.approx(1, abs=1e-3)
    with pytest.raises(StoreError, match="0 committed units begin with 'zz'"):
        inspect_store(store.uri, "zz")
    with pytest.raises(StoreError, match="3 committed units begin with ''"):
        inspect_store(store.uri, "")


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"rot" * 50), lambda p: p.write_bytes(b"")]
)
@pytest.mark.parametrize("number", range(3))
def test_inspection_of_a_damaged_store_names_the_file(store: Store, damage, number: int) -> None:  # type: ignore[no-untyped-def]
    path = path_of(store, number)
    damage(path)
    with pytest.raises(StoreError, match=path.name):
        inspect_store(store.uri)


@pytest.fixture
def nucleus_store(tmp_path: Path, sequences: list[Sequence]) -> Store:
    """Rows of one to six ids."""
    identity = tiny_identity(signal=SignalSpec(TopKSpec(6, 1 / 8, NucleusSpec(0.9))))
    store = tiny_store(tmp_path / "n", sequences, identity=identity, per_unit=10, teacher=next_token_teacher)
    kept = [s.signal.topk.kept for s in store.sequences() if s.signal is not None and s.signal.topk is not None]
    assert set(np.concatenate(kept).tolist()) > {1, 2, 6}
    return store


def test_a_clean_store_of_nuclei_has_no_problems(nucleus_store: Store, sequences: list[Sequence]) -> None:
    """Unused slots are no logits that are not finite, no ids outside the vocabulary and no repeated ones."""
    report = verify_store(nucleus_store.uri)
    assert report["problems"] == []
    assert report["rows"] == sum(s.rows for s in sequences)
    assert report["alignment"]["+1"] == 1.0


def test_inspection_shows_of_a_nucleus_what_it_keeps(nucleus_store: Store, sequences: list[Sequence]) -> None:
    shown = inspect_store(nucleus_store.uri, unit_of(sequences[:10]).id, positions=99)
    stored = {s.sequence.digest: s.signal for s in nucleus_store.sequences()}
    for sequence in shown["sequences"]:
        signal = stored[sequence["sequence"]]
        assert signal is not None
        assert signal.topk is not None
        for p, kept in zip(sequence["positions"], signal.topk.kept.tolist(), strict=True):
            assert len(p["top_ids"]) == len(p["top_probabilities"]) == min(kept, 5)
            assert min(p["top_ids"]) >= 0


@pytest.mark.parametrize(
    ("signal", "words"),
    [
        (SignalSpec(TopKSpec(6, 1 / 8, NucleusSpec(0.9))), "top-6 (1/8 nat, nucleus 0.9)"),
        (SignalSpec(sampled=SampledSpec(9)), "9 draws"),
        (SignalSpec(TopKSpec(4), hidden=HiddenSpec(8, "bfloat16")), "top-4 (1/8 nat) + hidden bfloat16 (8)"),
    ],
)
def test_any_signal_is_verified_listed_and_inspected(
    tmp_path: Path, sequences: list[Sequence], signal: SignalSpec, words: str
) -> None:
    identity = tiny_identity(signal=signal)
    store = tiny_store(tmp_path / "any", sequences[:6], identity=identity, teacher=next_token_teacher)
    report = verify_store(store.uri)
    assert report["problems"] == []
    assert report["rows"] == sum(s.rows for s in sequences[:6])
    (listed,) = list_stores(str(tmp_path / "any"))
    assert listed["signal"] == words
    inspected = inspect_store(store.uri)
    assert ("logit" in inspected) == (signal.topk is not None)
    assert inspected["identity_parts"]["signal"] == signal.as_dict()
    unit = inspect_store(store.uri, unit_of(sequences[:5]).id)
    assert [s["sequence"] for s in unit["sequences"]] == [s.digest for s in sequences[:5]]
