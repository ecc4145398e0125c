"""`stillroom ls`, `inspect`, `verify` and `gc` of a store of generations, as they are typed; no engine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.pipeline.arguments import UsageMistake, parse
from stillroom.pipeline.cli import main
from stillroom.pipeline.plan import make_plan
from stillroom.storage.generations.store import GenerationStore, open_generations
from stillroom.storage.manifest import Manifest
from tests.pipeline.corpora import ingested, write_jsonl
from tests.storage.damage import flip
from tests.storage.generations.builders import UNITS, both, filled, put, unit_of
from tests.strategies import random_sequences, tiny_store
from tests.tiny import tiny_tokenizer


@pytest.fixture
def store(tmp_path: Path) -> GenerationStore:
    return filled(str(tmp_path / "said"))


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main([*words, "--json", "--quiet"]) == code
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_people_see_tables(store: GenerationStore, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["ls", store.uri], ["vllm 0.1, cpu", "responses"]),
        (["inspect", store.uri], ["response tokens.p95", "truncated share", "0.5", "sampled, n = 2, T = 1, seed 0"]),
        (["inspect", store.uri, "--texts", "2"], ["total logprob", "text (7, 2)", "length"]),
        (["inspect", store.uri, "--unit", unit_of(UNITS[1]).id, "--tokens"], ["logprob", "-0.125"]),
        (["verify", store.uri], ["responses", "6", "none"]),
    ):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert all(part in printed for part in expected), printed
    assert told(capsys, "inspect", store.uri, "--texts", "6")["responses_shown"][0]["finish"] == "eos"


def test_long_texts_are_shortened_for_people(store: GenerationStore, capsys: pytest.CaptureFixture[str]) -> None:
    long = [[1, 55]]
    said = "a line\n" * 200
    store.save_plan([unit_of(long)])
    put(store, long, [replace(r, text=said) for r in both(long)])
    assert main(["inspect", store.uri, "--unit", unit_of(long).id]) == 0
    assert len(capsys.readouterr().out) < 8000
    shown = told(capsys, "inspect", store.uri, "--unit", unit_of(long).id)["responses_shown"]
    assert shown[0]["response"] == said


def test_a_dropped_unit_is_what_generate_makes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the plan that `generate` follows: exactly the dropped unit, so the same requests."""
    write_jsonl(tmp_path / "p.jsonl", [{"text": word} for word in ("mint", "rose", "thyme")])
    manifest: Manifest = ingested(tiny_tokenizer(tmp_path / "tokenizer", vocabulary=300), tmp_path, "p.jsonl")
    prompts = [[row.sequence.input_ids.tolist()] for row in manifest]
    store = filled(str(tmp_path / "said"), prompts)
    assert make_plan(manifest, store, unit_tokens=1, seed=0).pending == ()
    victim = store.committed()[unit_of(prompts[1]).id]
    flip(Path(store.uri, victim.path))
    problem = told(capsys, "verify", store.uri, code=1)["problems"][0]
    assert problem["shard"] == victim.path
    assert store.uri in problem["remedy"]
    assert "STORE" not in problem["remedy"]
    assert main(["verify", store.uri, "--repair"]) == 0
    assert "run `stillroom generate` on the store's recipe" in capsys.readouterr().err
    plan = make_plan(manifest, open_generations(store.uri), unit_tokens=1, seed=0)
    assert [unit.id for unit in plan.pending] == [victim.unit]
    assert put(store, prompts[1]) == victim
    assert told(capsys, "verify", store.uri)["problems"] == []
    assert told(capsys, "gc", store.uri)["removed_files"] == 0


def test_what_is_of_signal_alone_is_refused(store: GenerationStore, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["inspect", store.uri, "--sql"], ["transcode", store.uri, f"{store.uri}-2", "--k", "2"]):
        assert main(words) == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert f"holds generations, a teacher's responses, and no signal: `stillroom inspect {store.uri}`" in err
    assert main(["verify", store.uri, "--rescore", "1"]) == 2
    assert capsys.readouterr().err.startswith("stillroom: error: --rescore asks a teacher for its signal again")


def test_texts_are_of_generations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signal = tiny_store(tmp_path / "store", random_sequences(np.random.default_rng(3), 3))
    assert main(["inspect", signal.uri, "--texts", "2"]) == 2
    assert "--texts is of generations" in capsys.readouterr().err
    with pytest.raises(UsageMistake, match="'0' is no number"):
        parse(["inspect", "s", "--texts", "0"])


def test_a_place_without_a_store_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify", "gc"):
        for place in (tmp_path, tmp_path / "nowhere"):
            found = told(capsys, command, str(place), code=2)
            assert (found["kind"], found["exit_code"]) == ("NoStore", 2)
    assert told(capsys, "ls", str(tmp_path / "nowhere"), code=2)["error"].endswith("is no folder")
