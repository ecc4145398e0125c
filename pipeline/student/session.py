"""A student run from its job to its result: check, evaluate, train, evaluate, export.

Enters: job, manifest, snapshot. Leaves: the run folder (see the package's text). Costs: the training. Started again
after any end, it goes on from the last checkpoint: same batches, and bit-equal losses on a CPU.

On an open snapshot it trains while teachers still write. The order and the numbers are those of a run that came after
them; only the evaluation before training, which reads all of the held-out split, is made up for at the end, on weights
that are built once more.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, NoReturn, Protocol, cast

import torch
from transformers.utils import logging as transformers_logging

from stillroom.pipeline.student import checkpoint, rng
from stillroom.pipeline.student.bindings import Bindings, bindings_of
from stillroom.pipeline.student.checkpoint import Progress
from stillroom.pipeline.student.config import StudentConfig, StudentJob, advice, student_window
from stillroom.pipeline.student.evaluate import evaluate
from stillroom.pipeline.student.export import export_model, write_result
from stillroom.pipeline.student.forward import check_selection
from stillroom.pipeline.student.model import build_student, load_tokenizer
from stillroom.pipeline.student.packing import check_packing
from stillroom.pipeline.student.runlog import RunLog
from stillroom.pipeline.student.signals import Stop, stopping
from stillroom.pipeline.student.teaching import TOPK, Teaching
from stillroom.pipeline.student.trainer import StepResult, Trainer
from stillroom.pipeline.student.waiting import WaitEnded, Waiting
from stillroom.storage.errors import StudentError
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Pack
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream


class Packs(Protocol):
    """What a run needs of a stream."""

    def __iter__(self) -> Iterator[Pack]: ...

    def packs_per_epoch(self, epoch: int) -> int: ...

    def units(self, packs: int | None = None) -> set[str]: ...


def run(job: StudentJob, manifest: Manifest, snapshot: Snapshot | None) -> dict[str, Any]:
    """Train and export; returns what `result.json` holds. Raises StillroomError, KeyboardInterrupt after a signal."""
    transformers_logging.disable_progress_bar()
    with stopping() as stop:
        try:
            return Session(job, manifest, snapshot, stop).run()
        except WaitEnded as error:
            raise KeyboardInterrupt from error


class Session:
    """The parts of a run, made in the order in which they can fail cheaply."""

    def __init__(self, job: StudentJob, manifest: Manifest, snapshot: Snapshot | None, stop: Stop) -> None:
        self.job, self.config, self.stop = job, job.student, stop
        self.manifest, self.snapshot = manifest, snapshot
        self.index = manifest.index()
        self.window = student_window(self.config, manifest.meta.window)
        self.device = choose_device(self.config.device)
        self.vocabulary = manifest.meta.vocabulary if snapshot is None else snapshot.identity.vocabulary
        self.teaching = Teaching.of(self.config.losses.signal, snapshot, self.device) if snapshot else TOPK
        self.bindings: Bindings = bindings_of(job, manifest, snapshot)
        self.waiting = self._waiting()
        self.checkpoints = job.run_dir / "checkpoints"
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.model = self._model()
        train = self._stream(start=0)
        self.total_steps = total_steps(self.config, train)
        self.trainer = Trainer(
            self.model,
            self.config,
            vocabulary=self.vocabulary,
            total_steps=self.total_steps,
            device=self.device,
            teaching=self.teaching,
        )
        if self.config.packing:
            check_packing(self.model, first(train), device=self.device)
        self.heldout = self._stream(heldout=True) if self.index.heldout.any() else None

    def run(self) -> dict[str, Any]:
        # Before anything is restored: dropout of step 0 depends on the seed alone.
        rng.seed_all(self.config.seed)
        progress, notices = checkpoint.load_latest(
            self.checkpoints, bindings=self.bindings, model=self.model, optimizer=self.trainer.optimizer
        )
        with RunLog(
            self.job.run_dir, name=self.config.name, done=progress.step, total=self.total_steps,
            log_every=self.config.log_every,
        ) as log:  # fmt: skip
            if self.waiting:
                self.waiting.say = lambda line: log.say(f"{self.config.name}: {line}")
            for notice in [*advice(self.config, self.teaching.part), *notices, *self._remarks(progress)]:
                log.say(f"notice: {notice}")
            if progress.step == 0 and not self._postponed(log):
                progress = replace(progress, before=self._evaluate(log, step=0))
            progress = self._train(progress, log)
            if progress.before is None:
                progress = replace(progress, before=self._evaluate_untrained(log))
            after = self._evaluate(log, step=progress.step)
            if self.waiting:
                self.bindings = bindings_of(self.job, self.manifest, self.waiting.complete())
                log.say(f"{self.config.name}: waited {self.waiting.seconds:.0f} s for teachers since it was started")
            return self._finish(progress, after)

    def _waiting(self) -> Waiting | None:
        if self.snapshot is None or not self.snapshot.open or self.job.snapshot is None:
            return None

        def say(line: str) -> None:  # until the log is open
            print(f"{self.config.name}: {line}", file=sys.stderr, flush=True)

        return Waiting(self.job.snapshot, self.snapshot, stopped=lambda: self.stop.requested, say=say)

    def _postponed(self, log: RunLog) -> bool:
        """Whether the evaluation before training would wait for teachers."""
        if self.waiting is None or self.heldout is None:
            return False
        lacking = self.heldout.units(self.config.eval_packs) - self.waiting.held().keys()
        if lacking:
            log.say(
                f"{self.config.name}: the evaluation before training is made up for at the end: it reads "
                f"{len(lacking):,} units that are not scored yet"
            )
        return bool(lacking)

    def _evaluate_untrained(self, log: RunLog) -> dict[str, Any] | None:
        """The evaluation before training, afterwards."""
        if self.heldout is None:
            return None
        trained, self.model = self.model, self._model()
        try:
            return self._evaluate(log, step=0)
        finally:
            self.model = trained

    def _model(self) -> Any:
        model = build_student(
            self.config.model, teacher=self.job.teacher, tokenizer=self.tokenizer,
            expected_tokenizer=self.manifest.meta.tokenizer, vocabulary=self.vocabulary,
        ).to(self.device)  # fmt: skip
        longest = int(self.index.tokens.max())
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise StudentError(
                f"the corpus has sequences of {longest} tokens, the student reads at most {limit}: "
                f"set corpus.window to {limit} or less, or choose another student"
            )
        check_selection(model, device=self.device)
        if self.config.gradient_checkpointing:
            # transformers renamed it between 5.19 and 5.23.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model

    def _stream(self, *, heldout: bool = False, start: int = 0) -> Packs:
        # Held-out packs are the same for every student: seed 0, one epoch.
        return cast(
            Packs,
            Stream(
                manifest=self.manifest, snapshot=self.snapshot, heldout=heldout, window=self.window,
                seed=0 if heldout else self.config.seed, pack=self.config.packing, start=start,
                epochs=1 if heldout else (self.config.epochs or (None if self.config.steps else 1)),
                parts=self.teaching.reads, await_shard=self.waiting,
            ),
        )  # fmt: skip

    def _remarks(self, progress: Progress) -> list[str]:
        remarks = []
        if progress.step:
            remarks.append(f"going on after step {progress.step} of {self.total_steps}, from its checkpoint")
        if self.heldout is None:
            remarks.append("the manifest has no held-out sequences: nothing is evaluated")
        elif self.waiting and self.config.eval_every:
            remarks.append(
                f"every {self.config.eval_every} steps training waits until the held-out units that are evaluated are "
                "scored: set eval_every to null, or eval_packs to a few"
            )
        return remarks

    def _train(self, progress: Progress, log: RunLog) -> Progress:
        """From `progress` to the last step."""
        if progress.step >= self.total_steps:
            return progress
        with closing(cast(Any, iter(self._stream(start=progress.packs)))) as packs:
            while progress.step < self.total_steps:
                began = time.perf_counter()
                try:
                    group = list(islice(packs, self.config.batch_packs))
                except WaitEnded:
                    self._stop(progress, log)
                assert group, "the stream ended before the last step"
                waited = time.perf_counter() - began
                result = self.trainer.step(group, progress.step)
                took = time.perf_counter() - began
                progress = advance(progress, result, packs=len(group), seconds=took)
                progress = replace(progress, waited=progress.waited + waited)
                log.step(step_record(progress.step, self.config, group, result, took=took, waited=waited))
                self._between_steps(progress, log)
        return progress

    def _between_steps(self, progress: Progress, log: RunLog) -> None:
        """Evaluate, checkpoint and stop where due; in this order, so that a resumed log lacks no evaluation."""
        step, last = progress.step, progress.step == self.total_steps
        interrupted = self.stop.requested
        if self.config.eval_every and step % self.config.eval_every == 0 and not last and not interrupted:
            try:
                self._evaluate(log, step=step)
            except KeyboardInterrupt:
                interrupted = True
        if interrupted:
            self._stop(progress, log)
        if last or step % self.config.checkpoint_every == 0:
            self._save(progress)

    def _stop(self, progress: Progress, log: RunLog) -> NoReturn:
        if progress.step:
            self._save(progress)
            log.say(f"stopped after step {progress.step} with a checkpoint; the same command goes on from here")
        raise KeyboardInterrupt

    def _save(self, progress: Progress) -> None:
        checkpoint.save(
            self.checkpoints, progress=progress, bindings=self.bindings, model=self.model,
            optimizer=self.trainer.optimizer, keep_last=self.config.keep_last,
        )  # fmt: skip

    def _evaluate(self, log: RunLog, *, step: int) -> dict[str, Any] | None:
        if self.heldout is None:
            return None
        with closing(cast(Any, iter(self.heldout))) as packs:
            try:
                metrics = evaluate(
                    self.model, islice(packs, self.config.eval_packs), packing=self.config.packing,
                    vocabulary=self.vocabulary, device=self.device, autocast=self.trainer.autocast,
                    teaching=self.teaching, between=self.stop.check,
                )  # fmt: skip
            except WaitEnded as error:
                raise KeyboardInterrupt from error
        if metrics is None:
            return None
        log.evaluation(step, metrics.as_dict())
        return metrics.as_dict()

    def _finish(self, progress: Progress, after: dict[str, Any] | None) -> dict[str, Any]:
        export = export_model(self.model, self.tokenizer, self.job.run_dir, dtype=self.config.export_dtype)
        result = {
            "name": self.config.name,
            "bindings": self.bindings,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "layers": getattr(self.model.config, "num_hidden_layers", None),
            "steps": progress.step,
            "packs": progress.packs,
            "tokens": progress.tokens,
            "trained_positions": progress.trained,
            "skipped_steps": progress.skipped,
            "seconds": round(progress.seconds, 3),
            "seconds_waited": round(progress.waited, 3),
            "loss": progress.loss,
            "before": progress.before,
            "after": after,
            "export": str(export),
        }
        write_result(self.job.run_dir, result)
        return result


def choose_device(choice: str) -> torch.device:
    """auto: the first GPU, or the CPU. Raises StudentError if the device asked for is not there."""
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(choice)
    there = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there[device.type]:
        raise StudentError(
            f"device {choice} is not there (GPUs: {torch.cuda.device_count()}); set device to auto or cpu"
        )
    return device


def total_steps(config: StudentConfig, packs: Packs) -> int:
    """`steps`, or what the epochs hold; the last step of the last epoch may be smaller."""
    if config.steps is not None:
        return config.steps
    count = sum(packs.packs_per_epoch(epoch) for epoch in range(config.epochs or 1))
    return -(-count // config.batch_packs)


def first(packs: Iterable[Pack]) -> Pack:
    """The first pack; the stream's thread is ended again."""
    with closing(cast(Any, iter(packs))) as opened:
        return cast(Pack, next(opened))


def advance(progress: Progress, result: StepResult, *, packs: int, seconds: float) -> Progress:
    """The counters after a step."""
    return replace(
        progress,
        step=progress.step + 1,
        packs=progress.packs + packs,
        tokens=progress.tokens + result.tokens,
        trained=progress.trained + result.trained,
        seconds=progress.seconds + seconds,
        skipped=progress.skipped + result.skipped,
        loss=progress.loss if result.loss is None else result.loss,
    )


def step_record(
    step: int, config: StudentConfig, packs: list[Pack], result: StepResult, *, took: float, waited: float
) -> dict[str, Any]:
    """A line of `log.jsonl`: all of it but the two last is the same when the run is repeated."""
    return {
        "step": step,
        "loss": result.loss,
        "kd": result.kd,
        "ce": result.ce,
        "lr": result.lr,
        "temperature": config.losses.temperature,
        "alpha": config.losses.alpha,
        "grad_norm": result.grad_norm,
        "skipped": result.skipped,
        "tokens": result.tokens,
        "trained": result.trained,
        "epoch": packs[0].epoch,
        "packs": [pack.index for pack in packs],
        "sequences": [pack.sequences[0] for pack in packs],
        "tokens_per_s": round(result.tokens / took, 1),
        "data_wait": round(waited / took, 4),
    }
