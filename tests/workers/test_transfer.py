"""Nothing waits for the device before all of a batch is queued, and nothing is read before it has landed.

There is no GPU here. torch's `meta` device takes its place where only the kind of work matters: it has shapes and no
values, so whatever needs one of a tensor's values raises there. Where values matter, a host's copy that stays garbage
until it is waited for stands for a device that is late.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.storage.errors import BadLogits
from stillroom.storage.records import (
    AttentionSpec,
    HiddenSpec,
    LayersSpec,
    NucleusSpec,
    SampledSpec,
    Sequence,
    Signal,
    SignalSpec,
    TopKSpec,
)
from stillroom.workers import draws, extract, hooks, torch_teacher
from stillroom.workers.teacher import Scored, TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from stillroom.workers.transfer import Landing, to_device, to_host
from tests.tiny import tiny_teacher

META = torch.device("meta")

EVERYTHING = SignalSpec(
    TopKSpec(8, nucleus=NucleusSpec(0.05)),
    SampledSpec(5),
    HiddenSpec(32, "bfloat16"),
    LayersSpec(layers=(0, 1, 2), width=32, dtype="bfloat16"),
    AttentionSpec(layers=(0, 1), heads="per_head", head_count=4, max_tokens=64),
)

#: What makes the host wait for a GPU: a value, or a size that depends on values.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2"}


class Late:
    """Copies that have garbage in them until they are waited for. log: what happened, in order."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def to_host(self, values: Tensor) -> Landing:
        self._log.append("sent")
        host = torch.full_like(values, -77)
        late = self

        class Arrival:
            def synchronize(self) -> None:
                late._log.append("waited")
                host.copy_(values)

        return Landing(host, Arrival())


class Watch(TorchDispatchMode):
    """Notes every operation that would make the host wait."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in (args[1] if name == "index" else ()) if i is not None and i.dtype == torch.bool]
        if name in WAITS or masks:
            self._log.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher"), padded=16)


def score(folder: Path, **options: Any) -> Scored:
    """Of two batches, each of several slices."""
    teacher = TorchTeacher(
        TeacherSpec(folder=folder, device="cpu", threads=1, batch_tokens=64, slice_positions=9, attention="eager")
    )
    rng = np.random.default_rng(0)
    asked = [Sequence(rng.integers(0, 250, length).astype(np.int32), 2) for length in (40, 23, 20, 5)]
    assert len(teacher.batches(asked)) > 1
    wanted = {s.digest: [3, 4] for s in asked}
    if "log" in options:
        assert teacher._model is not None
        logits, log = teacher._model.logits, options["log"]

        def noted(hidden_SD: Tensor) -> Tensor:
            log.append("slice")
            return logits(hidden_SD)

        teacher._model.logits = noted  # type: ignore[method-assign]
        with Watch(log):
            return teacher.score_with_truth(asked, signal=EVERYTHING, positions=wanted)
    return teacher.score_with_truth(asked, signal=EVERYTHING, positions=wanted)


def late(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    for module in (draws, extract, hooks, torch_teacher):
        monkeypatch.setattr(module, "to_host", Late(log).to_host)


def arrays(signal: Signal) -> list[Any]:
    assert signal.topk is not None
    assert signal.sampled is not None
    assert signal.attention is not None
    return [
        signal.topk.ids, signal.topk.logits, signal.topk.tail_lse, signal.topk.counts, signal.sampled.ids,
        signal.sampled.counts, signal.hidden, signal.layers, signal.attention.values,
    ]  # fmt: skip


def test_a_late_device_changes_no_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = score(folder)
    log: list[str] = []
    late(monkeypatch, log)
    got = score(folder)
    assert "waited" in log
    for one, other in zip(got.signals, want.signals, strict=True):
        for found, expected in zip(arrays(one), arrays(other), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert got.truth.keys() == want.truth.keys()
    for digest, logits in want.truth.items():
        np.testing.assert_array_equal(got.truth[digest], logits)


def test_all_slices_of_a_batch_are_queued_before_any_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    late(monkeypatch, log)
    score(folder, log=log)
    slices = []
    while "slice" in log:
        log = log[log.index("slice") :]
        queued, log = log[: log.index("waited")], log[log.index("waited") :]
        assert set(queued) == {"slice", "sent"}
        slices.append(queued.count("slice"))
    assert len(slices) > 1
    assert max(slices) > 1


def test_bad_logits_that_land_late_are_told_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(5, 100)
    z[3, 99] = torch.nan
    keys = np.zeros(5, np.uint64)
    calls: list[Callable[[], object]] = [
        lambda: extract.extract(z, k=4, vocabulary=100, name_row="place {}".format),
        lambda: draws.draw(z, keys, draws=5, name_row="place {}".format),
    ]
    said = []
    for _ in range(2):
        for call in calls:
            with pytest.raises(BadLogits, match="1 of 5 positions, the first is place 3") as caught:
                call()
            said.append(str(caught.value))
        late(monkeypatch, [])
    assert said[:2] == said[2:]


@pytest.mark.parametrize(("rows", "vocabulary", "k"), [(1, 49_152, 64), (9, 151_669, 64), (5, 320, 319), (5, 4000, 64)])
def test_extracting_and_drawing_need_no_value_on_the_way(rows: int, vocabulary: int, k: int) -> None:
    z = torch.empty(rows, vocabulary + 7, dtype=torch.bfloat16, device=META)
    ids, kept, tail = extract._rows(z, k, vocabulary, 1 << 20)
    assert (ids.shape, kept.shape, tail.shape) == ((rows, k), (rows, k), (rows, 10))
    assert {x.device for x in (ids, kept, tail)} == {META}
    drawn, top = draws._rows(z[:, :vocabulary], np.zeros(rows, np.uint64), 50, 1 << 20)
    assert (drawn.shape, top.shape, drawn.device) == ((rows, 50), (rows,), META)


def test_on_a_cpu_nothing_is_copied() -> None:
    values = torch.randn(3, 4)
    assert to_host(values).wait().data_ptr() == values.data_ptr()
    assert to_device(values, torch.device("cpu")).data_ptr() == values.data_ptr()
