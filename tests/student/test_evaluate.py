"""Metrics against their definitions."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student.evaluate import evaluate
from stillroom.pipeline.student.metrics import BINS
from stillroom.storage.records import Pack, Sequence
from tests.student.world import World, documents_of, pack_of, score

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(world: World) -> Any:
    return AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32).eval()


def heldout(world: World, teacher: Any, *, signal: bool = True) -> list[Pack]:
    from transformers import AutoTokenizer

    documents = documents_of(AutoTokenizer.from_pretrained(world.teacher), 9)
    sequences = [Sequence(ids) for ids in documents]
    topks = [score(teacher, s, vocabulary=world.vocabulary, k=16) for s in sequences]
    return [
        pack_of([s], [t] if signal else None, window=48, index=i)
        for i, (s, t) in enumerate(zip(sequences, topks, strict=True))
    ]


def measure(model: Any, packs: list[Pack], world: World) -> Any:
    return evaluate(model, packs, packing=True, vocabulary=world.vocabulary, device=CPU, autocast=False)


def test_the_teacher_itself_is_at_zero_and_always_agrees(world: World, teacher: Any) -> None:
    metrics = measure(teacher, heldout(world, teacher), world)
    assert abs(metrics.kl) < 1e-5
    assert metrics.top1 == 1.0


def test_metrics_are_what_they_are_defined_as(world: World, teacher: Any) -> None:
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(teacher.config).eval()
    packs = heldout(world, teacher)
    metrics = measure(student, packs, world)
    kl, agree, nll, confidence, correct = [], [], [], [], []
    for pack in packs:
        ids = torch.from_numpy(pack.input_ids[pack.segment_ids == 0].astype(np.int64))[None]
        with torch.no_grad():
            z_TV = student(input_ids=ids).logits[0, :-1, : world.vocabulary].double()
            t_TV = teacher(input_ids=ids).logits[0, :-1, : world.vocabulary].double()
        q, p = z_TV.softmax(-1), t_TV.softmax(-1)
        top = p.topk(16, -1).indices
        p_bucket = torch.cat([p.gather(-1, top), 1 - p.gather(-1, top).sum(-1, keepdim=True)], -1)
        q_bucket = torch.cat([q.gather(-1, top), 1 - q.gather(-1, top).sum(-1, keepdim=True)], -1)
        kl += (p_bucket * (p_bucket / q_bucket).log()).sum(-1).tolist()
        agree += (q.argmax(-1) == p.argmax(-1)).tolist()
        nll += (-q.log().gather(-1, ids[0, 1:, None])).flatten().tolist()
        confidence += q.max(-1).values.tolist()
        correct += (q.argmax(-1) == ids[0, 1:]).tolist()
    assert metrics.tokens == len(kl)
    assert metrics.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert metrics.top1 == pytest.approx(np.mean(agree))
    assert metrics.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    bins = np.minimum((np.array(confidence) * BINS).astype(int), BINS - 1)
    ece = sum(
        abs(np.mean(np.array(correct)[bins == b]) - np.mean(np.array(confidence)[bins == b])) * np.mean(bins == b)
        for b in np.unique(bins)
    )
    assert metrics.ece == pytest.approx(ece, rel=1e-4)


def test_without_signal_there_is_perplexity_only(world: World, teacher: Any) -> None:
    packs = heldout(world, teacher)
    with_signal, without = (
        measure(teacher, packs, world),
        measure(teacher, heldout(world, teacher, signal=False), world),
    )
    assert without.kl is None
    assert without.top1 is None
    assert without.perplexity == with_signal.perplexity


def test_packs_in_which_nothing_trains_give_no_metrics(world: World, teacher: Any) -> None:
    empty = pack_of([Sequence(np.array([5], dtype=np.int32))], None, window=48)
    assert measure(teacher, [empty], world) is None


def test_it_neither_trains_nor_draws_random_numbers(world: World, teacher: Any) -> None:
    teacher.train()
    before = torch.get_rng_state()
    measure(teacher, heldout(world, teacher)[:2], world)
    assert teacher.training
    assert torch.equal(before, torch.get_rng_state())
    teacher.eval()


def test_teacher_text_and_ground_truth_are_told_apart(world: World, teacher: Any) -> None:
    """Also in a pack that holds both: the perplexities are those of each kind alone."""
    from transformers import AutoTokenizer

    sequences = [Sequence(ids) for ids in documents_of(AutoTokenizer.from_pretrained(world.teacher), 9)]
    mixed, written = sequences[:6], {s.digest for s in sequences[:6:2]}
    packs = [pack_of(mixed[at : at + 2], None, window=96, index=at) for at in (0, 2, 4)]
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_config(teacher.config).eval()

    def of(packs: list[Pack], generated: Any = ()) -> Any:
        return evaluate(
            student, packs, packing=True, vocabulary=world.vocabulary, device=CPU, autocast=False, generated=generated
        )

    found, plain = of(packs, written), of(packs)
    alone = [
        of([pack_of([s], None, window=48) for s in mixed if (s.digest in written) == kind]) for kind in (True, False)
    ]
    assert found.perplexity_teacher_text == pytest.approx(alone[0].perplexity, rel=1e-5)
    assert found.perplexity_ground_truth == pytest.approx(alone[1].perplexity, rel=1e-5)
    assert found.perplexity_teacher_text != pytest.approx(found.perplexity_ground_truth, rel=1e-2)
    assert {key: value for key, value in found.as_dict().items() if key in plain.as_dict()} == plain.as_dict()
    assert found.as_dict().keys() - plain.as_dict().keys() == {"perplexity_teacher_text", "perplexity_ground_truth"}
    everything = of(packs, {s.digest for s in mixed})
    assert everything.as_dict() == plain.as_dict(), "of one kind alone there is one number"
