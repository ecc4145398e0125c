"""rescore.py: the teacher says again what the store holds, or it is found; with tiny real teachers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.pipeline.rescore import batch_tokens_of, rescore_store
from stillroom.storage.calibration import Calibration, save_calibration
from stillroom.storage.care.difference import band_of, difference
from stillroom.storage.errors import IdentityMismatch, TeacherError
from stillroom.storage.files import open_files
from stillroom.storage.identity import Identity
from stillroom.storage.records import HiddenSpec, NucleusSpec, SampledSpec, Sequence, Signal, SignalSpec, TopK, TopKSpec
from stillroom.storage.store import Store, create_store
from stillroom.workers import batching
from stillroom.workers.actor import TeacherActor
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.storage.damage import shards
from tests.strategies import exact_lse, random_logits, random_sequences, topk_of, unit_of
from tests.tiny import tiny_teacher

ALL = SignalSpec(TopKSpec(8), SampledSpec(20), HiddenSpec(32, "bfloat16"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("rescore") / "teacher", head_dim=16)


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shapes and tokenizer, with other weights."""
    return tiny_teacher(tmp_path_factory.mktemp("rescore") / "another", head_dim=16, seed=1)


@pytest.fixture(scope="module")
def sequences() -> list[Sequence]:
    return random_sequences(np.random.default_rng(5), 24, vocabulary=300, shortest=4, longest=30)


def taught(
    path: Path, folder: Path, sequences: list[Sequence], signal: SignalSpec = ALL, *, batch_tokens: int = 64,
    teacher: str | None = None, dtype: Any = "float32",
) -> Store:  # fmt: skip
    """Four units of six sequences, scored by the folder's teacher as an actor does it."""
    spec = TeacherSpec(folder=folder, device="cpu", threads=1, batch_tokens=batch_tokens, dtype=dtype)
    identity = Identity(teacher=teacher or str(folder), signal=signal, **TorchTeacher(spec).identity_parts())
    store = create_store(str(path), identity)
    actor = TeacherActor(spec, identity, store.uri)
    parts = [sequences[at : at + 6] for at in range(0, 24, 6)]
    store.save_plan([unit_of(part) for part in parts])
    store.commit([actor.score_unit(unit_of(part), part) for part in parts])
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, folder: Path, sequences: list[Sequence]) -> Store:
    return taught(tmp_path_factory.mktemp("rescore") / "store", folder, sequences)


def test_the_same_teacher_says_the_same(store: Store) -> None:
    seen: list[tuple[int, int]] = []
    found = rescore_store(store.uri, 9, device="cpu", progress=lambda done, of: seen.append((done, of)))
    assert found["problems"] == []
    numbers = found["rescored"]
    assert numbers["units"] == numbers["bit_equal_units"] == 4
    assert numbers["positions"] == sum(sum(unit.rows) for unit in store.planned())
    assert numbers["differs"] == []
    for unit in numbers["by_unit"]:
        assert unit["kl_worst_nats"] == unit["logit_worst_nats"] == unit["hidden_error"] == 0
        assert unit["id_overlap"] == unit["draws_equal"] == 1
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_other_batches_stay_within_the_band(
    tmp_path: Path, folder: Path, sequences: list[Sequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exact logits: the last bits move, and nothing else."""
    store = taught(tmp_path / "s", folder, sequences, SignalSpec(TopKSpec(8, None), SampledSpec(20)))
    monkeypatch.setattr("stillroom.pipeline.rescore.batch_tokens_of", lambda shapes: 512)
    found = rescore_store(store.uri, 4, device="cpu")
    assert found["problems"] == []
    assert found["rescored"]["differs"] == ["batch shapes"]
    assert found["rescored"]["bit_equal_units"] < 4
    assert all(unit["kl_mean_nats"] < 1e-7 for unit in found["rescored"]["by_unit"])


def test_the_choice_is_seeded_and_grows(store: Store) -> None:
    def chosen(units: int, seed: int) -> list[str]:
        found = rescore_store(store.uri, units, seed=seed, device="cpu")
        return [unit["unit"] for unit in found["rescored"]["by_unit"]]

    assert chosen(2, 0) == chosen(2, 0) == chosen(3, 0)[:2]
    assert len({tuple(chosen(2, seed)) for seed in range(4)}) > 1


def test_what_is_known_to_be_broken_is_not_chosen(store: Store) -> None:
    skip = {ref.path for ref in shards(store)[:3]}
    found = rescore_store(store.uri, 4, device="cpu", skip=skip)
    assert [unit["unit"] for unit in found["rescored"]["by_unit"]] == [shards(store)[3].unit]
    assert rescore_store(store.uri, 4, skip={ref.path for ref in shards(store)}) == {
        "rescored": {"units": 0},
        "problems": [],
    }


@pytest.mark.parametrize(
    ("signal", "words"),
    [
        (SignalSpec(TopKSpec(8)), "kl_mean_nats"),
        (SignalSpec(TopKSpec(8, 1 / 8, NucleusSpec(0.9))), "kl_mean_nats"),
        (SignalSpec(sampled=SampledSpec(20)), "draws_equal"),
        (SignalSpec(hidden=HiddenSpec(32, "bfloat16")), "hidden_error"),
    ],
)
def test_a_shard_of_another_teacher_is_found(
    tmp_path: Path, folder: Path, another: Path, sequences: list[Sequence], signal: SignalSpec, words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Written under the store's identity, as a node with other weights and no check would have done it."""
    store = taught(tmp_path / "s", folder, sequences, signal)
    victim = store.committed()[unit_of(sequences[6:12]).id]
    with monkeypatch.context() as patch:
        patch.setattr(TeacherActor, "_require_identity", lambda self, parts: None)
        spec = TeacherSpec(folder=another, device="cpu", threads=1, batch_tokens=64)
        forged = TeacherActor(spec, store.identity, store.uri).score_unit(unit_of(sequences[6:12]), sequences[6:12])
    from tests.storage.damage import replace as replaced

    replaced(store, victim, forged.shard, 6)
    found = rescore_store(store.uri, 4, device="cpu")
    (problem,) = found["problems"]
    assert problem["shard"] == forged.shard.path
    assert words in problem["problem"]
    assert found["rescored"]["bit_equal_units"] == 3
    assert len(store.committed()) == 4
    dropped = rescore_store(store.uri, 4, device="cpu", drop=True)
    assert dropped["rescored"]["units_dropped"] == [victim.unit]
    assert victim.unit not in store.committed()
    assert len(store.committed()) == 3


def test_a_store_of_int8_hidden_states_is_compared_by_its_calibration(
    tmp_path: Path, folder: Path, sequences: list[Sequence]
) -> None:
    calibration = Calibration(np.linspace(0.5, 2, 32, dtype=np.float32), np.zeros(32, np.float32))
    sha256 = save_calibration(open_files(str(tmp_path / "s")), calibration)
    store = taught(tmp_path / "s", folder, sequences, SignalSpec(hidden=HiddenSpec(32, "int8", sha256)))
    assert rescore_store(store.uri, 2, device="cpu")["rescored"]["bit_equal_units"] == 2


def test_another_teacher_is_refused_before_it_is_loaded(store: Store, another: Path) -> None:
    with pytest.raises(IdentityMismatch, match=r"weights: store .*--teacher"):
        rescore_store(store.uri, 1, teacher=str(another), device="cpu")


def test_a_teacher_that_has_moved_is_named(
    tmp_path: Path, folder: Path, sequences: list[Sequence], store: Store
) -> None:
    moved = taught(tmp_path / "s", folder, sequences, teacher="/nowhere/to/be/found")
    with pytest.raises(TeacherError, match="nowhere"):
        rescore_store(moved.uri, 1, device="cpu")
    assert rescore_store(moved.uri, 1, teacher=str(folder), device="cpu")["problems"] == []


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 400))
def test_the_batches_are_made_again_from_their_shapes(lengths: list[int], budget: int) -> None:
    made = batching.batches(lengths, budget)
    found = batch_tokens_of(batching.shapes(lengths, made))
    assert batching.batches(lengths, found) == made


def exact_kl(p: TopK, q: TopK, row: int) -> float:
    """One position, the long way: a dictionary of what both keep, and all else; then what one side alone keeps."""
    sides = []
    for block in (p, q):
        kept = int(block.kept[row])
        total = np.logaddexp(exact_lse(block.logits[row, :kept]), float(block.tail_lse[row, -1]))
        sides.append(dict(zip(block.ids[row, :kept].tolist(), np.exp(block.logits[row, :kept] - total), strict=True)))
    lowest = [min(side.values()) for side in sides]
    fallen = [
        a * np.log(a / low)
        for side, other, low in ((sides[0], sides[1], lowest[1]), (sides[1], sides[0], lowest[0]))
        for i, a in side.items()
        if i not in other and a > low
    ]
    both = sides[0].keys() & sides[1].keys()
    pairs = [(sides[0][i], sides[1][i]) for i in both]
    pairs.append(tuple(1 - sum(side[i] for i in both) for side in sides))
    return float(sum(a * np.log(a / b) for a, b in pairs) + sum(fallen))


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.floats(0, 2))
def test_the_numbers_are_those_of_the_long_way(seed: int, k: int, other_k: int, apart: float) -> None:
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, 4, 40)
    p, q = topk_of(logits, k), topk_of(logits + rng.normal(0, apart, logits.shape), other_k)
    found = difference(Signal(p), Signal(q))
    kl = [exact_kl(p, q, row) for row in range(4)]
    assert found.kl_mean_nats == pytest.approx(np.mean(kl), rel=1e-4, abs=1e-6)
    assert found.kl_worst_nats == pytest.approx(max(kl), rel=1e-4, abs=1e-6)
    overlap = [len(set(p.ids[row].tolist()) & set(q.ids[row].tolist())) / k for row in range(4)]
    assert found.id_overlap == pytest.approx(np.mean(overlap))


def test_of_two_nuclei_without_a_common_id_the_difference_is_all() -> None:
    low, high = np.arange(12.0)[None, :], np.arange(12.0)[None, ::-1].copy()
    found = difference(Signal(topk_of(low, 2)), Signal(topk_of(high, 2)))
    assert found.id_overlap == 0
    assert found.kl_mean_nats == pytest.approx(
        2 * 0.632, abs=1e-3
    )  # the top id of each is a nat too high for the other
    assert found.logit_worst_nats == 0.0


class TestBand:
    def test_a_finer_dtype_and_a_finer_step_allow_less(self) -> None:
        exact = SignalSpec(TopKSpec(8, None))
        assert band_of("float32", exact).kl_mean_nats < band_of("bfloat16", exact).kl_mean_nats
        assert band_of("float32", exact).kl_mean_nats < band_of("float32", SignalSpec(TopKSpec(8))).kl_mean_nats

    def test_the_stores_own_band_counts_where_it_is_wider(self) -> None:
        signal = SignalSpec(TopKSpec(8, None))
        assert band_of("float32", signal, (1e-7, 1e-6)) == band_of("float32", signal)
        wide = band_of("float32", signal, (1e-3, 1e-2))
        assert (wide.kl_mean_nats, wide.kl_worst_nats) == pytest.approx((3e-3, 3e-2))
        assert "own" in wide.source

    def test_each_number_is_judged(self) -> None:
        band = band_of("float32", ALL)
        same = difference(Signal(topk_of(np.arange(12.0)[None], 2)), Signal(topk_of(np.arange(12.0)[None], 2)))
        assert band.misses(same) == []
        assert len(band.misses(replace(same, kl_worst_nats=1.0))) == 1
        assert len(band.misses(replace(same, draws_equal=0.5, hidden_error=0.5))) == 2
        assert len(band.misses(replace(same, kl_mean_nats=float("nan")))) == 1
