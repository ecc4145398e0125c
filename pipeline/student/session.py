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
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import torch
from transformers.utils import logging as transformers_logging

from stillroom.pipeline.student import checkpoint, rng
from stillroom.pipeline.student.bindings import Bindings, bindings_of
from stillroom.pipeline.student.checkpoint import Progress
from stillroom.pipeline.student.config import (
    StudentConfig,
    StudentJob,
    advice,
    require_determined,
    student_window,
)
from stillroom.pipeline.student.curriculum import Span, other_corpus, phase_steps, span_of
from stillroom.pipeline.student.evaluate import evaluate
from stillroom.pipeline.student.export import export_model, write_result
from stillroom.pipeline.student.features.losses import Features
from stillroom.pipeline.student.forward import check_selection
from stillroom.pipeline.student.model import build_student, load_tokenizer
from stillroom.pipeline.student.packing import check_packing
from stillroom.pipeline.student.runlog import RunLog
from stillroom.pipeline.student.signals import Stop, stopping
from stillroom.pipeline.student.teaching import TOPK, Teaching
from stillroom.pipeline.student.trainer import StepResult, Trainer
from stillroom.pipeline.student.waiting import WaitEnded, Waiting
from stillroom.pipeline.student.watch import Watch
from stillroom.storage.errors import StudentError
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Pack, SignalSpec
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
        self.others = {path: other_corpus(path, manifest, self.window) for path in self.config.corpora()}
        self.device = choose_device(self.config.device)
        self.vocabulary = manifest.meta.vocabulary if snapshot is None else snapshot.identity.vocabulary
        # A student that learns from layers alone needs no output of the teacher.
        distils = snapshot is not None and (self.config.distils or has_output(snapshot.identity.signal))
        self.teaching = Teaching.of(self.config.losses.signal, snapshot, self.device) if snapshot and distils else TOPK
        if snapshot:
            for losses in self.config.all_losses():
                require_determined(losses, self.teaching.part)
        self.bindings: Bindings = bindings_of(job, manifest, snapshot)
        self.waiting = self._waiting()
        self.checkpoints = job.run_dir / "checkpoints"
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.model = self._model()
        self.features = Features.of(
            self.config, snapshot.identity.signal if snapshot else None, self.model, self.device
        )
        train = self._stream(start=0)
        self.total_steps = total_steps(self.config, train)
        self.trainer = Trainer(
            self.model,
            self.config,
            vocabulary=self.vocabulary,
            total_steps=self.total_steps,
            device=self.device,
            teaching=self.teaching,
            features=self.features,
        )
        if self.config.packing:
            check_packing(self.model, first(train), device=self.device)
        self.heldout = self._stream(heldout=True) if self.index.heldout.any() else None
        self.watch = Watch.of(self.config, steps=self.total_steps)

    def run(self) -> dict[str, Any]:
        # Before anything is restored: dropout of step 0 depends on the seed alone.
        rng.seed_all(self.config.seed)
        progress, notices = checkpoint.load_latest(
            self.checkpoints, bindings=self.bindings, model=self.trainer.kept, optimizer=self.trainer.optimizer
        )
        with RunLog(
            self.job.run_dir, name=self.config.name, done=progress.step, total=self.total_steps,
            log_every=self.config.log_every, watch=self.watch,
        ) as log:  # fmt: skip
            if self.waiting:
                self.waiting.say = lambda line: log.say(f"{self.config.name}: {line}")
            for notice in [*advice(self.config, self.teaching.part), *notices, *self._remarks(progress)]:
                log.say(f"notice: {notice}")
            log.say(f"{self.config.name}: {self.trainer.form}")
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
        if self.waiting is None or self.heldout is None or self._silent:
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
        longest = max(int(index.tokens.max()) for index in (self.index, *(m.index() for m in self.others.values())))
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise StudentError(
                f"the corpus has sequences of {longest} tokens, the student reads at most {limit}: "
                f"set corpus.window to {limit} or less, or choose another student"
            )
        if any("attention" in features.parts() for features in self.config.all_features()):
            model.set_attn_implementation("eager")  # the one that has maps
        check_selection(model, device=self.device)
        if self.config.gradient_checkpointing:
            # transformers renamed it between 5.19 and 5.23.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model

    def _stream(self, *, heldout: bool = False, start: int = 0) -> Packs:
        snapshot = None if heldout and self._silent else self.snapshot
        # Held-out packs are the same for every student: seed 0, one epoch.
        return cast(
            Packs,
            Stream(
                manifest=self.manifest, snapshot=snapshot, heldout=heldout, window=self.window,
                seed=0 if heldout else self.config.seed, pack=self.config.packing, start=start,
                epochs=1 if heldout else epochs_of(self.config),
                parts=self._reads(heldout), await_shard=self.waiting,
            ),
        )  # fmt: skip

    def _other(self, corpus: Path, *, start: int) -> Packs:
        """The text of another corpus, without signal."""
        return cast(
            Packs,
            Stream(
                manifest=self.others[corpus], snapshot=None, window=self.window, seed=self.config.seed,
                pack=self.config.packing, start=start,
            ),
        )  # fmt: skip

    @property
    def _silent(self) -> bool:
        """Whether the store has nothing to measure a student by."""
        return self.snapshot is not None and not has_output(self.snapshot.identity.signal)

    def _reads(self, heldout: bool) -> frozenset[str]:
        """Parts of the store; held-out packs are measured on the output alone."""
        inner = frozenset() if heldout or self.features is None else self.features.reads
        return self.teaching.reads | inner

    def _remarks(self, progress: Progress) -> list[str]:
        remarks = []
        if progress.step:
            remarks.append(f"going on after step {progress.step} of {self.total_steps}, from its checkpoint")
        if any("attention" in features.parts() for features in self.config.all_features()):
            remarks.append(
                "features.attention: the student runs with eager attention, which computes maps in full: slower, and "
                "memory of heads · window² numbers a layer"
            )
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
        while progress.step < self.total_steps:
            progress = self._train_span(progress, log, span_of(self.config, self.total_steps, progress.step))
        return progress

    def _train_span(self, progress: Progress, log: RunLog, span: Span) -> Progress:
        """To the end of the steps that read one corpus."""
        # Phases have no epochs: each of their steps reads as many packs. Else the last of an epoch may be smaller.
        packs_read = (span.before + progress.step - span.first) * self.config.batch_packs
        start = packs_read if self.config.phases else progress.packs
        stream = self._stream(start=start) if span.corpus is None else self._other(span.corpus, start=start)
        with closing(cast(Any, iter(stream))) as packs:
            while progress.step < span.stop:
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
                log.step(step_record(progress.step, group, result, took=took, waited=waited))
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
            self.checkpoints, progress=progress, bindings=self.bindings, model=self.trainer.kept,
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
                    teaching=self.teaching, head=self.trainer.head, between=self.stop.check,
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
            "notices": self.watch.notices,
            "export": str(export),
        }
        write_result(self.job.run_dir, result)
        return result


def has_output(spec: SignalSpec) -> bool:
    """Whether the store holds what the teacher says, and not its inside alone."""
    return bool(spec.topk or spec.sampled or spec.hidden)


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


def epochs_of(config: StudentConfig) -> int | None:
    """How often the training split is read; None where the steps say when to stop."""
    return config.epochs or (None if config.steps or config.phases else 1)


def total_steps(config: StudentConfig, packs: Packs) -> int:
    """`steps`, or what the epochs hold; the last step of the last epoch may be smaller."""
    steps = phase_steps(config) or config.steps
    if steps is not None:
        return steps
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


def step_record(step: int, packs: list[Pack], result: StepResult, *, took: float, waited: float) -> dict[str, Any]:
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
        "phase": result.phase,
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
