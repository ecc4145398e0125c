"""What a job file accepts, refuses and remarks."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stillroom.pipeline.student.config import StudentConfig, StudentJob, advice
from stillroom.storage.errors import RecipeError


def config(**fields: Any) -> StudentConfig:
    return StudentConfig.model_validate({"name": "s", "model": {"cut": {"layers": 2}}} | fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"losses": {"temperature": 0.5}}, "1 … 10, got"),
        ({"losses": {"temperature": 11}}, "1 … 10, got"),
        ({"losses": {"alpha": 1.5}}, "must lie in 0 … 1, got 1.5"),
        ({"steps": 5, "epochs": 1}, "not both"),
        ({"batch_packs": 6, "micro_packs": 4}, "multiple of micro_packs"),
        ({"model": {}}, "give one of `from`"),
        ({"model": {"from": "x", "cut": {"layers": 1}}}, "give one of `from`"),
        ({"model": {"cut": {"layers": [2, 1]}}}, "must rise"),
        ({"model": {"cut": {"layers": []}}}, "at least 1"),
        ({"learning_rate": 1.0}, "Extra inputs"),
        ({"name": "../up"}, "pattern"),
        ({"device": "tpu"}, "pattern"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        config(**fields)


def test_a_job_file_reads_back(tmp_path: Path) -> None:
    job = StudentJob(
        student=config(model={"from": "some/model"}, lr="3e-5"),
        manifest=Path("m"), snapshot=Path("s"), run_dir=Path("r"), tokenizer=Path("t"),
    )  # fmt: skip
    (tmp_path / "job.json").write_text(job.model_dump_json())
    assert StudentJob.read(tmp_path / "job.json") == job
    assert '"from":"some/model"' in (tmp_path / "job.json").read_text()


def test_a_bad_job_file_is_one_line_that_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    with pytest.raises(RecipeError, match=r"job\.json cannot be read"):
        StudentJob.read(path)
    path.write_text('{"student": {"name": "s", "model": {"cut": {"layers": 2}}, "lr": -1}}')
    with pytest.raises(RecipeError, match=r"student\.lr") as caught:
        StudentJob.read(path)
    assert "\n" not in str(caught.value)


def test_no_teacher_signal_means_no_distillation_term() -> None:
    paths = {"manifest": "m", "run_dir": "r", "tokenizer": "t", "teacher": "f"}
    with pytest.raises(ValidationError, match=r"set student\.losses\.alpha to 0"):
        StudentJob.model_validate({"student": config(), **paths})
    StudentJob.model_validate({"student": config(losses={"alpha": 0}), **paths})


def test_advice_speaks_up_outside_the_advised_ranges_only() -> None:
    assert advice(config()) == []
    notices = " | ".join(advice(config(lr=1e-3, losses={"alpha": 0.3, "temperature": 4}, steps=30)))
    assert "lr is 0.001" in notices
    assert "alpha is 0.3" in notices
    assert "61° at 4" in notices
    assert "warmup_steps is 20" in notices
    assert "advised range" in advice(config(losses={"temperature": 1}), "hidden")[0]
    assert advice(config(losses={"temperature": 1}), "topk") == [], "there top-k ids are at their best"
    assert advice(config(losses={"temperature": 4}), "hidden") == []
    assert advice(config(losses={"alpha": 0, "temperature": 8})) == []


def test_the_digest_is_of_what_changes_numbers() -> None:
    assert config().digest == config(log_every=3, name="other", keep_last=9).digest
    assert config().digest != config(seed=1).digest
    assert config().digest != config(losses={"alpha": 0.6}).digest


def test_reading_a_job_imports_no_torch() -> None:
    code = (
        "import sys, stillroom.pipeline.student.__main__; "
        "sys.exit(sorted({'torch', 'transformers', 'ray', 'deltalake'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]", done.stderr
