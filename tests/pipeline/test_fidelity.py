"""Fidelity of a store, kept in it: measured once for a sample and all who ask, anew where it is damaged."""

import json
from pathlib import Path

import numpy as np
import pytest

from stillroom.pipeline.console import Console
from stillroom.pipeline.fidelity import (
    keep_band,
    keep_fidelity,
    measure_store,
    rebuilder,
    require_supported,
    require_taught,
)
from stillroom.pipeline.plan import Plan, make_plan
from stillroom.pipeline.precompute import SCORED_TWICE, _truth_wanted
from stillroom.pipeline.student.config import StudentConfig
from stillroom.storage.calibration import save_calibration
from stillroom.storage.catalog.inspect import inspect_store
from stillroom.storage.catalog.stores import FIDELITY, kept_fidelity
from stillroom.storage.errors import UnsupportedSignal
from stillroom.storage.fidelity.measure import TEMPERATURES
from stillroom.storage.fidelity.truth import read_truth
from stillroom.storage.records import SampledSpec, SignalSpec, TopKSpec
from stillroom.storage.store import Store, open_store
from stillroom.workers.actor import TeacherActor
from tests.e2e.runs import Setup, distil, sentences

DOCUMENTS = sentences(61, 40)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module", name="taught")
def _taught(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    setup = Setup.make(
        tmp_path_factory.mktemp("fidelity"), DOCUMENTS, signal={"topk": {"k": 8}, "sampled": {"draws": 20}}
    )
    distil(setup)
    return setup


@pytest.fixture(name="store")
def _store(taught: Setup) -> Store:
    store = open_store(str(taught.folder / "store"))
    if store.files.exists(FIDELITY):
        store.files.delete(FIDELITY)
    return store


def temperatures(store: Store) -> set[float]:
    kept = kept_fidelity(store.files)
    assert kept is not None
    return {row["temperature"] for row in kept["rows"] if row["tier"] == "topk"}


class TestKept:
    def test_it_is_measured_once_and_is_what_measuring_says(self, taught: Setup, store: Store) -> None:
        keep_fidelity(taught.recipe(), store, QUIET)
        first = store.files.read(FIDELITY)
        changed = (taught.folder / "store" / FIDELITY).stat().st_mtime_ns
        keep_fidelity(taught.recipe(), store, QUIET)
        assert (taught.folder / "store" / FIDELITY).stat().st_mtime_ns == changed
        fidelity, band = measure_store(store, TEMPERATURES)
        kept = json.loads(first)
        assert band is not None
        assert kept["rows"] == fidelity.as_dict()["rows"]
        assert kept["noise"] == band.as_dict()

    def test_two_recipes_with_students_of_their_own_do_not_measure_in_turns(self, taught: Setup, store: Store) -> None:
        one, other = (taught.recipe(f"students.0.losses.temperature={t}") for t in (3, 5))
        for recipe in (one, other):
            keep_fidelity(recipe, store, QUIET)
        assert temperatures(store) == {*TEMPERATURES, 3.0, 5.0}
        before = (taught.folder / "store" / FIDELITY).stat().st_mtime_ns
        for recipe in (one, other):
            keep_fidelity(recipe, store, QUIET)
        assert (taught.folder / "store" / FIDELITY).stat().st_mtime_ns == before

    @pytest.mark.parametrize("damage", [b"", b"{}", b'{"rows": [1], "noise": null, "sample": ""}'])
    def test_a_damaged_account_is_measured_anew(self, taught: Setup, store: Store, damage: bytes) -> None:
        keep_fidelity(taught.recipe(), store, QUIET)
        whole = store.files.read(FIDELITY)
        (taught.folder / "store" / FIDELITY).write_bytes(damage)
        keep_fidelity(taught.recipe(), store, QUIET)
        assert store.files.read(FIDELITY) == whole

    def test_one_number_changed_is_seen(self, taught: Setup, store: Store) -> None:
        keep_fidelity(taught.recipe(), store, QUIET)
        whole = store.files.read(FIDELITY)
        changed = whole.replace(b'"positions": 16', b'"positions": 17', 1)
        assert changed != whole
        (taught.folder / "store" / FIDELITY).write_bytes(changed)
        keep_fidelity(taught.recipe(), store, QUIET)
        assert store.files.read(FIDELITY) == whole

    def test_a_store_without_a_sample_keeps_the_probes_band(self, tmp_path: Path) -> None:
        setup = Setup.make(tmp_path, DOCUMENTS, fidelity={"positions": 0})
        distil(setup)
        store = open_store(str(tmp_path / "store"))
        rows = [{"temperature": 1.0, "kl_nats": 1e-7, "kl_worst_nats": 1e-6, "gradient_angle_deg": 0.01}]
        band = {"positions": 15, "max_logit_difference": 1e-4, "rows": rows}
        keep_band(store, band, QUIET)
        keep_band(store, band | {"positions": 16}, QUIET)
        keep_fidelity(setup.recipe(), store, QUIET)
        found = inspect_store(store.uri)
        assert (found["fidelity"], found["noise_positions"], found["noise_band"]) == ([], 15, rows)

    def test_a_sample_is_measured_whatever_the_probe_left(self, taught: Setup, store: Store) -> None:
        keep_band(store, {"positions": 15, "max_logit_difference": 1e-4, "rows": []}, QUIET)
        keep_fidelity(taught.recipe(), store, QUIET)
        kept = kept_fidelity(store.files)
        assert kept is not None
        assert kept["rows"]
        assert kept["noise"]["positions"] != 15

    def test_a_student_of_hard_labels_asks_for_no_temperature(self, taught: Setup, store: Store) -> None:
        keep_fidelity(taught.recipe("students.0.losses={alpha: 0, temperature: 3}"), store, QUIET)
        assert temperatures(store) == set(TEMPERATURES)


class TestSample:
    """What a stopped run leaves to choose is what an undisturbed one would have chosen."""

    @pytest.mark.parametrize("done", [1, 3, 6, 9])
    def test_the_same_positions_and_the_same_of_them_twice(self, tmp_path: Path, done: int) -> None:
        setup = Setup.make(tmp_path, DOCUMENTS, fidelity__positions=64)
        recipe = setup.recipe()
        from stillroom.pipeline.sources import Sources

        sources = Sources(recipe, QUIET)
        manifest, store = sources.manifest(), sources.store()
        plan = make_plan(manifest, store, unit_tokens=128, seed=0)
        assert len(plan.pending) > 9
        undisturbed = _truth_wanted(recipe, plan, store)
        assert len(undisturbed.alone) == SCORED_TWICE
        actor = TeacherActor(sources.teacher_spec(), store.identity, store.uri)
        twice: set[str] = set()
        receipts = []
        for unit in plan.pending[:done]:
            sequences = [row.sequence for row in manifest.rows([plan.rows[s] for s in unit.sequences])]
            positions = {s: undisturbed.positions[s] for s in unit.sequences if s in undisturbed.positions}
            alone = undisturbed.alone & positions.keys()
            receipts.append(actor.score_unit(unit, sequences, type(undisturbed)(positions, alone)))
            twice |= alone
        store.commit(receipts)
        rest = make_plan(manifest, store, unit_tokens=128, seed=0)
        again = _truth_wanted(recipe, Plan(rest.pending, rest.sequences, rest.held, rest.rows), store)
        held = read_truth(store.files, list(plan.pending[:done]), store.identity)
        chosen = dict(again.positions)
        for sequence, position in held.keys if held else []:
            chosen[sequence] = (*chosen.get(sequence, ()), position)
        assert chosen == undisturbed.positions
        assert twice | again.alone == undisturbed.alone
        assert not twice & again.alone


class TestSupported:
    def student(self, **losses: object) -> StudentConfig:
        return StudentConfig.model_validate({"name": "a", "model": {"cut": {"layers": 1}}, "losses": losses})

    def test_the_bound_decides(self, taught: Setup, store: Store) -> None:
        row = measure_store(store, [2.0])[0].row("topk", 2.0)
        assert row is not None
        student = self.student(temperature=2)
        for angle, fits in ((row.gradient_angle_deg + 1e-6, True), (row.gradient_angle_deg - 1e-3, False)):
            recipe = taught.recipe(f"fidelity.max_gradient_angle_deg={angle!r}")
            if fits:
                require_supported(recipe, student, store)
                continue
            with pytest.raises(UnsupportedSignal, match=f"gradient angle {row.gradient_angle_deg:.3g}°"):
                require_supported(recipe, student, store)

    def test_hard_labels_and_recipes_without_a_sample_are_not_held_against_it(
        self, taught: Setup, store: Store
    ) -> None:
        strict = ["fidelity.max_gradient_angle_deg=0.001"]
        require_supported(taught.recipe(*strict), self.student(alpha=0, temperature=4), store)
        require_supported(taught.recipe(*strict, "fidelity.positions=0"), self.student(temperature=4), store)

    @pytest.mark.parametrize("words", [[], ["fidelity.positions=0"], ["fidelity.max_kl_added=null"]])
    def test_draws_serve_one_temperature_whatever_the_bound(
        self, taught: Setup, store: Store, words: list[str]
    ) -> None:
        recipe = taught.recipe(*words)
        with pytest.raises(UnsupportedSignal, match="T = 2 was asked for; train at temperature 1"):
            require_supported(recipe, self.student(signal="sampled", temperature=2), store)
        require_supported(recipe, self.student(signal="sampled", temperature=1), store)

    def test_before_a_store_is_there(self) -> None:
        draws = SignalSpec(sampled=SampledSpec(50))
        require_taught(self.student(temperature=1), draws, where="s")
        require_taught(self.student(temperature=4), SignalSpec(TopKSpec(8)), where="s")
        require_taught(self.student(alpha=0, signal="hidden"), draws, where="s")
        with pytest.raises(UnsupportedSignal, match="store s: draws"):
            require_taught(self.student(temperature=2), draws, where="s")
        with pytest.raises(UnsupportedSignal, match=r"losses\.signal is hidden, the store holds 50 draws"):
            require_taught(self.student(signal="hidden"), draws, where="s")


@pytest.mark.parametrize("dtype", ["int16", "bfloat16"])
def test_hidden_states_are_measured_as_a_student_rebuilds_them(tmp_path: Path, dtype: str) -> None:
    """The tail of the kept ids and the intervals of their gaps count: measured at each temperature by itself."""
    from stillroom.pipeline.sources import Sources
    from stillroom.storage.files import open_files
    from stillroom.storage.store import create_store
    from stillroom.workers.head import save_head, steps_of
    from stillroom.workers.torch_teacher import TorchTeacher

    setup = Setup.make(tmp_path, DOCUMENTS, signal={"topk": {"k": 8}, "hidden": {"dtype": dtype}})
    recipe = setup.recipe()
    sources = Sources(recipe, QUIET)
    files = open_files(recipe.store.path)
    head = TorchTeacher(sources.teacher_spec()).output_head()  # as the founding does, without Ray
    save_head(files, head)
    steps = save_calibration(files, steps_of(head)) if dtype == "int16" else None
    create_store(recipe.store.path, sources.identity(calibration=steps))
    distil(setup)
    store = open_store(recipe.store.path)
    fidelity, _ = measure_store(store, [1.0, 4.0])
    for temperature in (1.0, 4.0):
        hidden, topk = fidelity.row("hidden", temperature), fidelity.row("topk", temperature)
        assert hidden is not None
        assert topk is not None
        assert hidden.retained_mass == 1
        assert hidden.gradient_angle_deg < 2 < topk.gradient_angle_deg
    stored = next(store.sequences())
    assert stored.signal is not None
    rebuild = rebuilder(store.files, store.identity)
    signal = stored.signal[np.arange(3)]
    assert not np.array_equal(rebuild(signal, 1.0), rebuild(signal, 4.0))
