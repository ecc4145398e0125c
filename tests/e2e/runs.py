"""Whole recipes for tests: a tiny teacher, a corpus of random sentences, and the command line that runs them.

`Setup` writes a folder with everything in it; `start` runs `stillroom` in a process group of its own, as a terminal
would, so that tests can interrupt it or kill parts of it. `distil` is the same path in this process, without Ray.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from stillroom.pipeline.console import Console
from stillroom.pipeline.founding import found_store
from stillroom.pipeline.plan import Plan, make_plan
from stillroom.pipeline.precompute import _payloads, _truth_wanted
from stillroom.pipeline.recipe import load_recipe
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.pipeline.sources import Sources
from stillroom.pipeline.student.session import run as train_here
from stillroom.pipeline.train import job_of
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import Store, open_store
from stillroom.workers.actor import TeacherActor
from tests.tiny import WORDS, tiny_teacher

#: After which something hangs. A run for three students is 14 processes that import torch: 62 s on a good day of two
#: cores, 120 s with a cold disk cache.
PATIENCE_S = 300.0


def sentences(seed: int, documents: int, words: int = 40) -> list[str]:
    """Documents of random words; the same seed gives the same, and a longer list begins with a shorter one."""
    draw = random.Random(seed)
    vocabulary = WORDS.split()
    return [" ".join(draw.choices(vocabulary, k=draw.randint(words // 2, words))) for _ in range(documents)]


def write_corpus(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Setup:
    """A folder with teacher, corpus and recipe."""

    folder: Path

    @staticmethod
    def make(folder: Path, documents: list[str], *, teacher: dict[str, Any] | None = None, **over: Any) -> "Setup":
        """over: dotted recipe keys with __ for the dot, such as signal__topk__k=4."""
        folder.mkdir(parents=True, exist_ok=True)
        tiny_teacher(folder / "teacher", **(teacher or {}))
        write_corpus(folder / "corpus.jsonl", documents)
        recipe: dict[str, Any] = {
            "name": "test",
            "run_dir": str(folder / "run"),
            "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "device": "cpu", "batch_tokens": 256},
            "corpus": {"sources": [str(folder / "corpus.jsonl")], "window": 32, "overlap": 4, "heldout": 0.1},
            "signal": {"topk": {"k": 8}},
            # Random teachers are flat: the top 8 hold a hundredth of the mass. What is refused is tested by itself.
            "fidelity": {"positions": 16, "max_gradient_angle_deg": None},
            "store": {"path": str(folder / "store"), "unit_tokens": 256},
            "ray": {"actors": 2},
            "students": [
                {
                    "name": "cut",
                    "model": {"cut": {"layers": 1}},
                    "steps": 12,
                    "batch_packs": 2,
                    "lr": 1e-3,
                    "warmup_steps": 2,
                    "checkpoint_every": 4,
                    "device": "cpu",
                }
            ],
            "evaluate": {"teacher": False, "latency_tokens": 2},
        }
        for key, value in over.items():
            *path, last = key.split("__")
            section = recipe
            for name in path:
                section = section[name] if isinstance(section, dict) else section[int(name)]
            section[last] = value
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return Setup(folder)

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.folder / "recipe.yaml", list(overrides))

    def start(self, command: str = "run", *overrides: str) -> "subprocess.Popen[str]":
        """`stillroom COMMAND recipe.yaml` in a process group of its own."""
        words = [sys.executable, "-m", "stillroom.pipeline", command, str(self.folder / "recipe.yaml"), *overrides]
        return subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"STILLROOM_CACHE": str(self.folder / "cache")},
        )

    def run(self, command: str = "run", *overrides: str, code: int = 0) -> str:
        """Run to the end; returns what was printed, after checking the exit code."""
        process = self.start(command, *overrides)
        try:
            printed, _ = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            kill_group(process)  # else the next tests fail for what is left of it
            raise
        assert process.returncode == code, printed
        return printed

    def losses(self, student: str = "cut") -> list[tuple[int, float, list[int], list[str]]]:
        """(step, loss, packs, first sequences) of every step in the student's log."""
        lines = (self.folder / "run" / "students" / student / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [(r["step"], r["loss"], r["packs"], r["sequences"]) for r in records if "loss" in r]

    def ledger(self) -> list[dict[str, Any]]:
        path = self.folder / "run" / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rows(store: Store) -> dict[str, dict[str, Any]]:
    """Every committed sequence's arrays, by digest."""
    found = {}
    for stored in store.sequences():
        assert stored.signal is not None
        topk, sampled, hidden = stored.signal.topk, stored.signal.sampled, stored.signal.hidden
        arrays: dict[str, Any] = {"input_ids": stored.sequence.input_ids}
        if topk is not None:
            arrays |= {"ids": topk.ids, "logits": topk.logits, "tail_lse": topk.tail_lse, "kept": topk.kept}
        if sampled is not None:
            arrays |= {"drawn_ids": sampled.ids, "drawn_counts": sampled.counts}
        if hidden is not None:
            arrays |= {"hidden": hidden}
        found[stored.sequence.digest] = arrays
    return found


def assert_equal_rows(one: str | Path, other: str | Path) -> None:
    """Bit-equal rows, and the same sequences."""
    a, b = rows(open_store(str(one))), rows(open_store(str(other)))
    assert a.keys() == b.keys()
    for digest in a:
        assert a[digest].keys() == b[digest].keys()
        for name in a[digest]:
            np.testing.assert_array_equal(a[digest][name], b[digest][name], err_msg=f"{digest} {name}")


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", what: str) -> None:
    """Poll until the condition holds; fails if the process ends before, or after two minutes."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the process ended before {what}: {process.communicate()[0]}")
        assert time.monotonic() < end, f"{what} did not come about in {PATIENCE_S:g} s"
        time.sleep(0.005)


def children(process: "subprocess.Popen[str]", word: str) -> list[psutil.Process]:
    """Processes below this one whose title or command holds `word`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if word in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def kill_group(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def distil(setup: Setup, *overrides: str) -> tuple[Recipe, Sources, Plan]:
    """corpus → plan → teach in this process: the actor's own class without Ray, but for the founding of a hidden part.
    Returns what was planned."""
    recipe = setup.recipe(*overrides)
    return recipe, *taught(recipe)


def taught(recipe: Recipe) -> tuple[Sources, Plan]:
    """The same of a recipe."""
    sources = Sources(recipe, Console(quiet=True))
    manifest = sources.manifest()
    store = found_store(recipe, sources, manifest, Console(quiet=True))
    plan = make_plan(manifest, store, unit_tokens=recipe.store.unit_tokens, seed=0)
    if plan.pending:
        actor = TeacherActor(sources.teacher_spec(), store.identity, store.uri)
        work = _payloads(plan, manifest, _truth_wanted(recipe, plan, store))
        receipts = [actor.score_unit(*payload) for payload in work]
        assert len(store.commit(receipts)) == len(plan.pending)
        actor.release()
    return sources, plan


def trained(recipe: Recipe) -> None:
    """A recipe's store filled and its students trained, in this process: no Ray, and nothing evaluated."""
    taught(recipe)
    for student in recipe.students:
        job = job_of(recipe, student)
        train_here(job, Manifest.open(job.manifest), Snapshot.read(job.snapshot) if job.snapshot else None)
