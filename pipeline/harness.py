"""Downstream tasks by EleutherAI's evaluation harness, `lm-eval`, for every exported student and the teacher.

Enters: `evaluate.lm_eval` of a recipe, a model's folder. Leaves: {task: {metric: value}}, kept in
`measured/<name>.lm_eval.json`. Costs: a process of its own, one load of the model, and the tasks; a model measured
before on the same tasks is not measured again.

    python -m stillroom.pipeline.harness < REQUEST.json

Tasks of the harness come with data from the hub; those of `include_path` may have theirs on this machine and then run
offline.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stillroom.pipeline.console import Console
from stillroom.pipeline.recipe.schema import LmEvalConfig, Recipe
from stillroom.storage.errors import StillroomError
from stillroom.storage.files import LocalFiles

#: Of a task's metrics, the one that a table shows: the first that it has.
SHOWN = ("acc_norm", "acc", "exact_match", "f1")
#: Rows of a forward.
BATCH = 8


def require_lm_eval() -> None:
    """Raises StillroomError where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise StillroomError("evaluate.lm_eval needs lm-eval, which is not installed: pip install 'stillroom[lm-eval]'")


def tasks_of(recipe: Recipe, asked: LmEvalConfig, folder: Path, name: str, console: Console) -> dict[str, Any]:
    """Metrics of one model folder by task. Raises StillroomError with the harness's last line if it fails."""
    require_lm_eval()
    held = held_tasks(recipe, asked, folder, name)
    if held is not None:
        return held
    wanted, path = request_of(recipe, asked, folder, name), _path(recipe, name)
    console.info(f"evaluate: {name} on {', '.join(asked.tasks)}")
    found = _run({**wanted, "device": recipe.teacher.device, "trust": recipe.teacher.trust_remote_code}, name)
    LocalFiles(path.parent).write(path.name, json.dumps({"of": wanted, "measured": found}).encode())
    return found


def held_tasks(recipe: Recipe, asked: LmEvalConfig, folder: Path, name: str) -> dict[str, Any] | None:
    """What was measured before of these weights on these tasks; None if nothing was. Measures nothing."""
    path = _path(recipe, name)
    if find_spec("lm_eval") is None or not path.exists():
        return None
    held = json.loads(path.read_text())
    return dict(held["measured"]) if held["of"] == request_of(recipe, asked, folder, name) else None


def _path(recipe: Recipe, name: str) -> Path:
    return recipe.run_dir / "measured" / f"{name}.lm_eval.json"


def request_of(recipe: Recipe, asked: LmEvalConfig, folder: Path, name: str) -> dict[str, Any]:
    """All that the numbers depend on."""
    include = asked.include_path
    files = sorted(p for p in include.rglob("*") if p.is_file()) if include else []
    return {
        "folder": str(folder.absolute()),
        "weights": _stamps(sorted(folder.glob("*.safetensors"))),
        "tasks": list(asked.tasks),
        "include_path": None if include is None else str(include.absolute()),
        "include": _stamps(files),
        "limit": asked.limit,
        "dtype": recipe.teacher.dtype if name == "teacher" else "float32",
        "version": version("lm_eval"),
    }


def shown(models: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(task, metric) of each column of a table."""
    tasks = dict.fromkeys(task for model in models for task in model.get("lm_eval") or {})
    found = []
    for task in tasks:
        metrics = next(m["lm_eval"][task] for m in models if task in (m.get("lm_eval") or {}))
        metric = next((name for name in SHOWN if name in metrics), next(iter(metrics), None))
        if metric is not None:
            found.append((task, metric))
    return found


def metrics_of(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the harness's own results: numbers alone, without standard errors; filters named where there are any.

    >>> metrics_of({"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 1.0}})
    {'t': {'acc': 0.5, 'exact_match (strict)': 1.0}}
    """
    found: dict[str, dict[str, float]] = {}
    for task, values in results.items():
        found[task] = {}
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                found[task][metric if kind == "none" else f"{metric} ({kind})"] = float(value)
    return found


def _stamps(files: list[Path]) -> dict[str, list[int]]:
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _run(request: dict[str, Any], name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"  # the harness prints on stdout
        done = subprocess.run(
            [sys.executable, "-m", "stillroom.pipeline.harness"], input=json.dumps({**request, "answer": str(answer)}),
            capture_output=True, text=True, check=False, errors="replace",
        )  # fmt: skip
        if done.returncode != 0 or not answer.exists():
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise StillroomError(f"evaluate.lm_eval: {name} in {request['folder']} failed: {last[0]}")
        return dict(json.loads(answer.read_text()))


def main() -> None:
    """The process's side."""
    request = json.load(sys.stdin)
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    device = request["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    manager = TaskManager(include_path=request["include_path"])
    if unknown := [task for task in request["tasks"] if task not in manager.all_tasks]:
        sys.exit(f"the harness {request['version']} has no task {', '.join(unknown)}, nor does include_path")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": request["folder"], "dtype": request["dtype"], "trust_remote_code": request["trust"],
        },
        tasks=request["tasks"], limit=request["limit"], device=device, batch_size=BATCH, task_manager=manager,
        bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    Path(request["answer"]).write_text(json.dumps(metrics_of(found["results"])))


if __name__ == "__main__":
    main()
