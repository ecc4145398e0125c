"""What a run tells: `log.jsonl` (every step), TensorBoard, and a progress bar or plain lines on stderr.

Enters: records of steps and evaluations. Leaves: lines. Costs: some 300 bytes a step.

TensorBoard: `train/…` of every `log_every`-th step (losses, gradient norm, tokens/s, share of the step spent waiting
for data), `heldout/…` of every evaluation, `notices` as text.

`log.jsonl` holds exactly the steps of the run: on resume it is cut back to the checkpoint, so no step is there twice.
Records: {"kind": "step", "step": n (from 1), …} and {"kind": "evaluation", "step": n, …}.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from stillroom.pipeline.student.bindings import LOG
from stillroom.pipeline.student.distributed import PackName
from stillroom.pipeline.student.trainer import StepResult
from stillroom.pipeline.student.watch import Watch

#: What of a step's record goes to TensorBoard.
SCALARS = ("loss", "kd", "ce", "lr", "temperature", "alpha", "grad_norm", "scale", "tokens_per_s", "data_wait")


class RunLog:
    """Opened with the number of steps already done and checkpointed; later ones are dropped from the log, and those
    before are seen again by the watch, which says nothing twice."""

    def __init__(
        self, run_dir: Path, *, name: str, done: int, total: int, log_every: int, watch: Watch | None = None
    ) -> None:
        self._name, self._total, self._log_every = name, total, log_every
        cut_back(run_dir / LOG, done=done, total=total)
        self._watch = watch
        if watch is not None and (run_dir / LOG).exists():
            for line in (run_dir / LOG).read_text().splitlines():
                watch.see(json.loads(line))
        self._file = (run_dir / LOG).open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1)
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"), console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task(name, total=total, completed=done, loss="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        self._board.close()
        self._file.close()

    def say(self, line: str) -> None:
        """One line for people."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def step(self, record: dict[str, Any]) -> None:
        """A step's record; on disk before this returns."""
        step = record["step"]
        self._write({"kind": "step", **record})
        self._see({"kind": "step", **record})
        loss = "skipped" if record["skipped"] else f"loss {record['loss']:.4f}"
        if self._bar:
            self._bar.update(self._task, completed=step, loss=f"{loss}  {record['tokens_per_s']:,.0f} tokens/s")
        if step % self._log_every and step != self._total and step != 1:
            return
        for key in SCALARS:
            if record.get(key) is not None:
                self._board.add_scalar(f"train/{key}", record[key], step)
        for key, value in record["features"].items():
            self._board.add_scalar(f"train/features/{key}", value, step)
        for name in ("weights", "output_weights"):
            for key, value in record.get(name, {}).items():
                self._board.add_scalar(f"train/{name}/{key}", value, step)
        for key, value in record.get("mix", {}).get("shares", {}).items():
            self._board.add_scalar(f"train/mix/{key}", value, step)
        if not self._bar:
            self.say(
                f"{self._name}: step {step}/{self._total}  {loss}  lr {record['lr']:.2e}  "
                f"{record['tokens_per_s']:,.0f} tokens/s  waiting for data {record['data_wait']:.0%}"
            )

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Metrics on the held-out split after `step` steps."""
        self._write({"kind": "evaluation", "step": step, **metrics})
        for key, value in metrics.items():
            if value is not None:
                self._board.add_scalar(f"heldout/{key}", value, step)
        shown = "  ".join(f"{k} {v:,.4g}" for k, v in metrics.items() if v is not None)
        self.say(f"{self._name}: held-out after {step} steps: {shown}")
        self._see({"kind": "evaluation", "step": step, **metrics})

    def decision(self, decision: dict[str, Any]) -> None:
        """Why training ends before its last step."""
        self._write({"kind": "decision", **decision})
        self._board.add_text("advance", json.dumps(decision), decision["step"])

    def _see(self, record: dict[str, Any]) -> None:
        for notice in self._watch.see(record) if self._watch else []:
            self._board.add_text("notices", notice, record["step"])
            self.say(f"notice: {self._name}: {notice}")

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


class Silence(RunLog):
    """Of a process that is not the first of several."""

    def __init__(self, run_dir: Path, **_: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def step(self, record: dict[str, Any]) -> None:
        pass

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def decision(self, decision: dict[str, Any]) -> None:
        pass


def step_record(step: int, packs: list[PackName], result: StepResult, *, took: float, waited: float) -> dict[str, Any]:
    """A line of `log.jsonl`: all of it but the two last is the same when the run is repeated."""
    return {
        "step": step,
        "loss": result.loss,
        "kd": result.kd,
        "ce": result.ce,
        "features": result.features,
        "lr": result.values.lr,
        "temperature": result.values.temperature,
        "alpha": result.values.alpha,
        "weights": result.values.weights,
        "output_weights": result.values.output,
        "phase": result.phase,
        "grad_norm": result.grad_norm,
        **({} if result.scale is None else {"scale": result.scale, "overflowed": result.overflowed}),
        "skipped": result.skipped,
        "tokens": result.tokens,
        "trained": result.trained,
        "epoch": packs[0].epoch,
        "packs": [pack.index for pack in packs],
        "sequences": [pack.sequence for pack in packs],
        "tokens_per_s": round(result.tokens / took, 1),
        "data_wait": round(waited / took, 4),
    }


def steps_of(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's steps."""
    with (run_dir / LOG).open() as file:
        yield from (record for record in map(json.loads, file) if record["kind"] == "step")


def cut_back(path: Path, *, done: int, total: int) -> None:
    """Keep the records up to step `done`; a line torn by a kill is the last one and goes with the rest.

    Before the first checkpoint (done = 0) nothing is kept: the run starts over. The evaluation after the last step
    comes after its checkpoint and is done again; that before the first step as well, where it was made up for at the
    end. Evaluations in between come before theirs.
    """
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text().splitlines() if done else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        at_the_end = record["kind"] == "evaluation" and (record["step"] == total or (not record["step"] and kept))
        if record["step"] <= done and not at_the_end:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
