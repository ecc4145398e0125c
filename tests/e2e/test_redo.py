"""What a dry run calls done, a run takes as done; what a run refuses, a dry run calls stale, and `--redo` gets out of
it. Each on a student that was trained, or begun, by other settings than the recipe's."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.console import Console
from stillroom.pipeline.recipe import load_chain
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.stages.dry_run import Part, parts_of
from stillroom.pipeline.stages.redo import put_aside
from stillroom.pipeline.train import job_of, require_untouched, result_of
from stillroom.storage.errors import StudentError
from stillroom.storage.manifest import Manifest
from tests.e2e.runs import Setup, sentences, taught, trained, write_corpus
from tests.tiny import tiny_teacher

pytestmark = pytest.mark.real

QUIET = Console(quiet=True)


def setup_of(folder: Path, **student: Any) -> Setup:
    """Two sources with names, and a student of two steps."""
    sources = [{"path": str(folder / f"{name}.jsonl"), "name": name} for name in ("a", "b")]
    for number, name in enumerate(("a", "b")):
        write_corpus(folder / f"{name}.jsonl", sentences(number, 12))
    fields = {f"students__0__{key}": value for key, value in ({"steps": 2, "checkpoint_every": 1} | student).items()}
    return Setup.make(folder, [], corpus__sources=sources, **fields)


def train_part(setup: Setup, *overrides: str) -> Part:
    (found,) = (part for part in parts_of(load_chain(setup.folder / "recipe.yaml", overrides)) if part.part == "train")
    return found


def refused(setup: Setup, *overrides: str) -> str:
    """What a run says of the student before the teacher works for it."""
    recipe = setup.recipe(*overrides)
    manifest = Sources(recipe, QUIET).manifest()
    with pytest.raises(StudentError, match="belongs to another run") as error:
        require_untouched(recipe, recipe.students[0], manifest)
    return str(error.value)


@pytest.mark.slow
def test_a_source_of_a_mix_by_another_name(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, mix={"shares": {"a": 0.5}})
    trained(setup.recipe())
    assert train_part(setup).state == "done"
    rename = "corpus.sources.1.name=c"
    part = train_part(setup, rename)
    assert (part.state, part.why.split(":")[0]) == ("stale", "sources")
    assert part.why in setup.run("run", rename, code=1)
    setup.run("run", rename, "--redo")
    assert {part.state for part in parts_of(load_chain(setup.folder / "recipe.yaml", [rename]))} == {"done"}


def test_another_corpus_of_a_phase_in_the_same_place(tmp_path: Path) -> None:
    other = tmp_path / "phase.parquet"
    phases = [{"steps": 1}, {"steps": 1, "corpus": str(other), "losses": {"alpha": 0}}]
    setup = setup_of(tmp_path, steps=None, phases=phases)
    for limit in (12, 6):  # the second one lies elsewhere until the student is trained
        elsewhere = setup.recipe(f"run_dir={tmp_path}/{limit}", f"corpus.limit_documents={limit}")
        Sources(elsewhere, QUIET).manifest()
    shutil.copy(tmp_path / "12" / "corpus.parquet", other)
    trained(setup.recipe())
    assert train_part(setup).state == "done"
    shutil.copy(tmp_path / "6" / "corpus.parquet", other)
    part = train_part(setup)
    assert part.state == "stale"
    assert part.why.startswith(f"{other}: ")
    assert part.why.endswith(f"{Manifest.open(other).digest} now")
    assert part.why in refused(setup)
    put_aside([part], QUIET)
    assert train_part(setup).state == "runs"
    trained(setup.recipe())
    assert train_part(setup).state == "done"


def test_a_student_that_is_begun(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    trained(setup.recipe())
    folder = tmp_path / "run" / "students" / "cut"
    (folder / "result.json").unlink()
    assert train_part(setup).why == "begun, it goes on after step 2"
    for change, why in (("students.0.lr=0.5", "lr: 0.001 there, 0.5 asked"), ("corpus.heldout=0.4", "manifest: ")):
        part = train_part(setup, change)
        assert part.state == "stale"
        assert part.why.startswith(why)
        assert part.why in refused(setup, change)
        Sources(setup.recipe(), QUIET).manifest()  # as it was
    (folder / "checkpoints" / "step-00000002" / "state.json").write_text("{")
    assert train_part(setup, "students.0.lr=0.5").state == "stale", "the one before it says so too"
    newest = folder / "checkpoints" / "step-00000002"
    newest.rename(newest.with_suffix(".damaged"))  # as a run does that could not read it
    assert train_part(setup).why.startswith("begun, it goes on after step ")
    put_aside([train_part(setup, "students.0.lr=0.5")], QUIET)
    assert train_part(setup, "students.0.lr=0.5").why == "not trained yet"


def test_other_weights_in_the_folder_where_it_starts(tmp_path: Path) -> None:
    start = tmp_path / "start"
    tiny_teacher(start, layers=1, seed=7)
    setup = setup_of(tmp_path, model={"from": str(start)})
    trained(setup.recipe())
    for path in start.iterdir():
        os.utime(path)
    assert train_part(setup).state == "done", "the same bytes, written again"
    tiny_teacher(start, layers=1, seed=8)
    part = train_part(setup)
    assert (part.state, part.why.split(":")[0]) == ("stale", "start")
    assert "what model.from names changed" in refused(setup)
    with pytest.raises(StudentError, match="names changed"):
        result_of(job_of(setup.recipe(), setup.recipe().students[0]))
    (start / "model.safetensors").unlink()
    assert train_part(setup).state == "done", "without its weights nothing says otherwise"


def test_another_dtype_of_the_export(tmp_path: Path) -> None:
    """It is exported again, from its last checkpoint; trained again only by `--redo`, where there is none."""
    setup, asked = setup_of(tmp_path), "students.0.export_dtype=bfloat16"
    trained(setup.recipe())
    folder = tmp_path / "run" / "students" / "cut"
    before, lines = json.loads((folder / "result.json").read_text()), (folder / "log.jsonl").read_text().splitlines()
    assert (train_part(setup, asked).state, train_part(setup).state) == ("runs", "done")
    trained(setup.recipe(asked))
    after = json.loads((folder / "result.json").read_text())
    assert after.pop("export_dtype") == "bfloat16"
    before.pop("export_dtype")
    assert after == before
    assert len((folder / "log.jsonl").read_text().splitlines()) == len(lines)
    assert json.loads((folder / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (train_part(setup, asked).state, train_part(setup).state) == ("done", "runs")
    shutil.rmtree(folder / "checkpoints")
    part = train_part(setup)
    assert (part.state, part.why) == (
        "stale", "export_dtype: bfloat16 there, float32 asked, and the checkpoint that it is made from is gone"
    )  # fmt: skip
    with pytest.raises(StudentError, match="the checkpoint that it is made from is gone"):
        result_of(job_of(setup.recipe(), setup.recipe().students[0]))


def test_a_store_that_has_grown_is_no_other_one(tmp_path: Path) -> None:
    """A student keeps the list of shards that it began with."""
    setup = setup_of(tmp_path)
    trained(setup.recipe())
    trained(setup.recipe(f"run_dir={tmp_path}/more", "corpus.window=24"))
    assert train_part(setup).state == "done"
    recipe = setup.recipe()
    assert result_of(job_of(recipe, recipe.students[0])) is not None


def test_another_teachers_store_in_the_same_place(tmp_path: Path) -> None:
    """The store was removed and taught anew: a student of the first one is not taken for one of the second."""
    setup = setup_of(tmp_path)
    trained(setup.recipe())
    recipe = setup.recipe()
    shutil.rmtree(tmp_path / "store")
    assert result_of(job_of(recipe, recipe.students[0])) is not None, "a trained student is found without its store"
    tiny_teacher(tmp_path / "teacher", seed=5)
    taught(recipe)
    part = train_part(setup)
    assert part.state == "stale"
    assert "the store's list of shards changed since" in part.why
    with pytest.raises(StudentError, match="list of shards changed since"):
        result_of(job_of(recipe, recipe.students[0]))
    put_aside([part], QUIET)
    trained(recipe)
    assert train_part(setup).state == "done"
