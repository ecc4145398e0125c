"""Every tier through the whole path: founded, taught, measured, learned from, resumed, grown; and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.pipeline.cli import main
from stillroom.pipeline.console import Console
from stillroom.pipeline.fidelity import keep_fidelity
from stillroom.pipeline.train import train
from stillroom.storage.calibration import find_head
from stillroom.storage.errors import UnsupportedSignal
from stillroom.storage.fidelity.truth import read_positions, read_truth
from stillroom.storage.store import Store, open_store
from tests.e2e.runs import Setup, assert_equal_rows, distil, kill_group, rows, sentences, wait_for, write_corpus

pytestmark = pytest.mark.real

DOCUMENTS = sentences(41, 40)
STEPS = 8


def student(name: str, **losses: Any) -> dict[str, Any]:
    return {
        "name": name, "model": {"cut": {"layers": 1}}, "steps": STEPS, "batch_packs": 2, "lr": 5e-3, "warmup_steps": 1,
        "device": "cpu", "losses": losses,
    }  # fmt: skip


TOPK = student("topk", signal="topk", alpha=0.7, temperature=2)
DRAWN = student("sampled", signal="sampled", alpha=0.7, temperature=1)
HIDDEN = student("hidden", signal="hidden", alpha=0.7, temperature=4)
BOTH = student("both", signal="topk+sampled", alpha=0.7, temperature=1)


def made(folder: Path, signal: dict[str, Any], *students: dict[str, Any], **over: Any) -> Setup:
    """A recipe that keeps `signal`. Rounding a random teacher of 32 channels is not bounded: it is measured."""
    held = {"topk": None, "sampled": None, "hidden": None} | signal
    fidelity = {"positions": 16, "max_gradient_angle_deg": None, "max_kl_added": None}
    return Setup.make(folder, DOCUMENTS, signal=held, students=list(students), **({"fidelity": fidelity} | over))


def store_of(setup: Setup) -> Store:
    return open_store(str(setup.folder / "store"))


def check_learned(setup: Setup, result: dict[str, Any], *, measured: bool = True) -> None:
    """The run's steps are finite and its loss fell; what the store can say of the student is said."""
    losses = [loss for _, loss, _, _ in setup.losses(result["name"])]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    for when in ("before", "after"):
        assert math.isfinite(result[when]["perplexity"])
        if measured:
            assert result[when]["kl"] >= 0
            assert 0 <= result[when]["top1"] <= 1
        else:
            assert result[when]["kl"] is result[when]["top1"] is None


ALONE = {
    "topk": ({"topk": {"k": 8}}, [TOPK]),
    "packed": ({"topk": {"k": 8, "layout": "packed"}}, [TOPK]),
    "nucleus": ({"topk": {"k": 64, "nucleus": {"mass": 0.3}}}, [TOPK]),
    "sampled": ({"sampled": {"draws": 20}}, [DRAWN]),
    "hidden int16": ({"hidden": {"dtype": "int16"}}, [HIDDEN]),
    "hidden int8": ({"hidden": {"dtype": "int8"}}, [HIDDEN]),
    "hidden bfloat16 and top-k": ({"topk": {"k": 8}, "hidden": {"dtype": "bfloat16"}}, [HIDDEN, TOPK]),
}


#: The store of all parts has what they would show; they found stores by Ray.
SLOW = ("packed", "nucleus", "hidden int16", "hidden bfloat16 and top-k")


@pytest.mark.parametrize(
    ("signal", "students"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in ALONE.items()],
)
def test_a_tier_is_taught_and_learned_from(
    tmp_path: Path, signal: dict[str, Any], students: list[dict[str, Any]]
) -> None:
    """Two of the seven need a second student; a hidden part is founded by a teacher in a Ray of its own."""
    setup = made(tmp_path, signal, *students)
    recipe, sources, plan = distil(setup)
    assert plan.pending
    keep_fidelity(recipe, sources.store(), Console(quiet=True))
    for each in recipe.students:
        result = train(recipe, each, Console(quiet=True))
        check_learned(setup, result, measured=each.losses.signal != "sampled")
    before = rows(store_of(setup))
    _, _, again = distil(setup)
    assert again.pending == ()
    assert rows(store_of(setup)).keys() == before.keys()


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    signal = {"topk": {"k": 8}, "sampled": {"draws": 20}, "hidden": {"dtype": "int16"}}
    setup = made(tmp_path_factory.mktemp("whole"), signal, TOPK, DRAWN, HIDDEN, BOTH)
    setup.run()
    return setup


class TestAllParts:
    """One store of all three parts, taught through Ray for five students by one command."""

    def test_each_student_learned_and_only_the_first_was_taught_for(self, whole: Setup) -> None:
        summary = json.loads((whole.folder / "run" / "summary.json").read_text())
        assert summary["teacher_batches_first_run"] > 0
        assert summary["teacher_batches_second_run"] == 0
        for each in ("topk", "sampled", "hidden", "both"):
            result = json.loads((whole.folder / "run" / "students" / each / "result.json").read_text())
            # The top-k beside the draws says how close the student is.
            check_learned(whole, result)

    def test_the_parts_are_aligned(self, whole: Setup) -> None:
        for found in rows(store_of(whole)).values():
            assert len({len(found[name]) for name in ("ids", "drawn_ids", "hidden")}) == 1
            assert (found["drawn_counts"].sum(1) == 20).all()

    def test_fidelity_is_kept_and_shown_for_each_part(self, whole: Setup, capfd: pytest.CaptureFixture[str]) -> None:
        kept = json.loads((whole.folder / "store" / "_stillroom" / "fidelity.json").read_text())
        assert main(["inspect", str(whole.folder / "store"), "--json"]) == 0
        shown = json.loads(capfd.readouterr().out)
        assert shown["fidelity"] == kept["rows"]
        measured = {(row["tier"], row["temperature"]) for row in kept["rows"]}
        everywhere = {(tier, float(t)) for tier in ("topk", "hidden") for t in (1, 2, 4, 8)}
        assert measured == everywhere | {("sampled", 1.0), ("topk+sampled", 1.0)}
        assert {row["positions"] for row in kept["rows"]} == {16}
        assert shown["noise_positions"] > 0
        angle = {row["tier"]: row["gradient_angle_deg"] for row in kept["rows"] if row["temperature"] == 1}
        assert angle["hidden"] < 5 < angle["topk"]

    def test_the_same_command_does_nothing(self, whole: Setup) -> None:
        ledger, shards = whole.ledger(), store_of(whole).committed()
        side = {p: p.stat().st_mtime_ns for p in (whole.folder / "store" / "_stillroom").rglob("*.json")}
        printed = whole.run()
        assert printed.count("no teacher is needed") == printed.count("is trained already") == 4
        assert "founding" not in printed
        assert whole.ledger() == ledger
        assert store_of(whole).committed() == shards
        fidelity = whole.folder / "store" / "_stillroom" / "fidelity.json"
        assert fidelity.stat().st_mtime_ns == side[fidelity]


def truth_files(setup: Setup) -> list[str]:
    """Names hold the digest of what is in them."""
    return sorted(path.name for path in (setup.folder / "store" / "_stillroom" / "truth").iterdir())


@pytest.mark.slow
def test_a_driver_killed_while_it_teaches_int8_finishes_as_if_undisturbed(tmp_path: Path) -> None:
    over: dict[str, Any] = {"store__unit_tokens": 128, "corpus__heldout": 0.02, "fidelity__positions": 128}
    documents = sentences(43, 900)
    signal = {"topk": {"k": 8}, "sampled": None, "hidden": {"dtype": "int8"}}
    # One teacher for both: its name is part of the identity.
    over["teacher__model"] = str(tmp_path / "killed" / "teacher")
    one, other = (
        Setup.make(tmp_path / name, documents, signal=signal, students=[], **over) for name in ("killed", "calm")
    )
    process = one.start("teach")
    try:
        first = one.folder / "store" / "_delta_log" / "00000000000000000001.json"
        wait_for(first.exists, process, "the first commit")
    finally:
        kill_group(process)
    before, identity = store_of(one).committed(), store_of(one).identity
    assert 0 < len(before) < len(store_of(one).planned()), "the kill came after the teaching: make it longer"
    one.run("teach")
    other.run("teach")
    assert before.items() <= store_of(one).committed().items()
    assert store_of(one).identity == identity == store_of(other).identity
    assert identity.signal.hidden is not None
    assert len(list((one.folder / "store" / "_stillroom").glob("calibration-*"))) == 1
    assert find_head(store_of(one).files) == find_head(store_of(other).files)
    assert_equal_rows(one.folder / "store", other.folder / "store")
    # The same positions, and the same of them scored twice. A file of a unit whose commit was lost was written again.
    assert truth_files(one) == truth_files(other)
    numbers = [json.loads((s.folder / "store" / "_stillroom" / "fidelity.json").read_text()) for s in (one, other)]
    assert numbers[0] == numbers[1]
    assert numbers[0]["noise"]["positions"] == 32


def test_a_grown_corpus_keeps_calibration_and_sample(tmp_path: Path) -> None:
    signal = {"topk": {"k": 8}, "hidden": {"dtype": "int8"}}
    setup = made(tmp_path, signal, fidelity={"positions": 20, "max_gradient_angle_deg": None})
    write_corpus(tmp_path / "corpus.jsonl", DOCUMENTS[:2])
    distil(setup, "corpus.heldout=0")
    store = store_of(setup)
    identity, held = store.identity, read_positions(store.files, store.planned(), store.identity)
    shards = store.committed()
    counts = []
    for count in (6, 20, 40):
        write_corpus(tmp_path / "corpus.jsonl", DOCUMENTS[:count])
        recipe, _, plan = distil(setup, "corpus.heldout=0")
        assert plan.pending
        assert store.identity == store_of(setup).identity == identity
        assert len(list((tmp_path / "store" / "_stillroom").glob("calibration-*"))) == 1
        now = read_positions(store.files, store.planned(), store.identity)
        assert held.items() <= now.items()
        counts.append(sum(map(len, now.values())))
        assert shards.items() <= store.committed().items()
        keep_fidelity(recipe, store, Console(quiet=True))
        measured = json.loads((tmp_path / "store" / "_stillroom" / "fidelity.json").read_text())
        assert {row["positions"] for row in measured["rows"]} == {counts[-1]}
        held, shards = now, store.committed()
    assert counts[-1] == 20
    assert max(counts) <= 20
    truth = read_truth(store.files, store.planned(), store.identity)
    assert truth is not None
    assert 0 < len(truth.alone_rows) <= len(truth)


@pytest.fixture(scope="module", name="taught")
def _taught(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A top-k store with a sample, and no student yet."""
    setup = made(tmp_path_factory.mktemp("taught"), {"topk": {"k": 8}}, TOPK)
    recipe, sources, _ = distil(setup)
    keep_fidelity(recipe, sources.store(), Console(quiet=True))
    return setup


class TestRefusals:
    """Said in one line, with the number and the remedy, before a step is trained."""

    @pytest.fixture(name="refused")
    def _refused(self, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
        def run(setup: Setup, command: str, *words: str) -> str:
            code = main([command, str(setup.folder / "recipe.yaml"), "--json", *words])
            said = json.loads(capfd.readouterr().out)
            assert (code, said["kind"], said["exit_code"]) == (1, "UnsupportedSignal", 1), said
            assert not list((setup.folder / "run").glob("students/*/log.jsonl"))
            return str(said["error"])

        return run

    def test_topk_at_four_over_the_bound(self, taught: Setup, refused: Callable[..., str]) -> None:
        words = ["students.0.losses.temperature=4", "fidelity.max_gradient_angle_deg=30"]
        kept = json.loads((taught.folder / "store" / "_stillroom" / "fidelity.json").read_text())
        angle = next(row["gradient_angle_deg"] for row in kept["rows"] if row["temperature"] == 4)
        assert angle > 30
        for command in ("train", "run"):
            said = refused(taught, command, *words)
            assert f"gradient angle {angle:.3g}° against full KD, over fidelity.max_gradient_angle_deg = 30" in said
            assert "the hidden tier" in said

    def test_what_is_not_held(self, taught: Setup, refused: Callable[..., str]) -> None:
        for command in ("train", "run"):
            said = refused(taught, command, "students.0.losses.signal=hidden")
            assert "losses.signal is hidden, the store holds top-8 (1/8 nat)" in said
            assert "set it to topk" in said

    def test_a_bound_asks_for_a_sample(self, tmp_path: Path, refused: Callable[..., str]) -> None:
        setup = made(tmp_path, {"topk": {"k": 8}}, TOPK, fidelity={"positions": 0})
        recipe, _, _ = distil(setup)
        assert not (tmp_path / "store" / "_stillroom" / "truth").exists()
        said = refused(setup, "train", "fidelity.positions=16")
        assert "keeps no fidelity sample" in said
        assert "to null to train unchecked" in said
        assert not (tmp_path / "run" / "students" / "topk" / "snapshot.parquet").exists()
        # The recipe that keeps none asks for none.
        check_learned(setup, train(recipe, recipe.students[0], Console(quiet=True)))
        assert not (tmp_path / "store" / "_stillroom" / "fidelity.json").exists()

    @pytest.mark.parametrize("positions", [0, 16])
    def test_draws_at_two_before_a_teacher_starts(
        self, tmp_path: Path, refused: Callable[..., str], positions: int
    ) -> None:
        setup = made(tmp_path, {"sampled": {"draws": 20}}, DRAWN)
        words = ["students.0.losses.temperature=2", f"fidelity.positions={positions}"]
        said = refused(setup, "run", *words)
        assert "T = 2 was asked for; train at temperature 1" in said
        assert not (tmp_path / "store").exists()
        distil(setup)
        assert "train at temperature 1" in refused(setup, "train", *words)

    def test_hard_labels_are_never_refused(self, taught: Setup) -> None:
        recipe = taught.recipe("students.0.losses={alpha: 0, signal: auto}", "fidelity.max_gradient_angle_deg=1",
                               "students.0.name=hard")  # fmt: skip
        assert train(recipe, recipe.students[0], Console(quiet=True))["steps"] == STEPS


def test_a_bound_in_the_middle_is_met_and_then_not(tmp_path: Path) -> None:
    setup = made(tmp_path, {"topk": {"k": 8}}, TOPK)
    recipe, sources, _ = distil(setup)
    keep_fidelity(recipe, sources.store(), Console(quiet=True))
    kept = json.loads((tmp_path / "store" / "_stillroom" / "fidelity.json").read_text())
    angle = next(row["gradient_angle_deg"] for row in kept["rows"] if row["temperature"] == 2)
    below = setup.recipe(f"fidelity.max_gradient_angle_deg={angle - 0.01}")
    with pytest.raises(UnsupportedSignal):
        train(below, below.students[0], Console(quiet=True))
    above = setup.recipe(f"fidelity.max_gradient_angle_deg={angle + 0.01}")
    assert train(above, above.students[0], Console(quiet=True))["steps"] == STEPS
