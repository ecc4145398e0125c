"""What a hidden part needs before the first unit: written once, the same by whoever founds, and never half."""

from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.console import Console
from stillroom.pipeline.founding import CALIBRATION_TOKENS, calibration_sample, found_store
from stillroom.pipeline.sources import Sources
from stillroom.storage.calibration import find_head, load_calibration
from stillroom.storage.errors import RecipeError, StoreError, StoreFull
from stillroom.storage.store import Store
from stillroom.workers.actor import TeacherActor
from tests.e2e.runs import Setup, sentences, write_corpus
from tests.tiny import tiny_teacher

DOCUMENTS = sentences(51, 30)
QUIET = Console(quiet=True)


def made(folder: Path, dtype: str | None = "int8", **over: Any) -> Setup:
    signal = {"topk": {"k": 8}} | ({"hidden": {"dtype": dtype}} if dtype else {})
    return Setup.make(folder, DOCUMENTS, signal=signal, students=[], **over)


def founded(setup: Setup, *words: str) -> Store:
    recipe = setup.recipe(*words)
    sources = Sources(recipe, QUIET)
    return found_store(recipe, sources, sources.manifest(), QUIET)


def side_files(setup: Setup) -> dict[str, int]:
    folder = setup.folder / "store" / "_stillroom"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-*")}


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["int16", "int8", "bfloat16"])
def test_a_store_is_founded_once(tmp_path: Path, dtype: str) -> None:
    setup = made(tmp_path, dtype)
    store = founded(setup)
    hidden = store.identity.signal.hidden
    assert hidden is not None
    assert (hidden.calibration is None) == (dtype == "bfloat16")
    if hidden.calibration:
        assert load_calibration(store.files, hidden.calibration).width == 32
    before = side_files(setup)
    assert len(before) == (1 if dtype == "bfloat16" else 2)
    find_head(store.files)
    write_corpus(tmp_path / "corpus.jsonl", sentences(52, 10))
    assert founded(setup).identity == store.identity
    assert side_files(setup) == before


@pytest.mark.real
def test_a_founder_that_was_killed_is_followed_by_one_that_ends_the_same(tmp_path: Path) -> None:
    """Head and calibration are written before the identity: what is left of a killed founder is written again."""
    setup = made(tmp_path)
    recipe = setup.recipe()
    sources = Sources(recipe, QUIET)
    sample = calibration_sample(recipe, sources.manifest())
    actor = TeacherActor(sources.teacher_spec(), sources.identity(), recipe.store.path)
    calibration = actor.found(sample)
    left = side_files(setup)
    assert sources.store_if_founded() is None
    store = founded(setup)
    assert store.identity.signal.hidden is not None
    assert store.identity.signal.hidden.calibration == calibration
    assert side_files(setup).keys() == left.keys()


def test_what_another_teachers_founder_left_is_not_built_upon(tmp_path: Path) -> None:
    """A student would find two heads: said before anything is founded."""
    setup = made(tmp_path)
    other = tiny_teacher(tmp_path / "other", seed=9)
    for words in ([f"teacher.model={other}"], []):
        recipe = setup.recipe(*words)
        sources = Sources(recipe, QUIET)
        sample = calibration_sample(recipe, sources.manifest())
        actor = TeacherActor(sources.teacher_spec(), sources.identity(), recipe.store.path)
        if words:
            actor.found(sample)
            continue
        with pytest.raises(StoreError, match="2 output heads"):
            actor.found(sample)


def test_without_a_hidden_part_no_teacher_is_loaded(tmp_path: Path) -> None:
    store = founded(made(tmp_path, None))
    assert store.identity.signal.hidden is None
    assert side_files(Setup(tmp_path)) == {}


def test_what_teaching_would_refuse_founds_nothing(tmp_path: Path) -> None:
    setup = made(tmp_path)
    with pytest.raises(StoreFull, match=r"store\.min_free_bytes"):
        founded(setup, f"store.min_free_bytes={10**18}")
    write_corpus(tmp_path / "corpus.jsonl", ["the still drips " * 300])
    with pytest.raises(RecipeError, match="sequences of 300 tokens, the teacher's positions end at 256"):
        founded(setup, "corpus.window=300", "corpus.heldout=0")
    assert not (tmp_path / "store").exists()


def test_the_sample_depends_on_the_set_of_documents_alone(tmp_path: Path) -> None:
    setup = made(tmp_path)
    many = sentences(53, 400)

    def sample(documents: list[str]) -> list[str]:
        write_corpus(tmp_path / "corpus.jsonl", documents)
        recipe = setup.recipe()
        return [s.digest for s in calibration_sample(recipe, Sources(recipe, QUIET).manifest())]

    first = sample(many)
    assert sample([*reversed(many), *many[:7]]) == first == sorted(first)
    recipe = setup.recipe()
    lengths = [len(s.input_ids) for s in calibration_sample(recipe, Sources(recipe, QUIET).manifest())]
    assert CALIBRATION_TOKENS - 32 < sum(lengths) <= CALIBRATION_TOKENS
