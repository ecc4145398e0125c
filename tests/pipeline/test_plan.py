"""Plans: a pure function of the set of sequences, and true to what was planned and committed before."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.pipeline.console import Console
from stillroom.pipeline.plan import Plan, make_plan, pack_units
from stillroom.pipeline.sources import Sources
from stillroom.storage.manifest import Manifest
from stillroom.storage.store import Store, open_store
from tests.e2e.runs import Setup, distil, sentences, write_corpus

DOCUMENTS = sentences(21, 24)


@pytest.fixture(scope="module", name="setup")
def _setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Planned and taught once; the tests only look, or work on a folder of their own."""
    setup = Setup.make(tmp_path_factory.mktemp("plan"), DOCUMENTS)
    distil(setup)
    return setup


@pytest.fixture(name="untaught")
def _untaught(tmp_path: Path) -> Setup:
    return Setup.make(tmp_path, DOCUMENTS)


def manifest_of(setup: Setup) -> Manifest:
    return Manifest.open(setup.folder / "run" / "corpus.parquet")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), unit_tokens=st.integers(1, 400))
def test_units_are_a_function_of_the_set_and_keep_the_budget(
    setup: Setup, data: st.DataObject, unit_tokens: int
) -> None:
    index = manifest_of(setup).index()
    unique = sorted({digest: row for row, digest in enumerate(index.sequences.tolist())}.values())
    chosen = data.draw(st.lists(st.sampled_from(unique), unique=True, min_size=1))
    units = pack_units(index, chosen, unit_tokens)
    assert units == pack_units(index, data.draw(st.permutations(chosen)), unit_tokens)
    packed = [s for unit in units for s in unit.sequences]
    assert packed == sorted(index.sequences[row].decode() for row in chosen)
    for unit in units:
        assert sum(unit.tokens) <= unit_tokens or len(unit.sequences) == 1
    for one, following in pairwise(units):
        assert sum(one.tokens) + following.tokens[0] > unit_tokens, "a unit was cut before its budget"


def plan_of(setup: Setup, *, save: bool = True, unit_tokens: int = 256) -> tuple[Plan, Store]:
    sources = Sources(setup.recipe(), Console(quiet=True))
    manifest, store = sources.manifest(), sources.store()
    return make_plan(manifest, store, unit_tokens=unit_tokens, seed=0, save=save), store


def test_a_saved_plan_is_followed_under_another_budget(untaught: Setup) -> None:
    first, store = plan_of(untaught)
    again, _ = plan_of(untaught, unit_tokens=64)
    assert again == first
    assert sorted(u.id for u in store.planned()) == sorted(u.id for u in first.pending)


def test_looking_saves_nothing(untaught: Setup) -> None:
    looked, store = plan_of(untaught, save=False)
    assert store.planned() == []
    assert plan_of(untaught)[0] == looked


def test_a_unit_of_which_a_sequence_is_gone_is_planned_anew(untaught: Setup) -> None:
    first, _ = plan_of(untaught)
    write_corpus(untaught.folder / "corpus.jsonl", DOCUMENTS[1:])
    second, store = plan_of(untaught)
    index = manifest_of(untaught).index()
    wanted = {s.decode() for s in index.sequences.tolist()}
    assert {s for u in second.pending for s in u.sequences} == wanted
    kept = {u.id for u in first.pending if set(u.sequences) <= wanted}
    assert 0 < len(kept) < len(first.pending)
    assert kept < {u.id for u in second.pending}
    assert len({s for u in second.pending for s in u.sequences}) == second.pending_sequences, (
        "a sequence is in two units"
    )
    # The document comes back: what was planned first holds again, where nothing was committed in between.
    write_corpus(untaught.folder / "corpus.jsonl", DOCUMENTS)
    assert {u.id for u in plan_of(untaught)[0].pending} == {u.id for u in first.pending}
    assert store.committed() == {}


def test_nothing_committed_is_planned(setup: Setup) -> None:
    store = open_store(str(setup.folder / "store"))
    plan = make_plan(manifest_of(setup), store, unit_tokens=1, seed=3)
    assert plan.pending == ()
    assert plan.held == plan.sequences == len({s for u in store.planned() for s in u.sequences})


def test_without_a_store_everything_is_pending(setup: Setup) -> None:
    plan = make_plan(manifest_of(setup), None, unit_tokens=256, seed=0)
    assert plan.held == 0
    assert plan.pending_sequences == plan.sequences
