"""Evaluation during training: before it, on the way and after it, on the held-out split.

Enters: the model of the moment. Leaves: metrics as the log and the result have them, or None where nothing is held
out. Costs: one pass over the first `eval_packs` of the held-out packs, or all. What is measured is `evaluate`'s.

Of several processes each reads its part and all have the same metrics. A signal to one, or the end of a wait for
teachers, ends the evaluation of all: AllStopped, which is a KeyboardInterrupt.
"""

from contextlib import closing
from itertools import islice
from typing import Any, cast

import torch

from stillroom.pipeline.student import best
from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.distributed import AllStopped, Ranks, share
from stillroom.pipeline.student.evaluate import evaluate, generated_sequences
from stillroom.pipeline.student.runlog import RunLog
from stillroom.pipeline.student.signals import Stop
from stillroom.pipeline.student.streams import Packs, Streams
from stillroom.pipeline.student.teaching import Teaching
from stillroom.pipeline.student.trainer import Trainer
from stillroom.pipeline.student.waiting import WaitEnded, Waiting


class HeldOut:
    """The held-out split of a run, and how it is measured.

    trainer: for the type of its products and the form of its head alone. empty: whether nothing is held out.
    """

    def __init__(
        self,
        config: StudentConfig,
        streams: Streams,
        *,
        trainer: Trainer,
        teaching: Teaching,
        vocabulary: int,
        device: torch.device,
        ranks: Ranks,
        stop: Stop,
        empty: bool,
    ) -> None:
        self._config, self._trainer, self._teaching = config, trainer, teaching
        self._vocabulary, self._device, self._ranks, self._stop = vocabulary, device, ranks, stop
        self._packs: Packs | None = None if empty else streams.heldout()
        # Where the store says nothing of the output, the text alone measures.
        self._waiting: Waiting | None = None if streams.silent else streams.waiting
        self._generated = generated_sequences(streams.manifest)

    @property
    def empty(self) -> bool:
        """Whether nothing is held out: then nothing is evaluated."""
        return self._packs is None

    def postponed(self, log: RunLog) -> bool:
        """Whether the evaluation before training would wait for teachers. The same on all ranks."""
        if self._waiting is None or self._packs is None:
            return False
        lacking = self._packs.units(self._config.eval_packs) - self._waiting.held().keys()
        if lacking:
            log.say(
                f"{self._config.name}: the evaluation before training is made up for at the end: it reads "
                f"{len(lacking):,} units that are not scored yet"
            )
        return self._ranks.any(bool(lacking), stop=False)

    def measure(self, model: Any, log: RunLog, *, step: int) -> dict[str, Any] | None:
        """Metrics after `step` steps, also written to the log. Raises AllStopped; StudentError where `keep_best`
        chooses by what is not measured."""
        if self._packs is None:
            return None
        packs_read, ranks = self._config.eval_packs, self._ranks
        count = None if packs_read is None else share(0, packs_read, ranks.rank, ranks.world)
        with closing(cast(Any, iter(self._packs))) as packs:
            try:
                found = evaluate(
                    model, islice(packs, count), packing=self._config.packing,
                    vocabulary=self._vocabulary, device=self._device, autocast=self._trainer.autocast,
                    teaching=self._teaching, head=self._trainer.head, between=self._stop.check,
                    generated=self._generated, total=ranks.total_or_stop,
                )  # fmt: skip
            except AllStopped:
                raise
            except (WaitEnded, KeyboardInterrupt) as error:
                ranks.any(True)
                raise AllStopped from error
        metrics = None if found is None else found.as_dict()
        if self._config.keep_best:
            best.require_measured(self._config.keep_best, metrics)
        if metrics is not None:
            log.evaluation(step, metrics)
        return metrics
