"""distributed.py, places.py: how several processes share a step; test_ranks.py has the processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student.config import StudentJob
from stillroom.pipeline.student.device import choose_device
from stillroom.pipeline.student.distributed import ALONE, PackName, in_order, require_shared, share, step_seed
from stillroom.pipeline.student.evaluate import Metrics, evaluate
from stillroom.pipeline.student.places import Place
from stillroom.storage.errors import RecipeError, StudentError
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream
from tests.student.world import World

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "there"}


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 60))
def test_the_packs_of_a_step_are_shared_out_whole_and_come_back_in_order(world: int, batch: int, total: int) -> None:
    """As `Session._train_span` does it, on streams that end at `total`: every world-th pack is a rank's."""
    streams = [iter(range(rank, total, world)) for rank in range(world)]
    consumed, seen = 0, []
    while consumed < total:
        own = [
            [number for _, number in zip(range(share(consumed, batch, rank, world)), streams[rank], strict=False)]
            for rank in range(world)
        ]
        group = [
            name.index for name in in_order([[PackName(0, n, str(n)) for n in numbers] for numbers in own], consumed)
        ]
        assert len(group) == min(batch, total - consumed)
        seen += group
        consumed += len(group)
    assert seen == list(range(total))


def test_shares_of_a_step_differ_by_one_pack_at_most() -> None:
    for before in range(7):
        shares = [share(before, 5, rank, 3) for rank in range(3)]
        assert sorted(shares) == [1, 2, 2], before


def test_every_rank_and_step_has_random_numbers_of_its_own() -> None:
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in range(20) for rank in range(8)}
    assert len(seeds) == 320
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, 0, 0) == 6026515587160364050, "checkpoints of several processes resume by it"


def test_a_process_is_a_rank_only_where_the_others_can_be_met() -> None:
    assert Place.here({}) == Place()
    assert Place.here(TORCHRUN) == Place(rank=3, world=4, local=1, locals=2, told=True)
    assert Place.here({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}) == Place()
    assert Place.here({"WORLD_SIZE": "4", "MASTER_ADDR": "there"}) == Place()  # a scheduler's
    assert Place.here({**TORCHRUN, "STILLROOM_RENDEZVOUS": "file:///there"}).launched


def test_more_processes_than_packs_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(StudentError, match=r"batch_packs is 3, and there are 4 processes.*start at most 3"):
        require_shared(Place(world=4), 3)
    require_shared(Place(world=4), 4)
    job = world.job(tmp_path, batch_packs=2)
    with pytest.raises(ValidationError, match=r"batch_packs is 2, processes 3.*at most 2, or raise batch_packs"):
        StudentJob.model_validate(job.model_dump() | {"processes": 3})


def test_each_process_has_a_device_of_its_own() -> None:
    several = Place(rank=1, world=2, local=1, locals=2)
    assert choose_device("cpu", several) == torch.device("cpu")
    with pytest.raises(RecipeError, match="device is cuda:0, and there are 2 processes"):
        choose_device("cuda:0", several)
    if torch.cuda.device_count() < 2:
        with pytest.raises(RecipeError, match=r"2 processes of the training on this machine, [01] GPUs"):
            choose_device("cuda", several)


def test_held_out_sums_of_shares_are_those_of_the_whole(world: World) -> None:
    """Two halves of the packs, added up as two processes do."""
    model = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32)
    manifest, snapshot = Manifest.open(world.manifest), Snapshot.read(world.snapshot)
    held: list[NDArray[np.float64]] = []

    def measured(total: Any, **split: Any) -> Metrics:
        packs = Stream(manifest=manifest, snapshot=snapshot, heldout=True, window=48, epochs=1, **split)
        found = evaluate(
            model, packs, packing=True, vocabulary=world.vocabulary, device=torch.device("cpu"), autocast=False,
            total=total,
        )  # fmt: skip
        assert found is not None
        return found

    def kept(values: NDArray[np.float64]) -> NDArray[np.float64]:
        held.append(values)
        return values

    whole, first = measured(lambda values: values), measured(kept, rank=0, world_size=2)
    both = measured(lambda values: values + held[0], rank=1, world_size=2)
    assert first.tokens < whole.tokens
    assert both.as_dict() == pytest.approx(whole.as_dict(), rel=1e-9)


def test_one_process_agrees_with_itself() -> None:
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.sums({"loss": 1.0, "kd": None}) == {"loss": 1.0, "kd": None}
    assert ALONE.in_turn(lambda: 3) == 3
    assert ALONE.seed(0, 0) is None
