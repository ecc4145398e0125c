"""One teacher in two processes: tensor parallelism on a real local Ray, by gloo; GPUs take the same path by NCCL."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stillroom.pipeline.cluster import Actors, session
from stillroom.pipeline.options import unit_of
from stillroom.pipeline.pool import Pool
from stillroom.pipeline.recipe.teacher_schema import RayConfig
from stillroom.storage.calibration import find_head
from stillroom.storage.errors import TeacherError
from stillroom.storage.files import open_files
from stillroom.storage.identity import Identity
from stillroom.storage.records import HiddenSpec, LayersSpec, Receipt, Sequence, SignalSpec, TopKSpec
from stillroom.storage.shard import ShardReader, write_shard
from stillroom.workers.actor import remote_actor
from stillroom.workers.teacher import TeacherSpec, TruthRequest
from stillroom.workers.torch_teacher import TorchTeacher
from tests.tiny import tiny_teacher

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:.*RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SIGNAL = SignalSpec(TopKSpec(12, None), None, HiddenSpec(32, "bfloat16"), LayersSpec((1,), 32, "float32"))
CONFIG = RayConfig(actors=1, cpus_per_actor=0.5, retries=2)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with session(CONFIG, ranks=4):
        yield


def spec_of(folder: Path, **options: Any) -> TeacherSpec:
    return TeacherSpec(folder=folder, device="cpu", threads=1, **options)


def units(count: int) -> list[list[Sequence]]:
    rng = np.random.default_rng(0)
    return [[Sequence(rng.integers(0, 259, n).astype(np.int32)) for n in (20, 7, 33)] for _ in range(count)]


def test_two_ranks_give_the_rows_of_one_and_a_lost_rank_costs_no_unit(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "teacher", head_dim=16)
    one = TorchTeacher(spec_of(folder))
    identity = Identity(teacher="tiny", signal=SIGNAL, **one.identity_parts())
    spec, store = spec_of(folder, split="tensors", ranks=2), str(tmp_path / "store")
    made = Actors(lambda **options: remote_actor(**options).remote(spec, identity, store), CONFIG, ranks=2)
    said: list[str] = []
    pool = Pool(made, CONFIG, said.append)
    pool.start()
    try:
        assert pool.ask("probe", units(1)[0])["positions"] == 15
        found = pool.ask("found", units(1)[0])
        assert found == "", "bfloat16 has no calibration"
        work = [(unit_of(sequences), sequences, TruthRequest()) for sequences in units(6)]
        receipts = []
        for event in pool.run(iter(work)):
            if isinstance(event, Receipt):
                receipts.append(event)
                if len(receipts) == 1:
                    _rank_process().kill()
            else:
                assert event is None, event
    finally:
        pool.stop()
    assert pool.retries == 1
    assert len(said) >= 1
    assert {r.shard.unit for r in receipts} == {unit.id for unit, _, _ in work}
    assert find_head(open_files(store)) is not None
    here = open_files(str(tmp_path / "here"))
    for unit, sequences, _ in work:
        receipt = next(r for r in receipts if r.shard.unit == unit.id)
        mine = write_shard(here, identity, unit, sequences, one.score(sequences, signal=SIGNAL), {})
        for theirs, ours in zip(
            _rows(store, receipt.shard, identity), _rows(str(tmp_path / "here"), mine, identity), strict=True
        ):
            assert np.array_equal(theirs.topk.ids, ours.topk.ids)
            assert np.abs(theirs.topk.logits - ours.topk.logits).max() < 1e-4
            assert np.abs(theirs.layers - ours.layers).max() < 1e-4


def _rank_process() -> psutil.Process:
    (found,) = [p for p in psutil.Process().children(recursive=True) if "ray::Rank" in " ".join(p.cmdline())]
    return found


def _rows(store: str, shard: Any, identity: Identity) -> list[Any]:
    reader = ShardReader(open_files(store), shard, identity)
    return [row.signal for group in range(reader.groups) for row in reader.read_group(group)]


def test_what_ranks_cannot_do_is_said(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "bloom", arch="bloom")
    identity = Identity(teacher="t", signal=SIGNAL, **TorchTeacher(spec_of(folder)).identity_parts())
    spec = spec_of(folder, split="tensors", ranks=2)
    store = str(tmp_path / "store")
    made = Actors(lambda **options: remote_actor(**options).remote(spec, identity, store), CONFIG, ranks=2)
    pool = Pool(made, CONFIG, lambda _: None)
    try:
        with pytest.raises(TeacherError, match=r"has no `tp_plan`|no plan for tensor parallelism"):
            pool.start()
    finally:
        pool.stop()
