"""The part of a store that teaches: against a dense teacher, whole against sliced, and evaluated."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.student.collate import collate
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.evaluate import evaluate
from stillroom.pipeline.student.forward import logits_at
from stillroom.pipeline.student.full_logits import TeacherHead, load_head
from stillroom.pipeline.student.losses import LossSums, Objective, Targets, combine
from stillroom.pipeline.student.losses import cross_entropy as hard_loss
from stillroom.pipeline.student.teaching import Teaching, distillation_loss
from stillroom.pipeline.student.trainer import Trainer
from stillroom.storage.calibration import save_calibration
from stillroom.storage.codecs.sampled import position_keys
from stillroom.storage.errors import UnsupportedSignal
from stillroom.storage.files import open_files
from stillroom.storage.identity import Identity
from stillroom.storage.records import (
    HiddenSpec,
    Pack,
    SampledSpec,
    Sequence,
    Signal,
    SignalSpec,
    TopKSpec,
)
from stillroom.storage.shard import ShardReader, StoredSequence, write_shard
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import assemble
from stillroom.workers.draws import draw
from stillroom.workers.head import save_head, steps_of
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.strategies import unit_of
from tests.student.world import World, documents_of
from tests.tiny import tiny_model

CPU = torch.device("cpu")
PARTS = ("topk", "sampled", "hidden")


@pytest.fixture(scope="module", name="live")
def _live(world: World) -> Any:
    return AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32).eval()


class Shelf:
    """Twelve sequences in one shard of a store that keeps `spec`, as packs, and what a student reads of it."""

    def __init__(self, world: World, root: Path, spec: SignalSpec) -> None:
        teacher = TorchTeacher(TeacherSpec(folder=world.teacher, device="cpu"))
        files = open_files(str(root))
        head = teacher.output_head()
        save_head(files, head)
        hidden = spec.hidden
        if hidden and hidden.dtype == "int16":
            hidden = HiddenSpec(hidden.width, "int16", save_calibration(files, steps_of(head)))
        spec = SignalSpec(spec.topk, spec.sampled, hidden)
        identity = Identity(teacher="tiny", signal=spec, **teacher.identity_parts())
        documents = documents_of(AutoTokenizer.from_pretrained(world.teacher), 13)[1:]
        self.sequences = [Sequence(ids) for ids in documents]
        unit = unit_of(self.sequences)
        ref = write_shard(files, identity, unit, self.sequences, teacher.score(self.sequences, signal=spec), {})
        self.stored = list(ShardReader(files, ref, identity))
        self.vocabulary, self.root = identity.vocabulary, root
        self.snapshot = Snapshot(files.uri, identity, (unit,), {unit.id: ref})
        self.head = load_head(files, CPU)

    def packs(self, *, parts: tuple[str, ...] = PARTS) -> list[Pack]:
        """Three sequences each."""
        return [self._pack(self.stored[i : i + 3], parts, i) for i in range(0, len(self.stored), 3)]

    def _pack(self, stored: list[StoredSequence], parts: tuple[str, ...], index: int) -> Pack:
        def read(signal: Signal | None) -> Signal:
            assert signal is not None
            return Signal(**{part: getattr(signal, part) for part in parts})

        return assemble(
            [StoredSequence(s.sequence, read(s.signal)) for s in stored],
            [np.ones(len(s.sequence.input_ids), dtype=bool) for s in stored],
            np.ones(len(stored), dtype=np.float32),
            tuple(s.sequence.digest for s in stored),
            window=3 * 48, epoch=0, index=index,
        )  # fmt: skip


EXACT = SignalSpec(TopKSpec(16, None), hidden=HiddenSpec(32, "bfloat16"))


@pytest.fixture(scope="module", name="exact")
def _exact(world: World, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """bfloat16 hidden states beside float32 top-k."""
    return Shelf(world, tmp_path_factory.mktemp("exact"), EXACT)


def student_of(tmp: Path, world: World, seed: int = 3) -> Any:
    return tiny_model(tmp / "student", vocabulary=world.vocabulary, layers=1, seed=seed)


def steps(
    model: Any,
    shelf: Shelf,
    teaching: Any,
    *,
    temperature: float,
    count: int = 10,
    fused: bool = True,
    more: dict[str, Any] | None = None,
) -> list[float]:
    config = StudentConfig.model_validate(
        {"name": "a", "model": {"from": "x"}, "lr": 3e-3, "warmup_steps": 0, "steps": count, "batch_packs": 2,
         "losses": {"alpha": 0.7, "temperature": temperature, "fused": fused} | (more or {})}
    )  # fmt: skip
    trainer = Trainer(model, config, vocabulary=shelf.vocabulary, total_steps=count, device=CPU, teaching=teaching)
    packs = shelf.packs(parts=("topk", "hidden"))
    losses = [trainer.step([packs[2 * i % 4], packs[(2 * i + 1) % 4]], i).loss for i in range(count)]
    return [loss for loss in losses if loss is not None]


class Dense(Teaching):
    """The oracle: full-vocabulary KL against the live teacher's own logits of the same positions."""

    def loss(self, logits_NV: Tensor, targets: Targets, *, objective: Objective) -> Tensor:
        live_NV, temperature = next(_LIVE), objective.temperature
        assert live_NV.shape == logits_NV.shape
        log_q_NV = (logits_NV / temperature).log_softmax(-1)
        log_p_NV = (live_NV / temperature).log_softmax(-1)
        kl_N: Tensor = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
        return temperature**2 * (kl_N * targets.weights).sum()


_LIVE: Any = iter(())


@torch.no_grad()
def live_logits(live: Any, pack: Pack, vocabulary: int) -> Tensor:
    """The teacher on a pack's own positions, sequence by sequence, alone each. [M, V]"""
    found = []
    for segment in range(int(pack.segment_ids.max()) + 1):
        inside = np.flatnonzero(pack.segment_ids == segment)
        ids = torch.from_numpy(pack.input_ids[inside].astype(np.int64))[None]
        logits_TV = live(input_ids=ids, use_cache=False).logits[0, :, :vocabulary]
        wanted = pack.positions[(pack.positions >= inside[0]) & (pack.positions <= inside[-1])] - inside[0]
        found.append(logits_TV[torch.from_numpy(wanted)])
    return torch.cat(found)


OUTPUTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all": {"forward_kl": 0.5, "reverse_kl": 0.5, "js": {"weight": 1, "mixing": 0.3}, "tv": 0.2, "mse": 5},
    "cosine": {"forward_kl": 1, "cosine": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "output"), [("topk", "default"), ("topk", "all"), ("hidden", "all"), ("hidden", "cosine")]
)
def test_fused_steps_are_those_of_the_plain_form(
    tmp_path: Path, world: World, exact: Shelf, part: str, output: str
) -> None:
    """Ten steps of AdamW on a tied embedding, in micro-batches, with smoothed labels: the same losses, which fall."""
    runs = {}
    for fused in (True, False):
        runs[fused] = steps(
            student_of(tmp_path, world), exact, Teaching.of(part, exact.snapshot, CPU), temperature=3.0, fused=fused,
            more={"label_smoothing": 0.05} | ({"output": OUTPUTS[output]} if OUTPUTS[output] else {}),
        )  # fmt: skip
    np.testing.assert_allclose(runs[True], runs[False], rtol=1e-4)
    assert runs[True][-1] < runs[True][0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_student_of_hidden_states_trains_as_one_of_the_live_teacher(
    tmp_path: Path, world: World, live: Any, exact: Shelf, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps, the same batches: each loss within 1e-3 of itself. The tail of bfloat16 states is what is off."""
    taught = Teaching.of("hidden", exact.snapshot, CPU)
    stored = steps(student_of(tmp_path, world), exact, taught, temperature=temperature)
    dense = [live_logits(live, pack, exact.vocabulary) for pack in exact.packs(parts=("topk", "hidden"))]
    order = [dense[j % 4] for i in range(10) for j in (2 * i, 2 * i + 1)]
    monkeypatch.setitem(globals(), "_LIVE", iter(order))
    oracle = steps(student_of(tmp_path, world), exact, Dense("dense"), temperature=temperature, fused=False)
    assert stored[-1] < stored[0]
    np.testing.assert_allclose(stored, oracle, rtol=1e-3)


def test_gradients_of_draws_approach_the_dense_one(tmp_path: Path, world: World, live: Any, exact: Shelf) -> None:
    """Averaged over keys, with the loss's own path; the error falls as one over the root of their number."""
    pack = exact.packs()[0]
    teacher_NV = live_logits(live, pack, exact.vocabulary)
    generator = torch.Generator().manual_seed(5)
    student_NV = (teacher_NV + torch.randn(teacher_NV.shape, generator=generator)).requires_grad_()
    labels, weights = torch.from_numpy(pack.labels.astype(np.int64)), torch.ones(len(teacher_NV))
    dense_NV = (student_NV.softmax(-1) - teacher_NV.softmax(-1)).detach()
    total_NV, errors = torch.zeros_like(dense_NV), {}
    for number in range(1, 1025):
        keys = position_keys(f"{number:032x}", np.arange(len(teacher_NV)))
        drawn = draw(teacher_NV, keys, draws=20)
        targets = Targets(
            labels, weights, drawn_ids=torch.from_numpy(drawn.ids.astype(np.int64)),
            drawn_counts=torch.from_numpy(drawn.counts.astype(np.int64)),
        )  # fmt: skip
        loss = distillation_loss(
            student_NV,
            targets,
            objective=Objective(1.0, 1.0),
            vocabulary=exact.vocabulary,
            teaching=Teaching("sampled"),
        )
        total_NV += torch.autograd.grad(loss.total, student_NV)[0]
        errors[number] = float((total_NV / number - dense_NV).norm() / dense_NV.norm())
    # 32 = √1024. What is left of it bounds the bias.
    assert errors[1024] < 1.3 * errors[1] / 32
    assert errors[1024] < 0.12


@pytest.fixture(scope="module", name="all_parts")
def _all_parts(world: World, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    spec = SignalSpec(TopKSpec(8), SampledSpec(20), HiddenSpec(32, "int16"))
    return Shelf(world, tmp_path_factory.mktemp("all"), spec)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("part", [*PARTS, "topk+sampled"])
@pytest.mark.parametrize("rows", [1, 7])
def test_slices_change_rounding_only(all_parts: Shelf, part: str, alpha: float, rows: int) -> None:
    temperature = 1.0 if "sampled" in part else 3.0
    teaching = Teaching.of(part, all_parts.snapshot, CPU)
    batch = collate(all_parts.packs()[:2], packing=True, temperature=temperature, vocabulary=all_parts.vocabulary)
    generator = torch.Generator().manual_seed(7)
    shape = len(batch.targets.labels), all_parts.vocabulary + 5  # with padding of the head
    start_NV = 3 * torch.randn(shape, generator=generator)

    def loss(elements: int) -> tuple[LossSums, Tensor]:
        logits_NV = start_NV.clone().requires_grad_()
        found = distillation_loss(
            logits_NV, batch.targets, objective=Objective(alpha, temperature), vocabulary=all_parts.vocabulary,
            teaching=teaching, slice_elements=elements,
        )  # fmt: skip
        return found, torch.autograd.grad(found.total, logits_NV)[0]

    whole, whole_grad = loss(2**26)
    sliced, sliced_grad = loss(rows * all_parts.vocabulary)
    assert whole.kd is not None
    assert sliced.kd is not None
    torch.testing.assert_close(sliced.kd, whole.kd, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sliced.total, whole.total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sliced_grad, whole_grad, rtol=1e-4, atol=1e-6)
    assert (whole_grad[:, all_parts.vocabulary :] == 0).all()
    ce = (
        None
        if alpha == 1
        else hard_loss(start_NV[:, : all_parts.vocabulary], batch.targets.labels, weights_N=batch.targets.weights)
    )
    torch.testing.assert_close(whole.total, combine(whole.kd, ce, alpha=alpha), rtol=1e-5, atol=1e-5)


def test_evaluation_against_hidden_states_is_the_dense_kl(
    tmp_path: Path, world: World, live: Any, exact: Shelf
) -> None:
    model = student_of(tmp_path, world).eval()
    packs = exact.packs(parts=("topk", "hidden"))
    metrics = evaluate(
        model, packs, packing=True, vocabulary=exact.vocabulary, device=CPU, autocast=False,
        teaching=Teaching.of("hidden", exact.snapshot, CPU),
    )  # fmt: skip
    kl, agree = [], []
    for pack in packs:
        batch = collate([pack], packing=True, temperature=1.0, vocabulary=exact.vocabulary)
        with torch.no_grad():
            log_q = logits_at(model, batch)[:, : exact.vocabulary].double().log_softmax(-1)
        log_p = live_logits(live, pack, exact.vocabulary).double().log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        agree += (log_q.argmax(-1) == log_p.argmax(-1)).tolist()
    assert metrics is not None
    assert metrics.kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert metrics.top1 == pytest.approx(np.mean(agree))


def test_evaluation_of_draws_alone_gives_no_kl(tmp_path: Path, world: World, all_parts: Shelf) -> None:
    def measured(parts: tuple[str, ...]) -> Any:
        return evaluate(
            student_of(tmp_path, world), all_parts.packs(parts=parts), packing=True,
            vocabulary=all_parts.vocabulary, device=CPU, autocast=False, teaching=Teaching("sampled"),
        )  # fmt: skip

    alone, beside = measured(("sampled",)), measured(("topk", "sampled"))
    assert alone.kl is alone.top1 is None
    assert beside.kl > 0
    assert alone.perplexity == beside.perplexity


class TestWhichPart:
    @pytest.mark.parametrize(
        ("spec", "part"),
        [
            (SignalSpec(TopKSpec(8), SampledSpec(20), HiddenSpec(32, "bfloat16")), "hidden"),
            (SignalSpec(TopKSpec(8), SampledSpec(20)), "topk"),
            (SignalSpec(sampled=SampledSpec(20)), "sampled"),
        ],
    )
    def test_auto_takes_the_most_faithful(self, world: World, tmp_path: Path, spec: SignalSpec, part: str) -> None:
        shelf = Shelf(world, tmp_path / "store", spec)
        teaching = Teaching.of("auto", shelf.snapshot, CPU)
        assert teaching.part == part
        assert isinstance(teaching.head, TeacherHead) == (part == "hidden")
        assert teaching.reads == {part, "topk"}
        assert teaching.gap_step == (1 / 8 if spec.topk else None)

    def test_what_is_not_held_is_refused(self, exact: Shelf) -> None:
        with pytest.raises(
            UnsupportedSignal, match=r"losses.signal is sampled, the store holds .*: set it to hidden or"
        ):
            Teaching.of("sampled", exact.snapshot, CPU)
