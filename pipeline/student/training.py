"""Training: from a step to the last one, with what comes between steps.

Enters: `Progress`, where a checkpoint left it. Leaves: `Progress` after the last step, or after the one where `advance`
decided; checkpoints, lines of the log. Costs: the steps.

After a step, in this order: stop if a signal came, evaluate if due, decide whether to end here, write a checkpoint if
due. Evaluations come before checkpoints, so that the log of a resumed run lacks none; a run stopped before an
evaluation that was due says so in its checkpoint, and makes up for it.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, NoReturn, cast

from stillroom.pipeline.student import advance, best, rng
from stillroom.pipeline.student.checkpoint import Checkpoints
from stillroom.pipeline.student.curriculum import Span, span_of
from stillroom.pipeline.student.distributed import Ranks, share
from stillroom.pipeline.student.held_out import HeldOut
from stillroom.pipeline.student.mix import mixed
from stillroom.pipeline.student.progress import Progress
from stillroom.pipeline.student.runlog import RunLog, step_record
from stillroom.pipeline.student.signals import Stop
from stillroom.pipeline.student.streams import Streams
from stillroom.pipeline.student.trainer import StepResult, Trainer
from stillroom.pipeline.student.waiting import WaitEnded
from stillroom.storage.records import Pack


class Training:
    """The loop of a run. It holds no state of its own: what changes is the trainer's, and `Progress`."""

    def __init__(
        self,
        trainer: Trainer,
        streams: Streams,
        *,
        heldout: HeldOut,
        checkpoints: Checkpoints,
        total_steps: int,
        ranks: Ranks,
        stop: Stop,
        log: RunLog,
    ) -> None:
        self._trainer, self._streams, self._heldout, self._checkpoints = trainer, streams, heldout, checkpoints
        self._config, self._total_steps = trainer.config, total_steps
        self._ranks, self._stop, self._log = ranks, stop, log

    def run(self, progress: Progress) -> Progress:
        """To the last step. Raises KeyboardInterrupt when stopped, with a checkpoint written."""
        if progress.owes_evaluation:
            progress = self._evaluate(replace(progress, owes_evaluation=False))
        while progress.step < self._total_steps and not progress.advanced:
            progress = self._span(progress, span_of(self._config, self._total_steps, progress.step))
        return progress

    def _span(self, progress: Progress, span: Span) -> Progress:
        """To the end of the steps that read one corpus."""
        # Phases have no epochs: each of their steps reads as many packs. Else the last of an epoch may be smaller.
        packs_read = (span.before + progress.step - span.first) * self._config.batch_packs
        start = packs_read if self._config.phases else progress.packs
        streams, corpus = self._streams, span.corpus
        stream = streams.training(start=start) if corpus is None else streams.other(corpus, start=start)
        consumed = 0  # by all ranks, of this stream
        with closing(cast(Any, iter(stream))) as packs:
            while progress.step < span.stop and not progress.advanced:
                progress, count = self._step(progress, packs, consumed)
                consumed += count
                progress = self._between_steps(progress)
        return progress

    def _step(self, progress: Progress, packs: Iterator[Pack], consumed: int) -> tuple[Progress, int]:
        """One step, and how many packs of the stream all ranks took for it."""
        began = time.perf_counter()
        own = self._take(packs, consumed, progress)
        waited = time.perf_counter() - began
        group = self._ranks.names(own, consumed)
        assert group, "the stream ended before the last step"
        if (seed := self._ranks.seed(self._config.seed, progress.step)) is not None:
            rng.seed_all(seed)
        weighed, shares = mixed(self._streams.mix, own, progress.step, self._ranks.total)
        result = self._trainer.step(weighed, progress.step)
        took = time.perf_counter() - began
        progress = counted(progress, result, packs=len(group), seconds=took, waited=waited)
        progress = replace(progress, scaler=self._trainer.scaler.state())
        self._log.step(step_record(progress.step, group, result, took=took, waited=waited) | shares)
        return progress, len(group)

    def _take(self, packs: Iterator[Pack], consumed: int, progress: Progress) -> list[Pack]:
        """This rank's packs of the next step, if no rank ended its wait for teachers."""
        count = share(consumed, self._config.batch_packs, self._ranks.rank, self._ranks.world)
        own, ended = [], False
        try:
            own = list(islice(packs, count))
        except WaitEnded:
            ended = True
        if self._streams.waiting and self._ranks.any(ended):
            self._leave(progress)
        return own

    def _between_steps(self, progress: Progress) -> Progress:
        """Stop, evaluate and write a checkpoint where due: see the module's text."""
        step, last = progress.step, progress.step == self._total_steps
        due = bool(self._config.eval_every and step % self._config.eval_every == 0 and not last)
        if self._ranks.any(self._stop.requested):
            self._leave(replace(progress, owes_evaluation=due))
        if due:
            progress = self._evaluate(progress)
        is_best = due and progress.best is not None and progress.best["step"] == step
        if last or is_best or progress.advanced or step % self._config.checkpoint_every == 0:
            self._checkpoints.save(progress)
        return progress

    def _evaluate(self, progress: Progress) -> Progress:
        """An evaluation on the way, and what follows from it; stopped in it, the run owes it."""
        try:
            metrics = self._heldout.measure(self._trainer.model, self._log, step=progress.step)
        except KeyboardInterrupt:
            self._leave(replace(progress, owes_evaluation=True))
        progress = best.judged(self._config.keep_best, progress, metrics)
        progress, decision = advance.decided(self._config.advance, progress, metrics)
        if decision is not None:
            self._log.say(f"{self._config.name}: {decision.line()}")
            self._log.decision(decision.as_dict())
        return progress

    def _leave(self, progress: Progress) -> NoReturn:
        if progress.step:
            self._checkpoints.save(progress)
            self._log.say(f"stopped after step {progress.step} with a checkpoint; the same command goes on from here")
        raise KeyboardInterrupt


def counted(progress: Progress, result: StepResult, *, packs: int, seconds: float, waited: float) -> Progress:
    """The counters after a step."""
    return replace(
        progress,
        step=progress.step + 1,
        packs=progress.packs + packs,
        tokens=progress.tokens + result.tokens,
        trained=progress.trained + result.trained,
        seconds=progress.seconds + seconds,
        waited=progress.waited + waited,
        skipped=progress.skipped + result.skipped,
        scaler_skipped=progress.scaler_skipped + result.overflowed,
        loss=progress.loss if result.loss is None else result.loss,
    )
