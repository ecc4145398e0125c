"""Which packs a run reads: to train on, of another corpus, to evaluate on.

Enters: config, manifest, snapshot; which parts of the store the losses read; which of several processes this is.
Leaves: streams of packs, and how many steps they make. Costs: nothing until a stream is iterated; then a thread and
its decoded row groups.

Streams that train give a process its own packs of one order: every world-th. They do not depend on how often a run was
cut off: `start` counts the packs of all processes that were consumed before.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from stillroom.pipeline.student.config import StudentConfig
from stillroom.pipeline.student.curriculum import phase_steps
from stillroom.pipeline.student.mix import Mix
from stillroom.pipeline.student.waiting import Waiting
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Pack, SignalSpec
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream


class Packs(Protocol):
    """What a run needs of a stream."""

    def __iter__(self) -> Iterator[Pack]: ...

    def packs_per_epoch(self, epoch: int) -> int: ...

    def units(self, packs: int | None = None) -> set[str]: ...


@dataclass(frozen=True, kw_only=True)
class Streams:
    """others: corpora of phases, by path. window: longest sequence. waiting: of an open snapshot. output, inner: parts
    of the store that the output's losses and the feature losses read. rank, world_size: this process among others.
    mix: None also while it is not known yet, as it depends on the number of steps."""

    config: StudentConfig
    manifest: Manifest
    snapshot: Snapshot | None
    others: Mapping[Path, Manifest]
    window: int
    waiting: Waiting | None
    output: frozenset[str]
    inner: frozenset[str]
    rank: int
    world_size: int
    mix: Mix | None = None

    def training(self, *, start: int = 0) -> Packs:
        """This process's packs of the run's own corpus, or of its mix."""
        if self.mix and self.mix.samples:
            return self._mixed(self.mix, start)
        return self._own(start=start, **self._split)

    def whole(self) -> Packs:
        """All packs that train, of all processes and without a mix: to count them, and to look at one."""
        return self._own(start=0)

    def heldout(self) -> Packs:
        """This process's packs of the held-out split: the same for every student (seed 0, one epoch), and with the
        teacher's output alone."""
        return cast(
            Packs,
            Stream(
                manifest=self.manifest, snapshot=None if self.silent else self.snapshot, heldout=True,
                window=self.window, seed=0, pack=self.config.packing, epochs=1, parts=self.output,
                await_shard=self.waiting, **self._split,
            ),
        )  # fmt: skip

    def other(self, corpus: Path, *, start: int) -> Packs:
        """The text of another corpus, without signal."""
        return cast(
            Packs,
            Stream(
                manifest=self.others[corpus], snapshot=None, window=self.window, seed=self.config.seed,
                pack=self.config.packing, start=start, **self._split,
            ),
        )  # fmt: skip

    @property
    def silent(self) -> bool:
        """Whether the store has nothing to measure a student by."""
        return self.snapshot is not None and not has_output(self.snapshot.identity.signal)

    @property
    def _split(self) -> dict[str, Any]:
        return {"rank": self.rank, "world_size": self.world_size}

    def _own(self, *, start: int, **split: Any) -> Packs:
        return cast(
            Packs,
            Stream(
                manifest=self.manifest, snapshot=self.snapshot, window=self.window, seed=self.config.seed,
                pack=self.config.packing, start=start, epochs=epochs_of(self.config), parts=self.output | self.inner,
                await_shard=self.waiting, **split,
            ),
        )  # fmt: skip

    def _mixed(self, mix: Mix, start: int) -> Packs:
        """Every pack of one source."""
        return mix.stream(
            lambda chosen, numbers: Stream(
                manifest=self.manifest, snapshot=self.snapshot, window=self.window, seed=self.config.seed,
                pack=self.config.packing, parts=self.output | self.inner, await_shard=self.waiting, chosen=chosen,
                numbers=numbers,
            ),
            packs=self.config.batch_packs, seed=self.config.seed, start=start, **self._split,
        )  # fmt: skip


def has_output(spec: SignalSpec) -> bool:
    """Whether the store holds what the teacher says, and not its inside alone."""
    return bool(spec.topk or spec.sampled or spec.hidden)


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
