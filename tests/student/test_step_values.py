"""Temperature, alpha and beta of each step of a run: what the log states, and what its losses show, is the chapter's.

The formulas (§5.3, §2.3, §2.2, §3.3) are written out here from the chapter, and the losses made from dense logits of
teacher and student, so that nothing of what is tested makes what is expected.
"""

from dataclasses import dataclass
from itertools import islice
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Pack
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream
from tests.student.test_mix import GENERATED, TEXT, with_sources
from tests.student.test_session import go, log_of
from tests.student.world import WINDOW, World, build_world, cut_after
from tests.tiny import tiny_model

STEPS = 9
PACKS = 4
FIELDS: dict[str, Any] = {
    "steps": STEPS, "batch_packs": PACKS, "packing": False, "checkpoint_every": 1, "keep_last": STEPS,
    "losses": {
        "temperature": {"from": 6, "to": 2, "shape": "cosine"},
        "alpha": {"from": 0.9, "to": 0.5, "shape": "linear"},
    },
    "mix": {"shares": {"generations": {"from": 0.7, "to": 0.3, "shape": "cosine"}}},
}  # fmt: skip


@dataclass(frozen=True)
class Chapter:
    """Of step t of 0 … t_max."""

    temperature: float
    alpha: float
    beta: float

    @staticmethod
    def at(t: int) -> "Chapter":
        done = t / (STEPS - 1)
        return Chapter(
            temperature=2.0 + (6.0 - 2.0) / 2 * (1 + cos(pi * done)),
            alpha=0.9 + (0.5 - 0.9) * done,
            beta=0.3 + (0.7 - 0.3) / 2 * (1 + cos(pi * done)),
        )


@pytest.fixture(scope="module", name="shelf")
def _shelf(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two sources, and a store of all logits but one: the tail is one id, so its KL is the one over the vocabulary."""
    folder = tmp_path_factory.mktemp("shelf")
    vocabulary = build_world(folder / "counted", k=1).vocabulary
    world = build_world(folder / "world", k=vocabulary - 1)
    return with_sources(world, folder / "manifest.parquet", [("generations", GENERATED), ("text", TEXT)])


@dataclass(frozen=True)
class Ran:
    """A run to its end. student: the folder with the weights of its first step."""

    world: World
    run_dir: Path
    student: Path

    def go(self, run_dir: Path) -> None:
        go(self.world.job(run_dir, model={"from": str(self.student)}, **FIELDS))


@pytest.fixture(scope="module", name="ran")
def _ran(shelf: World, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("ran")
    AutoTokenizer.from_pretrained(shelf.teacher).save_pretrained(folder / "student")
    tiny_model(folder / "student", vocabulary=shelf.vocabulary, seed=3)
    found = Ran(shelf, folder / "whole", folder / "student")
    found.go(found.run_dir)
    return found


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in log_of(run_dir) if record["kind"] == "step"]


def require_the_chapters_values(records: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for t, record in enumerate(records):
        expected = Chapter.at(t)
        assert record["temperature"] == pytest.approx(expected.temperature, rel=1e-12)
        assert record["alpha"] == pytest.approx(expected.alpha, rel=1e-12)
        shares = {"generations": expected.beta, "text": 1 - expected.beta}
        assert record["mix"]["shares"] == pytest.approx(shares, rel=1e-12)
        # L = α L_KD + (1 − α) L_CE
        whole = expected.alpha * record["kd"] + (1 - expected.alpha) * record["ce"]
        assert record["loss"] == pytest.approx(whole, rel=1e-5)
    for name, first, last in (("temperature", 6.0, 2.0), ("alpha", 0.9, 0.5)):
        assert (records[0][name], records[-1][name]) == (first, last), "exact at both ends"


def test_the_log_has_the_chapters_values_step_by_step(ran: Ran) -> None:
    require_the_chapters_values(steps_of(ran.run_dir))


@pytest.mark.parametrize("step", [0, 1, 5, 8])
def test_a_run_cut_off_goes_on_with_the_same_values(step: int, ran: Ran) -> None:
    cut = cut_after(ran.run_dir, step)
    ran.go(cut)
    require_the_chapters_values(steps_of(cut))
    assert log_of(cut) == log_of(ran.run_dir)


@torch.no_grad()
def losses_of(student: Any, teacher: Any, pack: Pack, temperature: float) -> tuple[Tensor, Tensor]:
    """(T² · KL(teacher ‖ student) at T, cross-entropy) of each position that trains, float64."""
    ids, at = torch.from_numpy(pack.input_ids).long()[None], torch.from_numpy(pack.positions)
    z, z_teacher = (model(input_ids=ids).logits[0, at].double() for model in (student, teacher))
    log_q, log_p = torch.log_softmax(z / temperature, -1), torch.log_softmax(z_teacher / temperature, -1)
    kd = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    return kd, -torch.log_softmax(z, -1)[torch.arange(len(at)), torch.from_numpy(pack.labels).long()]


def mean_by_source(parts: dict[bool, list[Tensor]], beta: float) -> float:
    """β · mean over generated text + (1 − β) · mean over the other; of a step with one of them, its mean."""
    means = {generated: float(torch.cat(found).mean()) for generated, found in parts.items() if found}
    shares = {generated: beta if generated else 1 - beta for generated in means}
    return sum(shares[source] * mean for source, mean in means.items()) / sum(shares.values())


def test_each_step_was_trained_with_them(ran: Ran) -> None:
    """Its losses made again, from the weights it began with, at the chapter's T and β; other values would show."""
    manifest, snapshot = Manifest.open(ran.world.manifest), Snapshot.read(ran.world.snapshot)
    documents = manifest.index().documents
    teacher = AutoModelForCausalLM.from_pretrained(ran.world.teacher, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(ran.student, dtype=torch.float32).eval()
    stream = iter(Stream(manifest=manifest, snapshot=snapshot, window=WINDOW, pack=False))
    both = 0
    for t, record in enumerate(steps_of(ran.run_dir)):
        expected = Chapter.at(t)
        if t:
            weights = load_file(ran.run_dir / "checkpoints" / f"step-{t:08}" / "model.safetensors")
            student.load_state_dict(weights, strict=False)
        kd: dict[bool, list[Tensor]] = {True: [], False: []}
        ce: dict[bool, list[Tensor]] = {True: [], False: []}
        packs = list(islice(stream, PACKS))
        assert [pack.index for pack in packs] == record["packs"]
        for pack in packs:
            assert pack.rows is not None
            generated = bool(documents[pack.rows[0]] < GENERATED)
            for parts, loss in zip((kd, ce), losses_of(student, teacher, pack, expected.temperature), strict=True):
                parts[generated].append(loss)
        both += bool(kd[True] and kd[False])
        assert record["kd"] == pytest.approx(mean_by_source(kd, expected.beta), rel=1e-3)
        assert record["ce"] == pytest.approx(mean_by_source(ce, expected.beta), rel=1e-4)
    assert both >= 4, "steps in which beta counts"
