"""Downstream tasks by EleutherAI's evaluation harness, `lm-eval`, for every exported student and the teacher.

Enters: `evaluate.lm_eval` of a recipe, a model's folder. Leaves: {task: {metric: value}}, kept in
`measured/<name>.lm_eval.json`. Costs: a process of its own, one load of the model, and the tasks; a model measured
before on the same tasks is not measured again.

    python -m stillroom.pipeline.harness < REQUEST.json

Tasks of the harness come with data from the hub; those of `include_path` may have theirs on this machine and then run
offline.
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stillroom.pipeline.console import Console
from stillroom.pipeline.measured import held, keep, run_module, stamps, weights_of
from stillroom.pipeline.recipe.schema import LmEvalConfig, Recipe
from stillroom.storage.errors import StillroomError

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
    found = held_tasks(recipe, asked, folder, name)
    if found is None:
        wanted = request_of(recipe, asked, folder, name)
        console.info(f"evaluate: {name} on {', '.join(asked.tasks)}")
        began = time.monotonic()
        found = _run({**wanted, "device": recipe.teacher.device, "trust": recipe.teacher.trust_remote_code}, name)
        keep(recipe.run_dir, _kept_as(name), wanted, found, wall_s=time.monotonic() - began)
    return found


def held_tasks(recipe: Recipe, asked: LmEvalConfig, folder: Path, name: str) -> dict[str, Any] | None:
    """What was measured before of these weights on these tasks; None if nothing was. Measures nothing."""
    if find_spec("lm_eval") is None:
        return None
    return held(recipe.run_dir, _kept_as(name), request_of(recipe, asked, folder, name))


def _kept_as(name: str) -> str:
    return f"{name}.lm_eval"


def request_of(recipe: Recipe, asked: LmEvalConfig, folder: Path, name: str) -> dict[str, Any]:
    """All that the numbers depend on."""
    include = asked.include_path
    files = sorted(p for p in include.rglob("*") if p.is_file()) if include else []
    return {
        "folder": str(folder.absolute()),
        "weights": weights_of(folder),
        "tasks": list(asked.tasks),
        "include_path": None if include is None else str(include.absolute()),
        "include": {str(path): stamps([path]) for path in files},
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


def _run(request: dict[str, Any], name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"  # the harness prints on stdout
        what = f"evaluate.lm_eval: {name} in {request['folder']}"
        run_module("stillroom.pipeline.harness", {**request, "answer": str(answer)}, what)
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
