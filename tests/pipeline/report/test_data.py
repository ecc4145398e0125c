"""A run's folder as numbers, in whatever state it is; a store's rows as numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from stillroom.pipeline.console import Console
from stillroom.pipeline.report.data import gather_run, ledger_rows, points_of, read_log, run_folders, thin
from stillroom.pipeline.report.documents import of_run, of_store
from stillroom.pipeline.report.store_data import gather_store
from stillroom.pipeline.run_status import RESOLVED
from stillroom.pipeline.sources import Sources
from stillroom.storage.calibration import save_calibration
from stillroom.storage.errors import UsageError
from stillroom.storage.files import open_files
from stillroom.storage.manifest import Manifest
from stillroom.storage.store import create_store, open_store
from stillroom.workers.head import save_head, steps_of
from stillroom.workers.torch_teacher import TorchTeacher
from tests.e2e.runs import Setup, distil, sentences
from tests.pipeline.report.world import STEPS


class TestRun:
    def test_whole(self, world: Path) -> None:
        found = gather_run(world)
        assert found["missing"] == []
        assert [s["name"] for s in found["students"]] == ["ten", "six"]
        assert set(found["students"][0]["curves"]) == {
            "loss", "kd", "ce", "lr", "temperature", "alpha", "kl", "top1", "perplexity",
        }  # fmt: skip
        assert found["students"][0]["curves"]["kl"] == [(0, 3.0), (STEPS, 1.0)]
        assert [(row["on_behalf_of"], row["teacher_batches"]) for row in found["ledger"]] == [("ten", 4), ("six", 0)]

    def test_what_is_missing_is_said(self, run: Callable[[], Path]) -> None:
        folder = run()
        for name in ("summary.json", "evaluation.json", "corpus.parquet"):
            (folder / name).unlink()
        shutil.rmtree(folder / "students" / "ten")
        (folder / "students" / "six" / "result.json").unlink()
        recipe = yaml.safe_load((folder / RESOLVED).read_text())
        recipe["store"]["path"] = str(folder / "nowhere")
        (folder / RESOLVED).write_text(yaml.safe_dump(recipe))
        found = gather_run(folder)
        beginnings = (
            "The corpus is not read", "Student ten has not begun", "Student six is not trained to its end: step 40 of",
            "Not evaluated yet", "The run has not ended", "The store is not there",
        )  # fmt: skip
        for words in beginnings:
            assert sum(sentence.startswith(words) for sentence in found["missing"]) == 1, words
        assert len(found["missing"]) == len(beginnings)

    def test_a_store_that_moved_with_the_run(self, run: Callable[[], Path]) -> None:
        folder = run()
        store = Path(gather_run(folder)["store"])
        shutil.copytree(store, folder / "store")
        (folder / "summary.json").unlink()
        recipe = yaml.safe_load((folder / RESOLVED).read_text())
        recipe |= {"run_dir": "/elsewhere/run", "store": {"path": "/elsewhere/run/store"}}
        (folder / RESOLVED).write_text(yaml.safe_dump(recipe))
        assert gather_run(folder)["store"] == str(folder / "store")

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"is no run: it has no recipe\.resolved\.yaml"):
            run_folders(tmp_path)

    def test_stages_of_a_chain(self, world: Path, tmp_path: Path) -> None:
        for name in ("b", "a"):
            (tmp_path / "stages" / name).mkdir(parents=True)
            shutil.copy(world / RESOLVED, tmp_path / "stages" / name / RESOLVED)
        found = run_folders(tmp_path)
        assert [path.name for path in found] == ["b", "a"]  # as they were begun
        assert gather_run(found[0])["name"] == "b"

    def test_a_torn_line_and_skipped_steps(self, tmp_path: Path) -> None:
        step = {"kind": "step", "step": 1, "loss": None}
        (tmp_path / "log.jsonl").write_text(json.dumps(step) + '\n{"kind": "st')
        steps, evaluations = read_log(tmp_path / "log.jsonl")
        assert (steps, evaluations, points_of(steps, "loss")) == ([step], [], [])

    def test_long_curves_are_means(self) -> None:
        thinned = thin([(n, float(n)) for n in range(1, 1001)], 300)
        assert len(thinned) == 250
        assert thinned[0] == (4, 2.5)
        assert thinned[-1][0] == 1000

    def test_a_run_without_students(self) -> None:
        assert ledger_rows([{"on_behalf_of": "", "teacher_batches": 2}], [])[0]["teacher_batches"] == 2


class TestStore:
    def test_numbers(self, world: Path) -> None:
        found = gather_store(gather_run(world)["store"])
        assert found["rows_read"] == found["rows"] == sum(found["entropy"]["counts"])
        assert np.diff(np.array(found["mass"]["mass"]), axis=1).min() > 0  # more ids, more mass
        assert 0 < found["entropy"]["mean"] < np.log(found["vocabulary"])

    def test_sampled(self, world: Path) -> None:
        found = gather_store(gather_run(world)["store"], rows=300)
        assert found["rows_read"] == sum(found["entropy"]["counts"]) == 300

    def test_documents_are_the_text_with_a_row_for_each_token_but_the_first(self, world: Path) -> None:
        found = gather_run(world)
        store, manifest = open_store(found["store"]), Manifest.open(world / "corpus.parquet")
        documents = of_run(manifest, store, tokens=100_000)
        assert {d.heldout for d in documents} == {True}
        numbers = sorted({row.document for row in manifest if row.heldout})
        assert len(documents) == len(numbers)
        windows = sorted((row for row in manifest if row.document == numbers[0]), key=lambda row: row.window)
        whole = np.concatenate([row.sequence.input_ids[row.sequence.context :] for row in windows])
        np.testing.assert_array_equal(documents[0].ids, whole)
        assert sum(len(w.teacher) for w in documents[0].windows) == len(whole) - 1

    def test_at_most_as_many_tokens_as_asked(self, world: Path) -> None:
        found = gather_run(world)
        store, manifest = open_store(found["store"]), Manifest.open(world / "corpus.parquet")
        documents = of_run(manifest, store, tokens=60, documents=3)
        assert len(documents) == 3
        assert [sum(len(w.teacher) for w in d.windows) for d in documents] == [20, 20, 20]
        assert documents[0].tokens > 20
        assert len(of_store(store, tokens=60, documents=3)) == 3

    def test_draws_tell_no_mass(self, tmp_path: Path) -> None:
        setup = Setup.make(tmp_path, sentences(2, 3), signal={"topk": None, "sampled": {"draws": 20}})
        recipe, _, _ = distil(setup)
        found = gather_store(recipe.store.path)
        assert found["mass"] is None
        assert found["entropy"]["how"].startswith("of the stored draws")

    def test_hidden_states_alone_give_what_top_k_and_its_curve_give(self, tmp_path: Path) -> None:
        found = []
        for name, signal in (("hidden", {"topk": None, "hidden": {}}), ("topk", {"topk": {"k": 8, "gap_step": None}})):
            setup = Setup.make(tmp_path / name, sentences(2, 3), signal=signal)
            if name == "hidden":
                found_hidden(setup)
            recipe, _, _ = distil(setup)
            found.append(gather_store(recipe.store.path))
            documents = of_store(open_store(recipe.store.path), tokens=100, documents=2)
            assert all(np.isfinite(w.teacher.entropy).all() for d in documents for w in d.windows)
        hidden, topk = found
        assert hidden["entropy"]["how"].startswith("exact")
        assert hidden["entropy"]["mean"] == pytest.approx(topk["entropy"]["mean"], abs=0.01)
        at = [hidden["mass"]["k"].index(k) for k in topk["mass"]["k"]]
        np.testing.assert_allclose(np.array(hidden["mass"]["mass"])[:, at], topk["mass"]["mass"], atol=2e-3)


def found_hidden(setup: Setup) -> None:
    """The founding of a store of hidden states, without Ray."""
    recipe = setup.recipe()
    sources = Sources(recipe, Console(quiet=True))
    files = open_files(recipe.store.path)
    head = TorchTeacher(sources.teacher_spec()).output_head()
    save_head(files, head)
    create_store(recipe.store.path, sources.identity(calibration=save_calibration(files, steps_of(head))))
