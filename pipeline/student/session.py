"""A student run from its job to its result: check, evaluate, train, evaluate, export.

Enters: job, manifest, snapshot. Leaves: the run folder (see the package's text). Costs: the training. Started again
after any end, it goes on from the last checkpoint: same batches, and bit-equal losses on a CPU.

On an open snapshot it trains while teachers still write. The order and the numbers are those of a run that came after
them; only the evaluation before training, which reads all of the held-out split, is made up for at the end, on weights
that are built once more.

Several processes (see `distributed`) run this side by side. The first one alone logs, writes and exports.

Its rooms: `prepare` (the model), `streams` (which packs), `held_out` (evaluation during training), `training` (the
loop, and what comes between steps), `checkpoint` and `progress`, `best` and `advance` (what evaluations say), `export`.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from stillroom.pipeline.student import advance, best, rng
from stillroom.pipeline.student.bindings import Bindings, bindings_of
from stillroom.pipeline.student.checkpoint import Checkpoints
from stillroom.pipeline.student.collate import collate
from stillroom.pipeline.student.compiled import compile_body
from stillroom.pipeline.student.config import StudentJob, advice, require_determined, student_window
from stillroom.pipeline.student.curriculum import cut_short, other_corpus
from stillroom.pipeline.student.device import choose_device
from stillroom.pipeline.student.distributed import ALONE, Ranks, joined, require_shared
from stillroom.pipeline.student.export import export_model, result_of, write_result
from stillroom.pipeline.student.features.losses import Features
from stillroom.pipeline.student.held_out import HeldOut
from stillroom.pipeline.student.mix import Mix, notices, summary
from stillroom.pipeline.student.model import load_tokenizer
from stillroom.pipeline.student.packing import check_packing
from stillroom.pipeline.student.places import Place
from stillroom.pipeline.student.prepare import prepared, reads_maps
from stillroom.pipeline.student.progress import Progress
from stillroom.pipeline.student.runlog import RunLog, Silence, steps_of
from stillroom.pipeline.student.signals import Stop, stopping
from stillroom.pipeline.student.streams import Streams, first, has_output, total_steps
from stillroom.pipeline.student.teaching import TOPK, Teaching
from stillroom.pipeline.student.trainer import Trainer
from stillroom.pipeline.student.training import Training
from stillroom.pipeline.student.waiting import WaitEnded, Waiting
from stillroom.pipeline.student.watch import Watch
from stillroom.storage.errors import NonFiniteLoss
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Pack
from stillroom.storage.snapshot import Snapshot


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
        self.manifest, self.snapshot, self.device = manifest, snapshot, device
        window = student_window(self.config, manifest.meta.window)
        others = {path: other_corpus(path, manifest, window) for path in self.config.corpora()}
        index = manifest.index()
        #: Tokens of the longest sequence that is read.
        self.longest = max(int(found.tokens.max()) for found in (index, *(m.index() for m in others.values())))
        self.vocabulary = manifest.meta.vocabulary if snapshot is None else snapshot.identity.vocabulary
        self.teaching = self._teaching()
        self.waiting = self._waiting()
        self.tokenizer = load_tokenizer(job.tokenizer)
        #: base: digest of the weights that adapters stand beside; None where all are trained.
        self.model, self.base = self._prepared()
        bindings = self._bindings(snapshot)
        features = Features.of(self.config, snapshot.identity.signal if snapshot else None, self.model, self.device)
        self.streams = Streams(
            config=self.config, manifest=manifest, snapshot=snapshot, others=others, window=window,
            waiting=self.waiting, output=self.teaching.reads, inner=features.reads if features else frozenset(),
            rank=ranks.rank, world_size=ranks.world,
        )  # fmt: skip
        whole = self.streams.whole()
        self.total_steps = total_steps(self.config, whole)
        self.mix = Mix.of(self.config.mix, manifest, self.total_steps) if self.config.mix else None
        self.streams = replace(self.streams, mix=self.mix)
        self.trainer = Trainer(
            self.model, self.config, vocabulary=self.vocabulary, total_steps=self.total_steps, device=device,
            teaching=self.teaching, features=features, ranks=ranks,
            units_of=snapshot.units_of if snapshot else None,
        )  # fmt: skip
        self.checkpoints = Checkpoints(
            job.run_dir / "checkpoints", trainer=self.trainer, bindings=bindings, keep_last=self.config.keep_last,
            ranks=ranks,
        )  # fmt: skip
        if self.config.packing:
            check_packing(self.model, first(whole), device=device)
        self.forms = [self.trainer.form, *([self._compiled(first(whole))] if self.config.compile else [])]
        self.heldout = HeldOut(
            self.config, self.streams, trainer=self.trainer, teaching=self.teaching, vocabulary=self.vocabulary,
            device=device, ranks=ranks, stop=stop, empty=not index.heldout.any(),
        )  # fmt: skip
        self.watch = Watch.of(self.config, steps=self.total_steps)
        #: Of what happened at the end; the result holds them.
        self.remarks: list[str] = []
        if self.config.advance:
            advance.require_heldout(self.heldout.empty)
        if self.config.keep_best and self.heldout.empty:
            best.require_measured(self.config.keep_best, None)

    def run(self) -> dict[str, Any]:
        # Before anything is restored: dropout of step 0 depends on the seed alone.
        rng.seed_all(self.config.seed)
        progress, notices = self.checkpoints.restore()
        log_of = RunLog if self.ranks.first else Silence
        with log_of(
            self.job.run_dir, name=self.config.name, done=progress.step, total=self.total_steps,
            log_every=self.config.log_every, watch=self.watch,
        ) as log:  # fmt: skip
            self._greet(progress, notices, log)
            if progress.step == 0 and not self.heldout.postponed(log):
                progress = replace(progress, before=self.heldout.measure(self.model, log, step=0))
            training = Training(
                self.trainer, self.streams, heldout=self.heldout, checkpoints=self.checkpoints,
                total_steps=self.total_steps, ranks=self.ranks, stop=self.stop, log=log,
            )  # fmt: skip
            progress = training.run(progress)
            if progress.before is None and not self.heldout.empty:  # postponed: on weights as they were before
                progress = replace(progress, before=self.heldout.measure(self._prepared()[0], log, step=0))
            if progress.advanced:  # on that evaluation
                after = progress.advanced["metrics"]
            else:
                after = self.heldout.measure(self.model, log, step=progress.step)
                progress = best.judged(self.config.keep_best, progress, after)
            if progress.best and progress.best["step"] != progress.step:
                progress, after = self._back_to_best(progress, after, log)
            if not self.ranks.first:
                return {}
            snapshot = self.snapshot
            if self.waiting:
                snapshot = self.waiting.complete()
                log.say(f"{self.config.name}: waited {self.waiting.seconds:.0f} s for teachers since it was started")
            return self._finish(progress, after, self._bindings(snapshot))

    def _teaching(self) -> Teaching:
        """Raises StudentError for losses that the store does not determine."""
        snapshot = self.snapshot
        if snapshot is None:
            return TOPK
        # A student that learns from layers alone needs no output of the teacher.
        distils = self.config.distils or has_output(snapshot.identity.signal)
        teaching = Teaching.of(self.config.losses.signal, snapshot, self.device) if distils else TOPK
        for losses in self.config.all_losses():
            require_determined(losses, teaching.part)
        return teaching

    def _waiting(self) -> Waiting | None:
        """Of an open snapshot."""
        if self.snapshot is None or not self.snapshot.open or self.job.snapshot is None:
            return None

        def say(line: str) -> None:  # until the log is open
            if self.ranks.first:
                print(f"{self.config.name}: {line}", file=sys.stderr, flush=True)

        return Waiting(
            self.job.snapshot, self.snapshot, stopped=lambda: self.stop.requested or self.ranks.stopped(), say=say
        )

    def _prepared(self) -> tuple[Any, str | None]:
        return prepared(
            self.job, self.manifest, tokenizer=self.tokenizer, vocabulary=self.vocabulary, longest=self.longest,
            device=self.device,
        )  # fmt: skip

    def _bindings(self, snapshot: Snapshot | None) -> Bindings:
        found = bindings_of(self.job, self.manifest, snapshot)
        return found if self.base is None else {**found, "base": self.base}

    def _compiled(self, pack: Pack) -> str:
        packs = [pack] * self.config.micro_packs
        batch = collate(packs, packing=self.config.packing, temperature=1.0, vocabulary=self.vocabulary)
        return compile_body(self.model, batch.to(self.device), packing=self.config.packing)

    def _greet(self, progress: Progress, notices: list[str], log: RunLog) -> None:
        """What a person should know before the first step. notices: on checkpoints."""
        if self.waiting:
            self.waiting.say = lambda line: log.say(f"{self.config.name}: {line}")
        for notice in [*advice(self.config, self.teaching.part), *notices, *self._beforehand(progress)]:
            log.say(f"notice: {notice}")
        for form in self.forms:
            log.say(f"{self.config.name}: {form}")

    def _beforehand(self, progress: Progress) -> list[str]:
        remarks = []
        if progress.step:
            remarks.append(f"going on after step {progress.step} of {self.total_steps}, from its checkpoint")
        remarks += cut_short(self.config, self.total_steps)
        if reads_maps(self.config):
            remarks.append(
                "features.attention: the student runs with eager attention, which computes maps in full: slower, and "
                "memory of heads · window² numbers a layer"
            )
        if self.heldout.empty:
            remarks.append("the manifest has no held-out sequences: nothing is evaluated")
        elif self.waiting and self.config.eval_every:
            remarks.append(
                f"every {self.config.eval_every} steps training waits until the held-out units that are evaluated are "
                "scored: set eval_every to null, or eval_packs to a few"
            )
        return remarks

    def _back_to_best(
        self, progress: Progress, after: dict[str, Any] | None, log: RunLog
    ) -> tuple[Progress, dict[str, Any] | None]:
        """The model with the weights of the best evaluation, and that evaluation in place of `after`."""
        assert progress.best is not None
        step = progress.best["step"]
        path, fault = self.checkpoints.back_to(step)
        if fault is not None:
            self.remarks.append(best.lost(path, fault, progress.step))
            log.say(f"notice: {self.remarks[-1]}")
            return replace(progress, best=None), after
        log.say(f"{self.config.name}: the best evaluation was that after {step} steps: its weights are exported")
        return progress, progress.best["metrics"]

    def _finish(self, progress: Progress, after: dict[str, Any] | None, bindings: Bindings) -> dict[str, Any]:
        config = self.config
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        export = export_model(
            self.model, self.tokenizer, self.job.run_dir, dtype=config.export_dtype,
            adapted=None if config.lora is None else config.model,
        )  # fmt: skip
        sources = {"mix": summary(self.mix, steps_of(self.job.run_dir))} if self.mix else {}
        for line in notices(sources.get("mix", {}), progress.step):
            self.remarks.append(line)
            print(f"notice: {line}", file=sys.stderr, flush=True)
        scaled = self.trainer.scaler.enabled
        result = {
            "name": config.name,
            "bindings": bindings,
            **result_of(config, self.model, progress, after=after, trained=trained, scaled=scaled),
            **sources,
            **({"advanced": advance.stated(progress.advanced)} if config.advance else {}),
            **({"best": best.stated(progress.best)} if config.keep_best else {}),
            "notices": [*self.watch.notices, *self.remarks],
            "export": str(export),
        }
        write_result(self.job.run_dir, result)
        return result
