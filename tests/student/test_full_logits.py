"""full_logits.py: the teacher's logits from its hidden states, and the loss on them, against dense float64 oracles."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from stillroom.pipeline.student.full_logits import (
    Kept,
    TeacherHead,
    full_kl,
    full_logits,
    hidden_loss,
    load_head,
    read_head,
)
from stillroom.pipeline.student.losses import Objective
from stillroom.storage.calibration import head_path
from stillroom.storage.errors import CorruptShard, FormatMismatch, StoreError, StudentError
from stillroom.storage.files import LocalFiles, sha256_hex
from stillroom.storage.records import TopK
from tests.strategies import topk_of

CPU = torch.device("cpu")
M, D, V = 5, 16, 60
T1 = Objective(1.0, 1.0)


def head(seed: int = 0, *, dtype: torch.dtype = torch.float32, biased: bool = False, **form: Any) -> TeacherHead:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    bias = torch.randn(V, generator=generator).to(dtype) if biased else None
    return TeacherHead(weight, bias, form.get("scale", 1.0), form.get("softcap"))


def hidden(seed: int, rows: int = M) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def exact_logits(teacher: TeacherHead, states: Tensor) -> Tensor:
    """float64 [M, V]."""
    logits = states.double() @ teacher.weight.double().T
    if teacher.bias is not None:
        logits = logits + teacher.bias.double()
    logits = teacher.scale * logits
    return logits if teacher.softcap is None else teacher.softcap * torch.tanh(logits / teacher.softcap)


def rounded(topk: TopK, step: float | None) -> TopK:
    """As the topk codec gives it back."""
    if step is None:
        return topk
    top = topk.logits[:, :1]
    codes = np.rint((top - topk.logits) / np.float32(step))
    return TopK(topk.ids, (top - codes * np.float32(step)).astype(np.float32), topk.tail_lse, topk.counts)


def oracle_kl(student: Tensor, teacher: Tensor, temperature: float, weights: Tensor) -> Tensor:
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (teacher, student))
    return temperature**2 * ((p * (p / q).log()).sum(-1) * weights.double()).sum()


FORMS = st.fixed_dictionaries({
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "biased": st.booleans(),
    "scale": st.sampled_from([1.0, 0.25]),
    "softcap": st.sampled_from([None, 4.0]),
})  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    form=FORMS,
    k=st.integers(1, V - 1) | st.none(),
    temperature=st.sampled_from([1.0, 2.0, 10.0]),
    step=st.sampled_from([None, 1 / 8]),
)
def test_exact_hidden_states_give_the_dense_loss(
    seed: int, form: dict[str, Any], k: int | None, temperature: float, step: float | None
) -> None:
    """Whatever is kept beside them: rounded gaps must not make exact logits worse."""
    teacher, states = head(seed, **form), hidden(seed + 1)
    exact = exact_logits(teacher, states)
    kept = None
    if k is not None:
        topk = rounded(topk_of(exact.numpy(), k), step)
        kept = Kept.of(topk, vocabulary=V, temperature=temperature, gap_step=step)
    rebuilt = full_logits(teacher, states, kept, temperature=temperature)
    assert rebuilt.dtype == torch.float32
    size = float(exact.abs().max())
    # Both the exact and the averaged logit lie in the interval.
    atol = 1e-5 * max(1.0, size) if step is None or k is None else step + 1e-4
    assert float((rebuilt - exact).abs().max()) <= atol
    if step is not None and k is not None:
        return
    student = exact + torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = torch.rand(M, generator=torch.Generator().manual_seed(seed))
    loss = full_kl(student, rebuilt, temperature=temperature, weights_N=weights)
    expected = float(oracle_kl(student, exact, temperature, weights))
    assert abs(float(loss) - expected) <= 1e-5 * max(1.0, abs(expected))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    k=st.integers(1, V - 1),
    temperature=st.sampled_from([1.0, 2.0, 10.0]),
    step=st.sampled_from([None, 1 / 16, 1 / 4]),
    ragged=st.booleans(),
)
def test_what_is_stored_holds_whatever_the_hidden_states_say(
    seed: int, k: int, temperature: float, step: float | None, ragged: bool
) -> None:
    """Kept ids lie in their intervals, the first exactly; the others have the stored mass at the temperature."""
    teacher, states = head(seed), hidden(seed + 1)
    exact = exact_logits(teacher, states)
    counts = np.random.default_rng(seed).integers(1, k + 1, M) if ragged else np.full(M, k)
    ids = np.full((M, k), -1, np.int32)
    logits = np.full((M, k), -np.inf, np.float32)
    tails = []
    for row, count in enumerate(counts):
        one = rounded(topk_of(exact[row : row + 1].numpy(), int(count)), step)
        ids[row, :count], logits[row, :count] = one.ids, one.logits
        tails.append(one.tail_lse[0])
    block = TopK(ids, logits, np.stack(tails), counts.astype(np.int32) if ragged else None)
    kept = Kept.of(block, vocabulary=V, temperature=temperature, gap_step=step)
    noisy = states + 0.2 * hidden(seed + 2)
    rebuilt = full_logits(teacher, noisy, kept, temperature=temperature).double()

    assert bool(rebuilt.isfinite().all())
    for row, count in enumerate(counts):
        known = torch.from_numpy(ids[row, :count].astype(np.int64))
        stored = torch.from_numpy(logits[row, :count]).double()
        off = (rebuilt[row, known] - stored).abs()
        assert float(off[0]) == 0
        assert float(off.max()) <= (step or 0.0) / 2 + 1e-5
        others = rebuilt[row].scatter(0, known, -torch.inf)
        mass = float(torch.logsumexp(others / temperature, -1))
        assert abs(mass - float(kept.tail_lse[row])) <= 1e-4


@pytest.mark.parametrize(("noise", "step"), [(0.005, 1 / 8), (0.02, 1 / 8), (0.02, 1 / 2), (0.005, 1 / 16)])
def test_both_sources_together_beat_each_alone(noise: float, step: float) -> None:
    """What the module's table says of the real teacher, on a small one, whichever of the two is the better."""
    teacher, states = head(3), hidden(4, rows=200)
    exact = exact_logits(teacher, states)
    noisy = states + noise * hidden(5, rows=200)
    temperature = 2.0
    topk = rounded(topk_of(exact.numpy(), 12), step)
    weights = torch.ones(200)

    def kl(gap_step: float | None, *, block: TopK | None) -> float:
        kept = None
        if block is not None:
            kept = Kept.of(block, vocabulary=V, temperature=temperature, gap_step=gap_step)
        rebuilt = full_logits(teacher, noisy, kept, temperature=temperature)
        return float(oracle_kl(rebuilt, exact, temperature, weights))

    alone, taken, fused = kl(None, block=None), kl(None, block=topk), kl(step, block=topk)
    assert fused < taken
    assert fused < alone


def test_the_stored_interval_is_never_left() -> None:
    """One rebuilt logit far off among many good ones, which have earned the trust that it does not deserve."""
    teacher, states, step = head(8), hidden(9), 1 / 4
    block = topk_of(exact_logits(teacher, states).numpy(), 40)
    stored = block.logits.copy()
    stored[:, 17] += np.float32(1.5 * step)
    kept = Kept.of(TopK(block.ids, stored, block.tail_lse), vocabulary=V, temperature=1.0, gap_step=step)
    rebuilt = full_logits(teacher, states, kept, temperature=1.0).gather(1, kept.ids)
    off = (rebuilt - kept.logits).abs()
    assert float(off.max()) <= step / 2 + 1e-5
    assert float(off[:, 17].min()) >= step / 2 - 1e-5, "as far as it may go"


def test_kl_takes_logits_of_minus_infinity() -> None:
    student = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    teacher = student + 1.0
    teacher[0, 2] = teacher[1, 0] = -torch.inf
    student[0, 2] = -torch.inf
    student.requires_grad_()
    loss = full_kl(student, teacher, temperature=2.0, weights_N=torch.ones(2))
    loss.backward()
    assert student.grad is not None
    assert bool(loss.isfinite())
    assert bool(student.grad.isfinite().all())
    # Row 0 differs by a constant where both are finite.
    q = torch.softmax(student[1].detach().double() / 2, -1)
    assert abs(float(loss.detach()) - 4 * float(-torch.log(1 - q[0]))) <= 1e-5


@pytest.mark.parametrize("rows", [1, 3, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_give_the_whole_loss_and_gradient(rows: int, dtype: torch.dtype) -> None:
    teacher, states = head(1, biased=True), hidden(2, rows=11)
    exact = exact_logits(teacher, states)
    kept = Kept.of(topk_of(exact.numpy(), 7), vocabulary=V, temperature=2.0, gap_step=None)
    generator = torch.Generator().manual_seed(3)
    # Eight columns of padding: they must get no gradient.
    logits = torch.randn(11, V + 8, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(11, generator=generator)

    def loss(slice_elements: int) -> Tensor:
        return hidden_loss(
            logits, teacher, states, kept, objective=Objective(1.0, 2.0), weights_N=weights,
            slice_elements=slice_elements,
        )  # fmt: skip

    sliced = loss(rows * V + 1)
    (3.0 * sliced).backward()
    found = logits.grad
    expected_loss = oracle_kl(logits[:, :V], exact, 2.0, weights)
    expected = torch.autograd.grad(3.0 * expected_loss, logits)[0]
    assert found is not None
    assert torch.allclose(sliced.double(), expected_loss, rtol=1e-5)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected.double(), rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-5)
    assert not found[:, V:].any()
    with torch.no_grad():
        assert torch.equal(loss(rows * V + 1), sliced)


def test_no_positions_are_a_loss_of_zero() -> None:
    logits = torch.zeros(0, V, requires_grad=True)
    loss = hidden_loss(logits, head(), hidden(0, rows=0), None, objective=T1, weights_N=torch.zeros(0))
    loss.backward()
    assert float(loss.detach()) == 0


def test_the_gradient_is_given_once() -> None:
    logits = torch.zeros(M, V, requires_grad=True)
    loss = hidden_loss(logits, head(), hidden(0), None, objective=T1, weights_N=torch.ones(M))
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        loss.backward()


def test_a_head_of_sixteen_bits_is_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, states = head(6, dtype=torch.bfloat16, biased=True), hidden(7)
    monkeypatch.setattr("stillroom.pipeline.student.full_logits.WIDENED_ROWS", 7)
    assert torch.allclose(teacher.logits(states).double(), exact_logits(teacher, states), atol=1e-5)


def test_other_widths_are_refused() -> None:
    with pytest.raises(StudentError, match="another teacher's"):
        head().logits(torch.zeros(2, D + 1))
    with pytest.raises(StudentError, match="output columns"):
        hidden_loss(torch.zeros(2, V - 1), head(), hidden(0, 2), None, objective=T1, weights_N=torch.ones(2))


def stored(**change: Any) -> bytes:
    described = {"format": 1, "vocabulary": 4, "width": 2, "scale": 1.0, "softcap": None}
    tensors = {"weight": torch.ones(4, 2)} | change.pop("tensors", {})
    return save(tensors, metadata={"stillroom": json.dumps(described | change)})


def test_a_head_is_checked_against_its_name(tmp_path: Path) -> None:
    files, data = LocalFiles(tmp_path), bytearray(stored())
    path = head_path(sha256_hex(bytes(data)))
    files.write(path, bytes(data))
    assert load_head(files, CPU).size_bytes == 4 * 2 * 4
    assert load_head(files, CPU, path=path).vocabulary == 4
    for at in range(0, len(data), 5):
        data[at] ^= 4
        files.write(path, bytes(data))
        with pytest.raises(CorruptShard, match=f"{path} has sha256"):
            load_head(files, CPU)
        data[at] ^= 4
    files.write(path, bytes(data[:-1]))
    with pytest.raises(CorruptShard, match="sha256"):
        load_head(files, CPU)
    with pytest.raises(StoreError, match="not the name"):
        load_head(files, CPU, path="_stillroom/identity.json")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 40,
        stored()[:-3],
        save({"weight": torch.ones(4, 2)}),
        save({"weight": torch.ones(4, 2)}, metadata={"stillroom": "[]"}),
        save({"weight": torch.ones(4, 2)}, metadata={"stillroom": "{"}),
        stored(vocabulary=5),
        stored(tensors={"weight": torch.ones(4, 2, dtype=torch.int8)}),
        stored(tensors={"bias": torch.ones(3)}),
        stored(scale=float("nan")),
        stored(scale="1"),
        stored(softcap=0.0),
        stored(softcap=[]),
    ],
)
def test_what_is_no_head_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptShard, match="here is no output head"):
        read_head(data, CPU, where="here")


def test_a_later_format_is_refused() -> None:
    with pytest.raises(FormatMismatch, match="format 2"):
        read_head(stored(format=2), CPU, where="here")
