"""`deploy/recipes/seqkd.yaml`, reduced by words on the command line: a tiny teacher, a real vLLM, and the table at its
end. Then a student with another tokenizer, from the same store of what that vLLM wrote."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu import corpus_bleu
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline.corpus.verdicts import read_verdicts
from stillroom.storage.generations.store import open_generations
from stillroom.storage.identity import tokenizer_digest
from stillroom.storage.manifest import Manifest
from tests.e2e.runs import Setup, sentences
from tests.pipeline.test_measure import perplexity_of
from tests.tiny import tiny_teacher
from tests.workers.engines import NEEDED

pytestmark = [pytest.mark.real, NEEDED, pytest.mark.slow, pytest.mark.timeout(900)]

RECIPE = Path(__file__).parents[2] / "deploy" / "recipes" / "seqkd.yaml"
SMALLER = (
    "teacher.threads=1", "generate.limit_prompts=24", "generate.decoding.max_tokens=12",
    "generate.quality.truncated=keep", "generate.quality.max_repetition=0.5", "generate.quality.min_mean_logprob=-5.54",
    "corpus.heldout=0.25", "corpus.limit_tokens=12000", "fidelity.positions=16",
    "fidelity.max_gradient_angle_deg=null", "students.0.model.cut.layers=1", "students.0.steps=6",
    "evaluate.latency_tokens=2", "evaluate.answers.max_tokens=12", "evaluate.answers.prompts=5",
)  # fmt: skip


def run(folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    """What --json prints, and what is shown for people."""
    words = ["run", str(RECIPE), f"run_dir={folder / 'run'}", f"teacher.model={folder / 'teacher'}", *SMALLER, "--json"]
    words += more
    done = subprocess.run(
        [sys.executable, "-m", "stillroom.pipeline", *words], capture_output=True, text=True, check=False,
        env=os.environ | {"STILLROOM_CACHE": str(folder / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed, done.stderr


def shown(table: str, row: str) -> list[str]:
    """The cells behind a row's name in the table that ends the run."""
    (line,) = [line for line in table.splitlines() if line.strip().startswith(row)]
    return line.strip().removeprefix(row).split()


@dataclass(frozen=True)
class Done:
    """The recipe run once: its folder, what --json printed, what people were shown."""

    root: Path
    summary: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    root = tmp_path_factory.mktemp("seqkd")
    tiny_teacher(root / "teacher", head_dim=64)  # vLLM's attention on a CPU knows no heads of 8 channels
    return Done(root, *run(root))


def test_the_recipe_ends_with_its_table(done: Done) -> None:
    summary, printed, folder = done.summary, done.printed, done.root / "run"
    assert json.loads((folder / "summary.json").read_text()) == summary
    table = printed[printed.index("sequence-level distillation") :]

    # Kept and dropped by reason, and the speed.
    found = summary["generations"]
    verdicts, _ = read_verdicts(folder / "verdicts.parquet")
    reasons = Counter(verdicts["reason"].to_pylist())
    store = open_generations(str(folder / "generations"))
    written = [len(r.response_ids) for unit in store.units() for r in unit.responses]
    assert (found["responses"], found["tokens"]) == (len(written), sum(written)) == (48, sum(written))
    assert found["kept"] == reasons.pop("kept") > 0
    assert {d["reason"]: d["responses"] for d in found["dropped"]} == dict(reasons)
    assert shown(table, "kept")[0] == str(found["kept"])
    for reason, count in reasons.items():
        assert shown(table, f"dropped, {reason}")[0] == str(count)
    assert float(shown(table, "generated tokens/s")[0].replace(",", "")) == found["tokens_per_s"] > 0

    # Perplexity by kind of text, before and after.
    (student,), manifest = summary["students"], Manifest.open(folder / "corpus.parquet")
    model = AutoModelForCausalLM.from_pretrained(student["export"], dtype=torch.float32).eval()
    for kind, said in (("teacher_text", "teacher text"), ("ground_truth", "ground truth")):
        expected = perplexity_of(model, manifest, generated=kind == "teacher_text")
        assert student[f"ppl_{kind}_after"] == pytest.approx(expected, rel=1e-4)
        before, _, after, _, _ = shown(table, f"ten-layers: perplexity on {said}")
        assert (before, after) == tuple(f"{student[f'ppl_{kind}_{when}']:,.2f}" for when in ("before", "after"))

    # BLEU and ROUGE-L of the answers, from the file that holds them.
    teacher, measured = summary["models"]
    answers = measured["answers"]
    assert "answers" not in teacher
    lines = [json.loads(line) for line in (folder / answers["file"]).read_text().splitlines()]
    trained = {row.sequence.digest for row in manifest if not row.heldout}
    kept = {r.prompt: r for unit in store.units() for r in unit.responses}
    assert 2 <= len(lines) == answers["prompts"] <= 5
    assert not any(kept[line["prompt"]].sequence.digest in trained for line in lines)
    references = [[line["teacher"][min(n, len(line["teacher"]) - 1)] for line in lines] for n in range(2)]
    bleu = corpus_bleu([line["student"] for line in lines], references)  # one that is there twice counts once
    assert answers["bleu"] == pytest.approx(bleu.score)
    assert answers["rouge_l"] == pytest.approx(sum(line["rouge_l"] for line in lines) / len(lines))
    assert shown(table, "ten-layers: BLEU of its answers")[0] == f"{answers['bleu']:.1f}"
    assert shown(table, "ten-layers: ROUGE-L of its answers")[0] == f"{answers['rouge_l']:.3f}"

    # Again: nothing runs, and the table is the same.
    again, printed = run(done.root)
    assert again == summary
    assert printed[printed.index("sequence-level distillation") :] == table
    assert "is trained already" in printed
    assert "measuring" not in printed
    assert printed.count("no teacher is needed") >= 1

    # What a changed field of `evaluate.answers` touches.
    for change in ("evaluate.answers.max_tokens=9", "evaluate.answers.prompts=2"):
        parts, _ = run(done.root, "--dry-run", change)
        assert {part["part"]: part["state"] for part in parts["parts"]} == {
            "generate": "done", "corpus": "done", "teach": "done", "train": "done", "evaluate": "runs",
        }  # fmt: skip


def test_a_student_with_another_tokenizer_trains_on_the_text(done: Done, tmp_path: Path) -> None:
    """As the guide does it: the student's own model lends the corpus its tokenizer, and nothing is scored."""
    setup = Setup.make(
        tmp_path, sentences(1, 2), teacher={"vocabulary": 300, "max_position_embeddings": 1024},
        corpus__sources=[f"generations:{done.root / 'run' / 'verdicts.parquet'}"], corpus__window=1024,
        corpus__heldout=0.25, students__0__losses={"alpha": 0.0},
        students__0__model={"from": str(tmp_path / "teacher")},
    )  # fmt: skip
    printed = setup.run("train")
    verdicts, _ = read_verdicts(done.root / "run" / "verdicts.parquet")
    kept = {(v["prompt"], v["sample"]) for v in verdicts.to_pylist() if v["kept"]}
    assert f"{len(kept)} generations were written with another tokenizer" in printed
    assert not (tmp_path / "store").exists()

    # What is learned is the text of the kept responses, in the student's own ids, and how the template ends an answer.
    store = open_generations(str(done.root / "run" / "generations"))
    found = [r for unit in store.units() for r in unit.responses if (r.prompt, r.sample) in kept]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    manifest = Manifest.open(tmp_path / "run" / "corpus.parquet")
    learned = [tokenizer.decode(row.sequence.input_ids[row.mask]) for row in manifest]
    assert Counter(learned) == Counter(f"{r.text}<|end|>\n" for r in found)

    # The student is one of that tokenizer, exported with it, and says the held-out responses better than before.
    result = json.loads((tmp_path / "run" / "students" / "cut" / "result.json").read_text())
    assert result["after"]["perplexity"] < result["before"]["perplexity"]
    held = AutoTokenizer.from_pretrained(result["export"])
    digest = tokenizer_digest(held.backend_tokenizer.to_str())
    assert digest == manifest.meta.tokenizer != store.identity.tokenizer
