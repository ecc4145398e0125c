"""What a run shows of itself before its first unit; the rest is told by whole runs in tests/e2e."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.account import TeachingAccount
from stillroom.pipeline.cluster import Actors
from stillroom.pipeline.console import Console
from stillroom.pipeline.generate import _plan, _prompts, generation_identity
from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.pool import Pool
from stillroom.pipeline.progress_file import PROGRESS
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.status import GeneratingStatus
from stillroom.pipeline.taught import Batch, Taught
from stillroom.storage.generations.store import create_generations
from tests.e2e.runs import Setup, sentences
from tests.pipeline.corpora import write_jsonl


def test_engines_that_start_are_seen(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{n} jars"} for n in range(6)])
    section = {"prompts": [str(tmp_path / "prompts.jsonl")], "decoding": {"max_tokens": 8}, "unit_tokens": 60}
    recipe = Setup.make(tmp_path / "run", sentences(1, 2), generate=section, ray__actors=3).recipe()
    assert recipe.generate is not None
    sources = Sources(recipe, quiet)
    manifest, _ = _prompts(recipe, recipe.generate, sources, quiet)
    store = create_generations(recipe.generate.path, generation_identity(recipe, recipe.generate, sources))
    plan = _plan(recipe.generate, manifest, store, save=True)
    account, ledger = TeachingAccount(store.files, recipe.name), Ledger(tmp_path / "ledger.jsonl")
    batch = Batch(store, Taught(plan.sequences, plan.held), ledger, "", account)
    pool = Pool(Actors(pytest.fail, recipe.ray), recipe.ray, pytest.fail)  # not started: nobody is ready
    status = GeneratingStatus(recipe, plan, manifest, store, batch, pool, quiet)

    def shown() -> dict[str, Any]:
        return dict(json.loads(store.files.read(PROGRESS)))

    assert not store.files.exists(PROGRESS)
    status.waiting()
    before = shown()
    assert (before["state"], before["actors"]) == ("teaching", {"wanted": 3, "ready": 0, "lost": 0})
    assert before["units"] == {"planned": len(plan.pending), "generated": 0, "quarantined": 0,
                               "pending": len(plan.pending)}  # fmt: skip
    status.begin()  # written at once, and its seconds are those of the work
    assert shown()["began_at"] >= before["began_at"]
    status.close("stopped")
    assert shown()["state"] == "stopped"
