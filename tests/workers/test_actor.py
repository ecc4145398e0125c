"""The actor: by itself, and two of them in a real local Ray."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from stillroom.pipeline.cluster import session
from stillroom.pipeline.recipe.teacher_schema import RayConfig
from stillroom.storage.errors import BadLogits, IdentityMismatch
from stillroom.storage.files import open_files
from stillroom.storage.identity import Identity
from stillroom.storage.records import Sequence, SignalSpec, TopK, TopKSpec, Unit
from stillroom.storage.shard import ShardReader, write_shard
from stillroom.workers.actor import TeacherActor, remote_actor
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.tiny import tiny_teacher

EXACT = SignalSpec(TopKSpec(12, None))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    # Heads of 16 channels: with 8, torch's attention itself differs in the last bits between thread counts.
    folder = tiny_teacher(tmp_path_factory.mktemp("actor") / "teacher", padded=16, head_dim=16)
    return TeacherSpec(folder=folder, device="cpu", threads=1, batch_tokens=64)


@pytest.fixture(scope="module")
def teacher(spec: TeacherSpec) -> TorchTeacher:
    return TorchTeacher(spec)


@pytest.fixture(scope="module")
def identity(teacher: TorchTeacher) -> Identity:
    return Identity(teacher="tiny", signal=EXACT, **teacher.identity_parts())


def work(vocabulary: int, seed: int) -> tuple[Unit, list[Sequence]]:
    rng = np.random.default_rng(seed)
    sequences = [
        Sequence(rng.integers(0, vocabulary, length).astype(np.int32), context)
        for length, context in ((20, 0), (1, 0), (33, 7), (6, 1))
    ]
    tokens = tuple(len(s.input_ids) for s in sequences)
    return Unit(tuple(s.digest for s in sequences), tokens, tuple(s.context for s in sequences)), sequences


def assert_near(got: TopK | None, want: TopK | None) -> None:
    """As near as the codec leaves them: gaps in float32, the tail rounded."""
    assert got is not None
    assert want is not None
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_allclose(got.logits, want.logits, atol=1e-6)
    np.testing.assert_allclose(got.tail_lse, want.tail_lse, atol=1e-2)


def test_a_unit_becomes_a_shard_and_a_receipt(
    spec: TeacherSpec, teacher: TorchTeacher, identity: Identity, tmp_path: Path
) -> None:
    actor = TeacherActor(spec, identity, str(tmp_path / "store"))
    assert json.dumps(actor.ready())
    unit, sequences = work(identity.vocabulary, 0)
    receipt = actor.score_unit(unit, sequences)
    assert (receipt.sequences, receipt.tokens, receipt.rows) == (4, 60, 60 - 6)
    assert receipt.batches == len(teacher.batches(sequences)) == 2
    assert receipt.shard.unit == unit.id
    reader = ShardReader(open_files(str(tmp_path / "store")), receipt.shard, identity)
    for stored, sequence, block in zip(reader, sequences, teacher.score(sequences, signal=EXACT), strict=True):
        assert stored.sequence.digest == sequence.digest
        assert stored.signal is not None
        assert_near(stored.signal.topk, block.topk)
    assert reader.footer["provenance"] == teacher.provenance(sequences)
    assert actor.score_unit(unit, sequences).shard == receipt.shard


def test_a_unit_is_scored_while_another_is_written(
    spec: TeacherSpec, identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first unit's writing waits here for the second to be scored; and both shards are those of one call after
    the other."""
    actor = TeacherActor(spec, identity, str(tmp_path / "store"))
    actor.ready()
    units = [work(identity.vocabulary, seed) for seed in (0, 1)]
    first, second = (unit.id for unit, _ in units)
    expected = {unit.id: actor.score_unit(unit, sequences).shard for unit, sequences in units}
    writing, scored = threading.Event(), threading.Event()

    def slow_write(*arguments: Any) -> Any:
        if arguments[2].id == first:
            writing.set()
            assert scored.wait(60), "the second unit was not scored meanwhile"
        else:
            scored.set()
        return write_shard(*arguments)

    monkeypatch.setattr("stillroom.workers.actor.write_shard", slow_write)
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(actor.score_unit, *units[0])
        assert writing.wait(60)
        two = threads.submit(actor.score_unit, *units[1])
        assert one.result().shard == expected[first]
        assert two.result().shard == expected[second]


def test_whatever_asks_the_teacher_computes_in_one_thread(
    spec: TeacherSpec, identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second thread that computes, even once, has OpenMP's workers sleep between operations from then on."""
    threads = []

    class Watched(TorchTeacher):
        def __init__(self, spec: TeacherSpec) -> None:
            threads.append(threading.get_ident())
            super().__init__(spec)

        def score_with_truth(self, *arguments: Any, **named: Any) -> Any:
            threads.append(threading.get_ident())
            return super().score_with_truth(*arguments, **named)

        def release(self) -> None:
            threads.append(threading.get_ident())
            super().release()

    monkeypatch.setattr("stillroom.workers.actor.TorchTeacher", Watched)
    actor = TeacherActor(spec, identity, str(tmp_path / "store"))
    units = [work(identity.vocabulary, seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as callers:
        list(callers.map(lambda unit: actor.score_unit(*unit), units))
    actor.probe(units[0][1])
    actor.release()
    assert len(threads) > len(units) + 2
    assert len(set(threads)) == 1


def test_the_probe_compares_a_batch_with_its_sequences_alone(spec: TeacherSpec, identity: Identity) -> None:
    _, sequences = work(identity.vocabulary, 0)
    found = TeacherActor(spec, identity, "unused").probe(sequences)
    assert found["positions"] > 0
    assert 0 <= found["kl_mean_nats"] < 1e-6


def test_a_batch_that_does_not_fit_is_halved_and_the_shard_says_so(
    spec: TeacherSpec, identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, sequences = work(identity.vocabulary, 0)
    whole = TeacherActor(spec, identity, str(tmp_path / "whole")).score_unit(unit, sequences)
    score = TorchTeacher._score_batch

    def tight(self: TorchTeacher, sequences: list[Sequence], *rest: Any) -> Any:
        if len(sequences) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB")
        return score(self, sequences, *rest)

    monkeypatch.setattr(TorchTeacher, "_score_batch", tight)
    actor = TeacherActor(spec, identity, str(tmp_path / "halved"))
    halved = actor.score_unit(unit, sequences)
    assert (whole.halved, whole.batches, halved.halved, halved.batches) == (0, 2, 2, 4)
    monkeypatch.undo()
    again = actor.score_unit(unit, sequences)
    assert (again.halved, again.batches) == (0, 2), "there is room now"
    assert again.shard == whole.shard
    blocks = []
    for receipt, name in ((whole, "whole"), (halved, "halved")):
        reader = ShardReader(open_files(str(tmp_path / name)), receipt.shard, identity)
        blocks.append([stored.signal.topk for stored in reader if stored.signal])
        shapes = reader.footer["provenance"]["batch_shapes"]
        assert [rows for rows, _ in shapes] == ([1, 3] if name == "whole" else [1, 1, 1, 1])
    for one, other in zip(*blocks, strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)


@pytest.mark.parametrize("part", ["weights", "config", "tokenizer", "vocabulary", "dtype"])
def test_another_teacher_than_the_stores_is_refused(
    spec: TeacherSpec, identity: Identity, tmp_path: Path, part: str
) -> None:
    other: Any = 7 if part == "vocabulary" else "other"
    with pytest.raises(IdentityMismatch, match=rf"{part}: store {other}, loaded {getattr(identity, part)}\)"):
        TeacherActor(spec, replace(identity, **{part: other}), str(tmp_path / "store")).ready()


def test_bad_logits_name_the_unit_and_write_nothing(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "teacher", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][250] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    spec = TeacherSpec(folder=folder, device="cpu", threads=1)
    identity = Identity(teacher="tiny", signal=EXACT, **TorchTeacher(spec).identity_parts())
    sequence = Sequence(np.array([3, 250], np.int32))
    unit = Unit((sequence.digest,), (2,), (0,))
    with pytest.raises(BadLogits, match=f"^unit {unit.id}: .* of sequence {sequence.digest}$"):
        TeacherActor(spec, identity, str(tmp_path / "store")).score_unit(unit, [sequence])
    assert not list((tmp_path / "store").rglob("*.parquet"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    # Not a plain ray.init: a process that began without the session's token is refused wherever a later test has one.
    with session(RayConfig(actors=2)):
        yield


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:.*RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO.*:FutureWarning")
def test_two_actors_write_the_same_rows_as_this_process(
    local_ray: None, spec: TeacherSpec, identity: Identity, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    actors = [remote_actor(num_cpus=1).remote(spec, identity, store) for _ in range(2)]
    assert ray.get([a.ready.remote() for a in actors])[0]["engine"] == "torch"
    units = [work(identity.vocabulary, seed) for seed in range(4)]
    receipts = ray.get([actors[i % 2].score_unit.remote(*unit) for i, unit in enumerate(units)])
    swapped = ray.get([actors[(i + 1) % 2].score_unit.remote(*unit) for i, unit in enumerate(units)])
    assert [r.shard for r in swapped] == [r.shard for r in receipts], "either actor writes the same file"
    here = TeacherActor(spec, identity, str(tmp_path / "here"))
    assert [here.score_unit(*unit).shard for unit in units] == [r.shard for r in receipts], "and so does this process"
    with pytest.raises(IdentityMismatch, match="is not the one of store"):
        ray.get(remote_actor(num_cpus=0).remote(spec, replace(identity, weights="other"), store).ready.remote())
    ray.get([a.release.remote() for a in actors])
    for actor in actors:
        ray.kill(actor)
