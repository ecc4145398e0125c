"""That the rows of `make bench-quality` differ in what they say: the oracle is the product's loss where k = V."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student.collate import collate
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.losses import Objective
from stillroom.pipeline.student.trainer import Trainer
from stillroom.storage.records import Pack, Sequence
from tests.bench.live import LiveTeacher, LiveTrainer, Renormalised, dense_kl, measure
from tests.student.world import pack_of, topk_of
from tests.tiny import tiny_model, tiny_teacher

WINDOW = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a teacher and of a student with the same tokenizer."""
    root = tmp_path_factory.mktemp("quality")
    tiny_model(root / "student", vocabulary=_vocabulary(tiny_teacher(root / "teacher")), seed=5)
    return root / "teacher", root / "student"


def _vocabulary(folder: Path) -> int:
    return int(_model(folder).config.vocab_size)


def _model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _pack(folder: Path, k: int | None = None) -> Pack:
    """Two sequences, the second one with an overlap; k: kept ids, None: all."""
    teacher = _model(folder)
    vocabulary = int(teacher.config.vocab_size)
    rng = np.random.default_rng(0)
    sequences = [
        Sequence(rng.integers(3, vocabulary, length).astype(np.int32), first) for length, first in ((9, 0), (11, 3))
    ]
    with torch.no_grad():
        kept = [
            topk_of(
                teacher(torch.from_numpy(s.input_ids.astype(np.int64))[None]).logits[0, s.first_position :],
                k or vocabulary,
            )
            for s in sequences
        ]
    return pack_of(sequences, kept, window=WINDOW)


def _gradients(kind: type[Trainer], folders: tuple[Path, Path], pack: Pack, objective: Objective) -> Any:
    """(loss, gradients by name) of one batch."""
    teacher, student = folders
    config = StudentConfig.model_validate({"name": "s", "model": {"from": str(student)}, "steps": 2, "batch_packs": 1})
    model, vocabulary = _model(student), _vocabulary(student)
    trainer = kind(model, config, vocabulary=vocabulary, total_steps=2, device=torch.device("cpu"))
    if isinstance(trainer, LiveTrainer):
        trainer.live, trainer._packs = LiveTeacher(teacher, vocabulary=vocabulary), [pack]
    batch = collate([pack], packing=True, temperature=objective.temperature, vocabulary=vocabulary)
    loss = trainer._loss(batch, objective).total
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("objective", [Objective(1.0, 1.0), Objective(1.0, 4.0), Objective(0.7, 4.0)], ids=str)
def test_the_oracle_is_the_products_loss_where_all_ids_are_kept(
    folders: tuple[Path, Path], objective: Objective
) -> None:
    pack = _pack(folders[0])
    expected, theirs = _gradients(LiveTrainer, folders, pack, objective)
    found, ours = _gradients(Trainer, folders, pack, objective)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_renormalising_is_the_whole_loss_too_where_all_ids_are_kept_and_another_where_not(
    folders: tuple[Path, Path],
) -> None:
    objective = Objective(1.0, 2.0)
    whole = _gradients(LiveTrainer, folders, _pack(folders[0]), objective)[0]
    assert _gradients(Renormalised, folders, _pack(folders[0]), objective)[0] == pytest.approx(whole, rel=1e-5)
    few = _pack(folders[0], 8)
    assert few.signal is not None
    assert few.signal.topk is not None
    student = _model(folders[1])
    ids = torch.from_numpy(few.input_ids[few.segment_ids == 0].astype(np.int64))
    # By hand, of the first position: p over the kept ids alone, q over all.
    p_K = (torch.from_numpy(few.signal.topk.logits[0]) / 2).softmax(-1)
    with torch.no_grad():
        q_V = (student(ids[None]).logits[0, 0] / 2).log_softmax(-1)
    by_hand = 4 * float((p_K * (p_K.log() - q_V[torch.from_numpy(few.signal.topk.ids[0].astype(np.int64))])).sum())
    weights = np.zeros_like(few.weights)
    weights[0] = 1
    assert _gradients(Renormalised, folders, replace(few, weights=weights), objective)[0] == pytest.approx(
        by_hand, rel=1e-4
    )


def test_states_that_were_kept_give_the_models_own_logits_each_sequence_by_itself(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    pack, model = _pack(folders[0]), _model(folders[0])
    for _ in range(2):  # made, and read
        found = LiveTeacher(folders[0], vocabulary=model.config.vocab_size, cache=tmp_path).logits(pack)
        with torch.no_grad():
            alone = [
                model(torch.from_numpy(pack.input_ids[pack.segment_ids == n].astype(np.int64))[None]).logits[0]
                for n in (0, 1)
            ]
        assert torch.allclose(found, torch.cat(alone)[torch.from_numpy(pack.positions)], atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_measured_of_the_teacher_itself_is_no_difference(folders: tuple[Path, Path]) -> None:
    teacher, student = folders
    vocabulary = _vocabulary(teacher)
    live, pack = LiveTeacher(teacher, vocabulary=vocabulary), _pack(teacher)
    itself = measure(_model(teacher), live, [pack], vocabulary=vocabulary)
    assert itself["top1"] == 1.0
    assert itself["kl_t1"] == pytest.approx(0.0, abs=1e-6)
    other = measure(_model(student), live, [pack], vocabulary=vocabulary)
    with torch.no_grad():
        own = [
            _model(student)(torch.from_numpy(pack.input_ids[pack.segment_ids == n].astype(np.int64))[None]).logits[0]
            for n in (0, 1)
        ]
    logits = torch.cat(own)[torch.from_numpy(pack.positions)]
    labels = torch.from_numpy(pack.labels.astype(np.int64))
    expected = dense_kl(logits, live.logits(pack), temperature=1.0, dtype=torch.float64).mean()
    assert other["kl_t1"] == pytest.approx(float(expected), rel=1e-4)
    assert other["perplexity"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels).exp()), rel=1e-4
    )
    assert other["positions"] == len(labels)
