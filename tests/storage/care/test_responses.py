"""verify, repair and gc of a store of generations: what is broken is named, dropped, and made again."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.storage.care.gc import collect_garbage
from stillroom.storage.care.repair import repair_store
from stillroom.storage.care.verify import verify_store
from stillroom.storage.catalog.uses import TAUGHT, TaughtRun, record_taught
from stillroom.storage.errors import NoStore
from stillroom.storage.files import GENERATIONS_MARK as MARK
from stillroom.storage.generations import shard as shard_module
from stillroom.storage.generations.records import Generation
from stillroom.storage.generations.shard import write_generations
from stillroom.storage.generations.store import GenerationStore, open_generations
from stillroom.storage.log import CommitLog
from stillroom.storage.records import Receipt, ShardRef
from tests.storage.damage import edit_entry, flip
from tests.storage.generations.builders import ENGINE, UNITS, both, filled, put, response, unit_of

LATER_S = time.time() + 7200.0


@pytest.fixture
def store(tmp_path: Path) -> GenerationStore:
    return filled(str(tmp_path / "store"))


def ref_of(store: GenerationStore, number: int) -> ShardRef:
    return store.committed()[unit_of(UNITS[number]).id]


def faulty(store: GenerationStore, responses: list[Generation], monkeypatch: pytest.MonkeyPatch) -> ShardRef:
    """In the place of unit 0 what a faulty engine or writer would have written."""
    monkeypatch.setattr(shard_module, "_require_complete", lambda *_: None)
    unit, old = unit_of(UNITS[0]), ref_of(store, 0)
    fresh = write_generations(store.files, store.identity, unit, responses, ENGINE)
    CommitLog.open(store.uri).remove([old])
    store.commit([Receipt(fresh, len(UNITS[0]), sum(unit.tokens), 0, 1, 1.0)])
    return fresh


class TestVerify:
    def test_a_whole_store_has_no_problem(self, store: GenerationStore) -> None:
        seen: list[tuple[int, int]] = []
        found = verify_store(store.uri, lambda done, total: seen.append((done, total)))
        assert found == {
            "store": store.uri, "kind": "generations", "shards": 2, "units_planned_not_committed": 0, "prompts": 3,
            "responses": 6, "tokens": 15, "uncommitted_files": 0, "problems": [],
        }  # fmt: skip
        assert seen == [(1, 2), (2, 2)]

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda r: replace(r, logprobs=r.logprobs * np.float32(np.nan)), "logprobs are not finite"),
            (lambda r: replace(r, logprobs=r.logprobs + np.float32(1)), r"a logprob of 0\.875 is above 0"),
            (lambda r: replace(r, response_ids=r.response_ids + np.int32(312)), r"its response lies outside 0 … 319"),
            (lambda r: replace(r, response_ids=-r.response_ids), r"its response lies outside 0 … 319"),
            (lambda r: response(r.prompt_ids.tolist(), r.sample, (7,) * 9), "9 tokens, at most 8 were asked for"),
            (lambda r: replace(r, sample=0), "has sample 0 twice"),
            (lambda r: replace(r, sample=r.sample + 1), "it has 4 responses, expected 2 of each prompt"),
            (lambda r: replace(r, finish="bored"), "row 0 is no response: finish 'bored'"),
            (lambda r: replace(r, prompt_ids=r.prompt_ids + np.int32(1)), "its prompts are not those of its unit"),
        ],
    )
    def test_what_no_teacher_can_have_said_is_named(
        self,
        store: GenerationStore,
        monkeypatch: pytest.MonkeyPatch,
        change: Callable[[Generation], Generation],
        what: str,
    ) -> None:
        bad = faulty(store, [change(r) for r in both(UNITS[0])], monkeypatch)
        (problem,) = verify_store(store.uri)["problems"]
        assert problem["shard"] == bad.path
        assert re.search(what, problem["problem"]), problem
        assert f"`stillroom verify {store.uri} --repair` and `stillroom generate`" in problem["remedy"]
        assert repair_store(store.uri)["repair"]["units_dropped"] == [bad.unit]
        assert verify_store(store.uri)["problems"] == []

    def test_a_missing_response_is_told(self, store: GenerationStore, monkeypatch: pytest.MonkeyPatch) -> None:
        faulty(store, both(UNITS[0])[:-1], monkeypatch)
        assert "it has 3 responses" in verify_store(store.uri)["problems"][0]["problem"]

    def test_a_prompt_that_two_units_answer_counts_twice(self, store: GenerationStore) -> None:
        """Two recipes that planned the same prompt at the same time."""
        twice = [UNITS[0][0], [1, 8]]
        store.save_plan([unit_of(twice)])
        ref = put(store, twice)
        assert ref is not None
        (problem,) = verify_store(store.uri)["problems"]
        assert "1 of its prompts have responses in unit" in problem["problem"]
        assert repair_store(store.uri)["problems_left"] == 0
        found = verify_store(store.uri)
        assert found["problems"] == []
        assert found["responses"] in (4, 6)  # of the two the one with the larger id went

    def test_a_certain_token_may_be_rounded_above_0(
        self, store: GenerationStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        faulty(store, [replace(r, logprobs=r.logprobs * np.float32(-1e-6)) for r in both(UNITS[0])], monkeypatch)
        assert verify_store(store.uri)["problems"] == []


def damages() -> dict[str, Callable[[GenerationStore], Any]]:
    def rename_plan(store: GenerationStore) -> None:
        (plan,) = Path(store.uri, "_stillroom/plans").iterdir()
        plan.write_bytes(b"no plan")

    def wrong_size(store: GenerationStore) -> None:
        edit_entry(store, 2, lambda text: text.replace('"size":', '"size":1'))

    return {
        "flipped": lambda store: flip(Path(store.uri, ref_of(store, 0).path)),
        "lost": lambda store: Path(store.uri, ref_of(store, 0).path).unlink(),
        "a plan": rename_plan,
        "the log's numbers": wrong_size,
    }


class TestRepair:
    @pytest.mark.parametrize("damage", ["flipped", "lost"])
    def test_what_is_broken_is_dropped_and_made_again(self, store: GenerationStore, damage: str) -> None:
        victim, other = ref_of(store, 0), ref_of(store, 1)
        damages()[damage](store)
        (problem,) = verify_store(store.uri)["problems"]
        assert problem["shard"] == victim.path
        done = repair_store(store.uri)
        assert done["problems_left"] == 0
        assert done["repair"]["units_dropped"] == [victim.unit]
        assert done["repair"]["prompts_to_answer"] == 2
        assert done["repair"]["responses_to_generate"] == 4
        assert store.committed() == {other.unit: other}
        assert verify_store(store.uri)["units_planned_not_committed"] == 1
        assert put(store, UNITS[0]) == victim  # the same requests give the same bytes, in the place of the damaged ones
        assert verify_store(store.uri)["problems"] == []

    @pytest.mark.parametrize("damage", ["a plan", "the log's numbers"])
    def test_what_is_whole_is_kept(self, store: GenerationStore, damage: str) -> None:
        planned, before = store.planned(), store.committed()
        damages()[damage](store)
        assert verify_store(store.uri)["problems"]
        done = repair_store(store.uri)
        assert (done["problems_left"], done["repair"]["units_dropped"]) == (0, [])
        assert verify_store(store.uri)["problems"] == []
        assert store.committed() == before
        assert {u.id for u in store.planned()} == {u.id for u in planned}

    def test_a_damaged_identity_is_named_with_its_remedy(self, store: GenerationStore) -> None:
        path = Path(store.uri, MARK)
        stated = json.loads(path.read_text())
        path.write_text(json.dumps(stated | {"dtype": "bfloat16"}))
        (problem,) = verify_store(store.uri)["problems"]
        assert problem["file"] == MARK
        assert "`stillroom generate` on the recipe writes it anew" in problem["remedy"]

    def test_a_damaged_account_is_named(self, store: GenerationStore) -> None:
        run = TaughtRun("r", "2026-01-01T00:00:00+00:00", 1, 3, 15, 2.0, 3.0, 1, "cpu")
        record_taught(store.files, f"{1:032x}", run)
        assert verify_store(store.uri)["problems"] == []
        (path,) = Path(store.uri, TAUGHT).iterdir()
        flip(path)
        (problem,) = verify_store(store.uri)["problems"]
        assert path.name in str(problem)

    def test_a_damaged_entry_of_the_log_is_named(self, store: GenerationStore) -> None:
        name = edit_entry(store, 1, lambda text: text.replace('{"add"', '{"aed"', 1))
        found = verify_store(store.uri)["problems"]
        assert [p.get("file") for p in found] == [name]
        assert "`stillroom generate` makes again" in found[0]["remedy"]


class TestCollect:
    def test_leftovers_go_when_they_are_old_and_nothing_else(self, store: GenerationStore) -> None:
        flip(Path(store.uri, ref_of(store, 0).path))
        dropped = ref_of(store, 0)
        repair_store(store.uri)
        (Path(store.uri) / "shards" / f".x.parquet.{'0' * 32}.tmp").write_bytes(b"half")
        young = collect_garbage(store.uri)
        assert (young["removed_files"], young["spared_young_files"]) == (0, 2)
        tried = collect_garbage(store.uri, now_s=LATER_S, dry_run=True)
        assert store.files.exists(dropped.path)
        found = collect_garbage(store.uri, now_s=LATER_S)
        assert found["removed"] == tried["removed"]
        assert {line["why"] for line in found["removed"]} == {
            "shard that the log does not name", "temporary file of a writer that was stopped",
        }  # fmt: skip
        assert (found["foreign"], found["pinned_by"]) == ([], [])
        assert not store.files.exists(dropped.path)
        assert [u.unit for u in open_generations(store.uri).units()] == [ref_of(store, 1).unit]

    def test_what_a_writer_is_about_to_commit_is_spared(self, store: GenerationStore) -> None:
        prompts = [[1, 99]]
        unit = unit_of(prompts)
        ref = write_generations(store.files, store.identity, unit, both(prompts), ENGINE)
        assert collect_garbage(store.uri)["removed_files"] == 0
        store.save_plan([unit])
        assert len(store.commit([Receipt(ref, 1, 2, 5, 2, 1.0)])) == 1
        assert collect_garbage(store.uri, now_s=LATER_S)["removed_files"] == 0
        assert verify_store(store.uri)["problems"] == []


def test_no_store_is_a_mistake_of_usage(tmp_path: Path) -> None:
    for ask in (verify_store, repair_store, collect_garbage):
        with pytest.raises(NoStore, match="is no store"):
            ask(str(tmp_path))
    assert NoStore.exit_code == 2
