"""A teacher whose rows depend on what else is in the batch is refused before anything is spent."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillroom.storage.errors import BatchDependent
from stillroom.storage.fidelity.measure import TEMPERATURES
from stillroom.storage.records import Sequence, SignalSpec, TopKSpec
from stillroom.workers.sanity import POSITIONS, require_batch_free
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.tiny import tiny_teacher

SIGNAL = SignalSpec(TopKSpec(4, None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("sanity") / "teacher")


@pytest.fixture
def sequences() -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [Sequence(rng.integers(0, 250, length).astype(np.int32)) for length in (30, 12, 25)]


def teacher_of(folder: Path, dtype: Any = "float32", batch_tokens: int = 256) -> TorchTeacher:
    return TorchTeacher(TeacherSpec(folder=folder, device="cpu", dtype=dtype, threads=1, batch_tokens=batch_tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_let_pass(folder: Path, sequences: list[Sequence], dtype: str) -> None:
    found = require_batch_free(teacher_of(folder, dtype), sequences, signal=SIGNAL, dtype=dtype)
    assert found.positions == 2 * POSITIONS
    assert found.band is not None
    assert found.as_dict()["band"] == found.band.as_dict()
    assert [row.temperature for row in found.band.rows] == list(TEMPERATURES)
    assert found.band.rows[0].kl_nats == found.kl_mean_nats
    assert found.kl_mean_nats <= found.kl_worst_nats
    assert found.kl_worst_nats < (1e-6 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("leak", ["mean of the batch", "padding"])
def test_a_teacher_that_sees_its_neighbours_is_refused(
    folder: Path, sequences: list[Sequence], monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    teacher = teacher_of(folder)
    model = teacher._model
    assert model is not None
    hidden = model.hidden

    def leaking(ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
        found = hidden(ids_BT, mask_BT)
        return found + 0.3 * found.mean(1 if leak == "padding" else 0, keepdim=True)

    monkeypatch.setattr(model, "hidden", leaking)
    with pytest.raises(BatchDependent, match=r"depends on its batch.*batch_tokens 1") as caught:
        require_batch_free(teacher, sequences, signal=SIGNAL, dtype="float32")
    assert "\n" not in str(caught.value)


def test_alone_in_every_batch_there_is_nothing_to_compare(folder: Path, sequences: list[Sequence]) -> None:
    teacher = teacher_of(folder, batch_tokens=1)
    assert require_batch_free(teacher, sequences, signal=SIGNAL, dtype="float32").positions == 0
