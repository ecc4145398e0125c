"""A run's folder for the report: a real tiny corpus, teacher and store, students with weights and made-up logs."""

import json
from pathlib import Path
from typing import Any

import yaml

from stillroom.pipeline.corpus.verdicts import KEPT, Verdict, write_verdicts
from stillroom.pipeline.recipe.schema import VERDICTS
from stillroom.pipeline.run_status import RESOLVED
from stillroom.pipeline.token_text import keep_token_table
from stillroom.storage.store import open_store
from tests.e2e.runs import Setup, distil, sentences
from tests.tiny import tiny_model

#: What a corpus may hold, and a page must not run.
HOSTILE = "</script><script>window.hostile=1</script><img src=x onerror=window.hostile=1> &amp; 'quoted' \"twice\""

STEPS = 40


def make_run(folder: Path, students: tuple[str, ...] = ("ten", "six"), **over: Any) -> Path:
    """The run's folder; every document begins with hostile text. over: as `Setup.make`."""
    documents = [f"{HOSTILE} {text}" for text in sentences(1, 30)]
    setup = Setup.make(folder, documents, **({"corpus__heldout": 0.2} | over))
    recipe, sources, _ = distil(setup)
    run = recipe.run_dir
    store = open_store(recipe.store.path)
    keep_token_table(store.files, sources.tokenizer, store.identity.vocabulary)
    resolved = recipe.model_dump(mode="json", by_alias=True)
    first = resolved["students"][0]
    resolved["students"] = [first | {"name": name} for name in students]
    (run / RESOLVED).write_text(yaml.safe_dump(resolved))
    for number, name in enumerate(students):
        add_student(run / "students" / name, number)
    batches = {"teacher_batches": 4, "units_scored": 2, "tokens_scored": 800, "bytes_written": 90_000, "wall_s": 2.5}
    (run / "ledger.jsonl").write_text(json.dumps({"on_behalf_of": next(iter(students), ""), **batches}) + "\n")
    models = [_model(name, number) for number, name in enumerate(("teacher", *students))]
    (run / "evaluation.json").write_text(json.dumps({"models": models}))
    (run / "summary.json").write_text(json.dumps({"store": store.uri, "models": models}))
    return run


def add_student(folder: Path, number: int, *, steps: int = STEPS) -> None:
    """Log, result and export of a student that was trained."""
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(number, steps)))
    tiny_model(folder / "export", layers=1, seed=number + 1)
    result = {"name": folder.name, "parameters": 20_000, "steps": steps, "seconds": 12.5 + number}
    (folder / "result.json").write_text(json.dumps(result))


def records(number: int, steps: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [_evaluation(0, 3.0 + number)]
    for step in range(1, steps + 1):
        values = {
            "loss": 4.0 / step + number,
            "kd": 3.0 / step,
            "ce": 5.0,
            "lr": 1e-3,
            "temperature": 2.0,
            "alpha": 0.7,
        }
        found.append({"kind": "step", "step": step, **values, "skipped": False, "features": {}})
    return [*found, _evaluation(steps, 1.0 + number)]


def _evaluation(step: int, kl: float) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "kl": kl, "top1": 1 / (1 + kl), "perplexity": 10 * kl}


def add_generation(folder: Path) -> None:
    """A run's generating stage, and what students made of its responses, with made-up numbers."""
    path = folder / RESOLVED
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"generate": {"path": "generations"}}))
    reasons = (KEPT, "duplicate", "truncated", KEPT)
    verdicts = [Verdict("p", n, f"s{n}", "u", n + 1, -1.0, 0.0, None, None, reason) for n, reason in enumerate(reasons)]
    write_verdicts(folder / VERDICTS, verdicts, {})
    lines = [{"units_scored": units, "rows": 50, "bytes_written": 1000 * units, "wall_s": 2.0} for units in (1, 2)]
    (folder / "ledger.generate.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for number, model in enumerate(evaluation["models"]):
        model |= {"perplexity_teacher_text": 8.0 + number, "perplexity_ground_truth": 13.0 + number}
        if number:
            model["answers"] = {"prompts": 5, "ended": 0.8, "bleu": 20.5 + number, "rouge_l": 0.4333}
            path = folder / "students" / model["name"] / "result.json"
            before = {"perplexity_teacher_text": 30.0, "perplexity_ground_truth": 40.0}
            path.write_text(json.dumps(json.loads(path.read_text()) | {"before": before}))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))


def _model(name: str, number: int) -> dict[str, Any]:
    return {
        "name": name, "parameters": 20_000, "weight_bytes": 80_000, "perplexity": 20.0 + number, "ece": 0.02,
        "heldout_positions": 100, "latency_ms_per_token": 1.5, "peak_memory_bytes": 10**9,
        **({"kl": 1.0 * number, "top1": 0.5} if number else {}),
    }  # fmt: skip
