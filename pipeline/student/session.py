"""A student run from its job to its result: check, evaluate, train, evaluate, export.

Enters: job, manifest, snapshot. Leaves: the run folder (see the package's text). Costs: the training. Started again
after any end, it goes on from the last checkpoint: same batches, and bit-equal losses on a CPU.

On an open snapshot it trains while teachers still write. The order and the numbers are those of a run that came after
them; only the evaluation before training, which reads all of the held-out split, is made up for at the end, on weights
that are built once more.

Several processes (see `distributed`) run this side by side. The first one alone logs, writes and exports.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import torch
from transformers.utils import logging as transformers_logging

from stillroom.pipeline.student import best, checkpoint, rng
from stillroom.pipeline.student.advance import Evaluation, decide, evaluation
from stillroom.pipeline.student.bindings import Bindings, bindings_of
from stillroom.pipeline.student.checkpoint import Progress
from stillroom.pipeline.student.collate import collate
from stillroom.pipeline.student.compiled import compile_body
from stillroom.pipeline.student.config import (
    StudentConfig,
    StudentJob,
    advice,
    require_determined,
    student_window,
)
from stillroom.pipeline.student.curriculum import Span, other_corpus, phase_steps, span_of
from stillroom.pipeline.student.distributed import ALONE, AllStopped, PackName, Ranks, joined, require_shared, share
from stillroom.pipeline.student.evaluate import evaluate, generated_sequences
from stillroom.pipeline.student.export import export_model, write_result
from stillroom.pipeline.student.features.losses import Features
from stillroom.pipeline.student.forward import check_selection
from stillroom.pipeline.student.lora import adapt, base_digest
from stillroom.pipeline.student.mix import Mix, mixed, notices, summary
from stillroom.pipeline.student.model import build_student, load_tokenizer
from stillroom.pipeline.student.packing import check_packing
from stillroom.pipeline.student.places import Place
from stillroom.pipeline.student.runlog import RunLog, Silence, steps_of
from stillroom.pipeline.student.signals import Stop, stopping
from stillroom.pipeline.student.teaching import TOPK, Teaching
from stillroom.pipeline.student.trainer import StepResult, Trainer
from stillroom.pipeline.student.waiting import WaitEnded, Waiting
from stillroom.pipeline.student.watch import Watch
from stillroom.storage.errors import NonFiniteLoss, RecipeError, StudentError
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
    place, waits = Place.here(), snapshot is not None and snapshot.open
    require_shared(place, job.student.batch_packs)
    device = choose_device(job.student.device, place)
    with (
        stopping(quiet=place.rank > 0) as stop,
        joined(place, device, timeout_s=job.rank_timeout_s, waits=waits) as ranks,
    ):
        try:
            return Session(job, manifest, snapshot, stop, device=device, ranks=ranks).run()
        except WaitEnded as error:
            ranks.say_stopped()
            raise KeyboardInterrupt from error
        except NonFiniteLoss as error:  # of all ranks, in the same words
            if not ranks.first and not place.launched:
                raise SystemExit(error.exit_code) from error
            raise


class Session:
    """The parts of a run, made in the order in which they can fail cheaply."""

    def __init__(
        self,
        job: StudentJob,
        manifest: Manifest,
        snapshot: Snapshot | None,
        stop: Stop,
        *,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.job, self.config, self.stop, self.ranks = job, job.student, stop, ranks
        self.manifest, self.snapshot = manifest, snapshot
        self.index = manifest.index()
        self.window = student_window(self.config, manifest.meta.window)
        self.others = {path: other_corpus(path, manifest, self.window) for path in self.config.corpora()}
        self.device = device
        self.vocabulary = manifest.meta.vocabulary if snapshot is None else snapshot.identity.vocabulary
        # A student that learns from layers alone needs no output of the teacher.
        distils = snapshot is not None and (self.config.distils or has_output(snapshot.identity.signal))
        self.teaching = Teaching.of(self.config.losses.signal, snapshot, self.device) if snapshot and distils else TOPK
        if snapshot:
            for losses in self.config.all_losses():
                require_determined(losses, self.teaching.part)
        #: Digest of the weights that adapters stand beside; None where all are trained.
        self.base: str | None = None
        self.waiting = self._waiting()
        self.checkpoints = job.run_dir / "checkpoints"
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.model = self._model()
        self.bindings = self._bindings(snapshot)
        self.features = Features.of(
            self.config, snapshot.identity.signal if snapshot else None, self.model, self.device
        )
        self.mix: Mix | None = None
        train = self._stream(whole=True)
        self.total_steps = total_steps(self.config, train)
        self.mix = Mix.of(self.config.mix, manifest, self.total_steps) if self.config.mix else None
        self.trainer = Trainer(
            self.model,
            self.config,
            vocabulary=self.vocabulary,
            total_steps=self.total_steps,
            device=self.device,
            teaching=self.teaching,
            features=self.features,
            ranks=ranks,
        )
        if self.config.packing:
            check_packing(self.model, first(train), device=self.device)
        self.forms = [self.trainer.form, *([self._compiled(first(train))] if self.config.compile else [])]
        self.heldout = self._stream(heldout=True) if self.index.heldout.any() else None
        self.generated = generated_sequences(manifest)
        self.watch = Watch.of(self.config, steps=self.total_steps)
        #: Of what happened at the end; the result holds them.
        self.remarks: list[str] = []
        if self.config.advance and self.heldout is None:
            raise StudentError(
                "advance looks at evaluations, and the corpus has no held-out documents: set corpus.heldout, or leave "
                "out advance"
            )
        if self.config.keep_best and self.heldout is None:
            best.require_measured(self.config.keep_best, None)

    def run(self) -> dict[str, Any]:
        # Before anything is restored: dropout of step 0 depends on the seed alone.
        rng.seed_all(self.config.seed)
        # The first alone, as it sets damaged ones aside; the others then find what it found.
        progress, notices = self.ranks.in_turn(
            lambda: checkpoint.load_latest(
                self.checkpoints, bindings=self.bindings, model=self.trainer.kept, optimizer=self.trainer.optimizer
            )
        )
        self.trainer.scaler.restore(progress.scaler)
        log_of = RunLog if self.ranks.first else Silence
        with log_of(
            self.job.run_dir, name=self.config.name, done=progress.step, total=self.total_steps,
            log_every=self.config.log_every, watch=self.watch,
        ) as log:  # fmt: skip
            if self.waiting:
                self.waiting.say = lambda line: log.say(f"{self.config.name}: {line}")
            for notice in [*advice(self.config, self.teaching.part), *notices, *self._remarks(progress)]:
                log.say(f"notice: {notice}")
            for form in self.forms:
                log.say(f"{self.config.name}: {form}")
            if progress.step == 0 and not self._postponed(log):
                progress = replace(progress, before=self._evaluate(log, step=0))
            if progress.owes_evaluation:
                progress = self._evaluate_between(replace(progress, owes_evaluation=False), log)
            progress = self._train(progress, log)
            if progress.before is None:
                progress = replace(progress, before=self._evaluate_untrained(log))
            if progress.advanced:  # on that evaluation
                after = progress.advanced["metrics"]
            else:
                after = self._evaluate(log, step=progress.step)
                progress = self._judged(progress, after)
            if progress.best and progress.best["step"] != progress.step:
                progress, after = self._back_to_best(progress, after, log)
            if not self.ranks.first:
                return {}
            if self.waiting:
                self.bindings = self._bindings(self.waiting.complete())
                log.say(f"{self.config.name}: waited {self.waiting.seconds:.0f} s for teachers since it was started")
            return self._finish(progress, after)

    def _compiled(self, pack: Pack) -> str:
        packs = [pack] * self.config.micro_packs
        batch = collate(packs, packing=self.config.packing, temperature=1.0, vocabulary=self.vocabulary)
        return compile_body(self.model, batch.to(self.device), packing=self.config.packing)

    def _bindings(self, snapshot: Snapshot | None) -> Bindings:
        found = bindings_of(self.job, self.manifest, snapshot)
        return found if self.base is None else {**found, "base": self.base}

    def _waiting(self) -> Waiting | None:
        if self.snapshot is None or not self.snapshot.open or self.job.snapshot is None:
            return None

        def say(line: str) -> None:  # until the log is open
            if self.ranks.first:
                print(f"{self.config.name}: {line}", file=sys.stderr, flush=True)

        return Waiting(
            self.job.snapshot, self.snapshot, stopped=lambda: self.stop.requested or self.ranks.stopped(), say=say
        )

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
        return self.ranks.any(bool(lacking), stop=False)

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
        )  # fmt: skip
        if self.config.lora:
            self.base = base_digest(model)
            model = adapt(model, self.config.lora, seed=self.config.seed)
        model = model.to(self.device)
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

    def _stream(self, *, heldout: bool = False, start: int = 0, whole: bool = False) -> Packs:
        """whole: all packs, and not this rank's."""
        if self.mix and self.mix.samples and not heldout:
            return self._mixed(self.mix, start)
        snapshot = None if heldout and self._silent else self.snapshot
        # Held-out packs are the same for every student: seed 0, one epoch.
        return cast(
            Packs,
            Stream(
                manifest=self.manifest, snapshot=snapshot, heldout=heldout, window=self.window,
                seed=0 if heldout else self.config.seed, pack=self.config.packing, start=start,
                epochs=1 if heldout else epochs_of(self.config),
                parts=self._reads(heldout), await_shard=self.waiting, **({} if whole else self._split),
            ),
        )  # fmt: skip

    def _mixed(self, mix: Mix, start: int) -> Packs:
        """Every pack of one source."""
        return mix.stream(
            lambda chosen, numbers: Stream(
                manifest=self.manifest, snapshot=self.snapshot, window=self.window, seed=self.config.seed,
                pack=self.config.packing, parts=self._reads(False), await_shard=self.waiting, chosen=chosen,
                numbers=numbers,
            ),
            packs=self.config.batch_packs, seed=self.config.seed, start=start, **self._split,
        )  # fmt: skip

    def _other(self, corpus: Path, *, start: int) -> Packs:
        """The text of another corpus, without signal."""
        return cast(
            Packs,
            Stream(
                manifest=self.others[corpus], snapshot=None, window=self.window, seed=self.config.seed,
                pack=self.config.packing, start=start, **self._split,
            ),
        )  # fmt: skip

    @property
    def _split(self) -> dict[str, Any]:
        """Arguments of a stream: every world-th pack."""
        return {"rank": self.ranks.rank, "world_size": self.ranks.world}

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
        while progress.step < self.total_steps and not progress.advanced:
            progress = self._train_span(progress, log, span_of(self.config, self.total_steps, progress.step))
        return progress

    def _train_span(self, progress: Progress, log: RunLog, span: Span) -> Progress:
        """To the end of the steps that read one corpus."""
        # Phases have no epochs: each of their steps reads as many packs. Else the last of an epoch may be smaller.
        packs_read = (span.before + progress.step - span.first) * self.config.batch_packs
        start = packs_read if self.config.phases else progress.packs
        stream = self._stream(start=start) if span.corpus is None else self._other(span.corpus, start=start)
        consumed = 0  # by all ranks, of this stream
        with closing(cast(Any, iter(stream))) as packs:
            while progress.step < span.stop and not progress.advanced:
                began = time.perf_counter()
                own = self._take(packs, consumed, progress, log)
                waited = time.perf_counter() - began
                group = self.ranks.names(own, consumed)
                assert group, "the stream ended before the last step"
                consumed += len(group)
                if (seed := self.ranks.seed(self.config.seed, progress.step)) is not None:
                    rng.seed_all(seed)
                weighed, shares = mixed(self.mix, own, progress.step, self.ranks.total)
                result = self.trainer.step(weighed, progress.step)
                took = time.perf_counter() - began
                progress = advance(progress, result, packs=len(group), seconds=took)
                progress = replace(progress, waited=progress.waited + waited, scaler=self.trainer.scaler.state())
                log.step(step_record(progress.step, group, result, took=took, waited=waited) | shares)
                progress = self._between_steps(progress, log)
        return progress

    def _take(self, packs: Iterator[Pack], consumed: int, progress: Progress, log: RunLog) -> list[Pack]:
        """This rank's packs of the next step, if no rank ended its wait for teachers."""
        count = share(consumed, self.config.batch_packs, self.ranks.rank, self.ranks.world)
        own, ended = [], False
        try:
            own = list(islice(packs, count))
        except WaitEnded:
            ended = True
        if self.waiting and self.ranks.any(ended):
            self._stop(progress, log)
        return own

    def _between_steps(self, progress: Progress, log: RunLog) -> Progress:
        """Evaluate, checkpoint and stop where due; in this order, so that a resumed log lacks no evaluation."""
        step, last = progress.step, progress.step == self.total_steps
        due = bool(self.config.eval_every and step % self.config.eval_every == 0 and not last)
        if self.ranks.any(self.stop.requested):
            self._stop(replace(progress, owes_evaluation=due), log)
        if due:
            progress = self._evaluate_between(progress, log)
        is_best = due and progress.best is not None and progress.best["step"] == step
        if last or is_best or progress.advanced or step % self.config.checkpoint_every == 0:
            self._save(progress)
        return progress

    def _evaluate_between(self, progress: Progress, log: RunLog) -> Progress:
        """An evaluation on the way; stopped in it, the run owes it."""
        try:
            metrics = self._evaluate(log, step=progress.step)
        except KeyboardInterrupt:
            self._stop(replace(progress, owes_evaluation=True), log)
        return self._decided(self._judged(progress, metrics), metrics, log)

    def _decided(self, progress: Progress, metrics: dict[str, Any] | None, log: RunLog) -> Progress:
        """With the decision to end here, if that is what the evaluations say."""
        wanted = self.config.advance
        if wanted is None or metrics is None:
            return progress
        seen = [*progress.evaluations, asdict(evaluation(wanted, progress.step, metrics))]
        decision = decide(wanted, [Evaluation(**row) for row in seen])
        if decision is None:
            return replace(progress, evaluations=seen)
        log.say(f"{self.config.name}: {decision.line()}")
        log.decision(decision.as_dict())
        return replace(progress, evaluations=seen, advanced={**decision.as_dict(), "metrics": metrics})

    def _judged(self, progress: Progress, metrics: dict[str, Any] | None) -> Progress:
        """With this evaluation as the best if it is that."""
        if self.config.keep_best is None or metrics is None:
            return progress
        found = best.better(self.config.keep_best, progress.step, metrics, progress.best)
        return progress if found is None else replace(progress, best=found)

    def _back_to_best(
        self, progress: Progress, after: dict[str, Any] | None, log: RunLog
    ) -> tuple[Progress, dict[str, Any] | None]:
        """The model with the weights of the best evaluation, and that evaluation in place of `after`."""
        assert progress.best is not None
        step, path = progress.best["step"], checkpoint.folder_of(self.checkpoints, progress.best["step"])
        fault = checkpoint.load_weights(path, self.trainer.kept)
        if fault is not None:
            self.remarks.append(best.lost(path, fault, progress.step))
            log.say(f"notice: {self.remarks[-1]}")
            return replace(progress, best=None), after
        log.say(f"{self.config.name}: the best evaluation was that after {step} steps: its weights are exported")
        return progress, progress.best["metrics"]

    def _stop(self, progress: Progress, log: RunLog) -> NoReturn:
        if progress.step:
            self._save(progress)
            log.say(f"stopped after step {progress.step} with a checkpoint; the same command goes on from here")
        raise KeyboardInterrupt

    def _save(self, progress: Progress) -> None:
        if self.ranks.first:
            checkpoint.save(
                self.checkpoints, progress=progress, bindings=self.bindings, model=self.trainer.kept,
                optimizer=self.trainer.optimizer, keep_last=self.config.keep_last,
            )  # fmt: skip
        self.ranks.barrier()

    def _evaluate(self, log: RunLog, *, step: int) -> dict[str, Any] | None:
        if self.heldout is None:
            return None
        packs_read = self.config.eval_packs
        count = None if packs_read is None else share(0, packs_read, self.ranks.rank, self.ranks.world)
        with closing(cast(Any, iter(self.heldout))) as packs:
            try:
                metrics = evaluate(
                    self.model, islice(packs, count), packing=self.config.packing,
                    vocabulary=self.vocabulary, device=self.device, autocast=self.trainer.autocast,
                    teaching=self.teaching, head=self.trainer.head, between=self.stop.check,
                    generated=self.generated, total=self.ranks.total_or_stop,
                )  # fmt: skip
            except AllStopped:
                raise
            except (WaitEnded, KeyboardInterrupt) as error:
                self.ranks.any(True)
                raise AllStopped from error
        if self.config.keep_best:
            best.require_measured(self.config.keep_best, None if metrics is None else metrics.as_dict())
        if metrics is None:
            return None
        log.evaluation(step, metrics.as_dict())
        return metrics.as_dict()

    def _finish(self, progress: Progress, after: dict[str, Any] | None) -> dict[str, Any]:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        export = export_model(
            self.model, self.tokenizer, self.job.run_dir, dtype=self.config.export_dtype,
            adapted=None if self.config.lora is None else self.config.model,
        )  # fmt: skip
        sources = {"mix": summary(self.mix, steps_of(self.job.run_dir))} if self.mix else {}
        for line in notices(sources.get("mix", {}), progress.step):
            self.remarks.append(line)
            print(f"notice: {line}", file=sys.stderr, flush=True)
        result = {
            "name": self.config.name,
            "bindings": self.bindings,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **({"trained_parameters": trained} if self.config.lora else {}),
            "layers": getattr(self.model.config, "num_hidden_layers", None),
            "steps": progress.step,
            "packs": progress.packs,
            "tokens": progress.tokens,
            "trained_positions": progress.trained,
            "skipped_steps": progress.skipped,
            **({"scaler_skipped": progress.scaler_skipped} if self.trainer.scaler.enabled else {}),
            "seconds": round(progress.seconds, 3),
            "seconds_waited": round(progress.waited, 3),
            "loss": progress.loss,
            "before": progress.before,
            "after": after,
            **sources,
            **({"advanced": _without_metrics(progress.advanced)} if self.config.advance else {}),
            **({"best": best.stated(progress.best)} if self.config.keep_best else {}),
            "notices": [*self.watch.notices, *self.remarks],
            "export": str(export),
        }
        write_result(self.job.run_dir, result)
        return result


def _without_metrics(advanced: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if advanced is None else {key: value for key, value in advanced.items() if key != "metrics"}


def has_output(spec: SignalSpec) -> bool:
    """Whether the store holds what the teacher says, and not its inside alone."""
    return bool(spec.topk or spec.sampled or spec.hidden)


def choose_device(choice: str, place: Place = Place()) -> torch.device:  # noqa: B008 - frozen
    """auto: the first GPU, or the CPU; of several processes on a machine, to each a GPU of its own. Raises RecipeError
    if the device asked for is not there."""
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(choice)
    if place.world > 1 and choice != "cpu":
        if choice != "cuda":
            raise RecipeError(
                f"device is {choice}, and there are {place.world} processes, which take GPUs by their number, or the "
                "CPU: set device to auto, cuda or cpu, or train.processes to 1"
            )
        if place.locals > torch.cuda.device_count():
            raise RecipeError(
                f"{place.locals} processes of the training on this machine, {torch.cuda.device_count()} GPUs: each "
                "needs its own; set train.processes to the number of GPUs, or device to cpu"
            )
        return torch.device("cuda", place.local)
    there = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there[device.type]:
        raise RecipeError(
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
        scaler_skipped=progress.scaler_skipped + result.overflowed,
        loss=progress.loss if result.loss is None else result.loss,
    )


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
