"""Several processes that train one student: what they share out, add up and agree on.

Enters: the environment that torchrun or `launcher` gives a rank, values of each. Leaves: the same values on all ranks.
Costs: some six messages of a few hundred bytes a step, beside the gradient, which DistributedDataParallel adds up while
the backward pass runs.

A step is the same whatever the world size: the packs c … c + batch_packs − 1 of one order, of which rank r takes every
world-th, and

    gradient = ∇ Σ_ranks Σ_n w_n loss_n / Σ_ranks Σ_n w_n

DistributedDataParallel takes the mean of the ranks' gradients; so each divides its sum by Σ w / world. It is told to
look for unused parameters: a rank may have no pack of a step, and a phase no use for another one's matrices. That also
keeps its buckets as they were built, so that a resumed run adds up in the same order.

Random numbers (dropout) of several ranks: seeded anew before each step from (seed, step, rank), so that a run resumes
without any rank's generator. One process alone goes on with its generator, which the checkpoint has.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from stillroom.pipeline.student.places import RENDEZVOUS, Place
from stillroom.storage.errors import RankLost, StudentError, first_line
from stillroom.storage.records import Pack, digest128

Found = TypeVar("Found")

#: Ranks that wait for teachers may wait for weeks; the command that follows the log ends them.
FOREVER = timedelta(days=365)
#: Between two looks at a message that ranks wait for while they wait for teachers.
LOOKS_S = (0.001, 0.05)
#: Key under which a rank says that it was asked to stop.
STOP = "stillroom/stop"


#: ("<epoch>/<number>", digests of its sequences) of packs.
Blamed = list[tuple[str, list[str]]]


class AllStopped(KeyboardInterrupt):
    """All ranks know that one was asked to stop."""


@dataclass(frozen=True)
class PackName:
    """What a step's record has of a pack. sequence: digest of its first one."""

    epoch: int
    index: int
    sequence: str

    @staticmethod
    def of(pack: Pack) -> "PackName":
        return PackName(pack.epoch, pack.index, pack.sequences[0])


def share(before: int, count: int, rank: int, world: int) -> int:
    """How many of the packs before … before + count − 1, counted from where streams were opened, are this rank's."""
    return len(range((rank - before) % world, count, world))


def in_order(names: list[list[PackName]], before: int) -> list[PackName]:
    """The packs of a step in the stream's order, from each rank's. before: packs since streams were opened."""
    world, left = len(names), [iter(found) for found in names]
    return [next(left[number % world]) for number in range(before, before + sum(map(len, names)))]


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of the random numbers of a rank in a step, 63 bits."""
    return int(digest128(b"stillroom.ranks.1", f"{seed}/{step}/{rank}".encode())[:16], 16) >> 1


class Ranks:
    """One process alone, which agrees with itself at no cost. `Joined` is one of several."""

    rank, world = 0, 1
    #: Whether it logs, writes and exports.
    first = True

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over ranks."""
        return values

    def any(self, flag: bool, *, stop: bool = True) -> bool:
        """Whether it is so on any rank. Where ranks may wait for teachers, this waits as long. stop: whether those who
        wait are to come."""
        return flag

    def barrier(self) -> None:
        """Until all ranks are here."""

    def texts(self, text: str) -> list[str]:
        """Of every rank."""
        return [text]

    def stopped(self) -> bool:
        """Whether another rank has said that it was asked to stop."""
        return False

    def say_stopped(self) -> None:
        """Tell those that wait for teachers."""

    def seed(self, seed: int, step: int) -> int | None:
        """What to seed random numbers with before a step; None: they go on."""
        return None

    def reducing(self, function: Callable[..., Any], parts: list[Any]) -> "Reducing":
        """A function of a forward whose gradient is added up over ranks. parts: modules with all its parameters."""
        return Reducing(function)

    def sums(self, values: Mapping[str, float | None]) -> dict[str, float | None]:
        """Of values by name, the same names on all ranks; None where no rank has one."""
        if self.world == 1:
            return dict(values)
        found = [(0.0, 0.0) if value is None else (value, 1.0) for value in values.values()]
        total = self.total(np.array(found, dtype=np.float64).reshape(len(found), 2))
        return {name: float(v) if n else None for name, (v, n) in zip(values, total, strict=True)}

    def total_or_stop(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over ranks. Raises AllStopped if one of them has come to `any(True)` instead."""
        if self.any(False):
            raise AllStopped
        return self.total(values)

    def names(self, packs: list[Pack], before: int) -> list[PackName]:
        """Of a step's packs, on all ranks. before: packs since streams were opened."""
        own = [(pack.epoch, pack.index, pack.sequences[0]) for pack in packs]
        return in_order(
            [[PackName(*name) for name in json.loads(text)] for text in self.texts(json.dumps(own))], before
        )

    def blamed(self, packs: Sequence[Pack], loss: float) -> Blamed:
        """The packs of the ranks whose loss is not finite; of all, where only the gradient is not."""
        own = [(f"{pack.epoch}/{pack.index}", list(pack.sequences)) for pack in packs]
        told = [json.loads(text) for text in self.texts(json.dumps([math.isfinite(loss), own]))]
        culprits = [found for finite, found in told if not finite] or [found for _, found in told]
        return [(pack, digests) for found in culprits for pack, digests in found]

    def in_turn(self, work: Callable[[], Found]) -> Found:
        """On the first rank, then on the others."""
        if self.first:
            found = work()
        self.barrier()
        if not self.first:
            found = work()
        return found


ALONE = Ranks()


class Reducing:
    """Callable as the function; `last` says whether more micro-batches follow in the step."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *given: Any) -> Any:
        return self._function(*given)

    def turn(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch."""
        return nullcontext()

    def nothing(self) -> None:
        """In place of a step's micro-batches, by a rank that has none."""


class Joined(Ranks):
    """One rank of several. timeout_s: the longest that it waits for the others."""

    def __init__(self, place: Place, device: torch.device, *, timeout_s: float, waits: bool) -> None:
        """waits: whether ranks may wait for teachers."""
        self.rank, self.world, self.first = place.rank, place.world, place.rank == 0
        self._device, self._timeout_s = device, timeout_s
        if device.type == "cuda":
            torch.cuda.set_device(device)
        where = os.environ.get(RENDEZVOUS, "env://")
        timeout = timedelta(seconds=timeout_s)
        with self.heard():
            self._store, _, _ = next(rendezvous(where, place.rank, place.world, timeout=timeout))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout,
                store=PrefixStore("stillroom/groups", self._store), rank=place.rank, world_size=place.world,
            )  # fmt: skip
            self._patient = dist.new_group(backend="gloo", timeout=FOREVER) if waits else None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """What torch raises where another rank is gone or silent becomes RankLost."""
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))):
                raise
            raise RankLost(
                f"rank {self.rank} of {self.world}: another rank has ended, or has not answered for "
                f"{self._timeout_s:g} s (train.rank_timeout_s): {first_line(error)[:200]}; the same command goes on "
                "from the last checkpoint"
            ) from error

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        tensor = torch.from_numpy(np.array(values, dtype=np.float64))
        with self.heard():
            dist.all_reduce(tensor)
        return cast(NDArray[np.float64], tensor.numpy())

    def any(self, flag: bool, *, stop: bool = True) -> bool:
        if flag and stop:
            self.say_stopped()
        tensor = torch.tensor([int(flag)])
        with self.heard():
            if self._patient is None:
                dist.all_reduce(tensor)
            else:
                self._patiently(tensor)
        return bool(tensor)

    def _patiently(self, tensor: Tensor) -> None:
        """As a wait for teachers: a signal is heard in it."""
        work = dist.all_reduce(tensor, group=self._patient, async_op=True)
        assert work is not None
        pause, longest = LOOKS_S
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, longest)
        work.wait()

    def barrier(self) -> None:
        self.total(np.zeros(1))

    def texts(self, text: str) -> list[str]:
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = self.total(np.eye(self.world)[self.rank] * len(own)).astype(int).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in range(self.world)]
        with self.heard():
            dist.all_gather(found, padded)
        return [bytes(part[:size].tolist()).decode() for part, size in zip(found, sizes, strict=True)]

    def stopped(self) -> bool:
        return bool(self._store.check([STOP]))

    def say_stopped(self) -> None:
        self._store.set(STOP, "1")

    def seed(self, seed: int, step: int) -> int | None:
        return step_seed(seed, step, self.rank)

    def reducing(self, function: Callable[..., Any], parts: list[Any]) -> Reducing:
        with self.heard():
            return _Spread(self, _Forward(function, parts), self._device)


class _Forward(torch.nn.Module):
    """The form in which DistributedDataParallel finds the parameters: the head's is used outside of the model."""

    def __init__(self, function: Callable[..., Any], parts: list[Any]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self._function = function
        self._some = next(parameter for parameter in self.parts.parameters() if parameter.requires_grad)

    def forward(self, *given: Any) -> Any:
        return self._function(*given) if given else 0.0 * self._some.sum()


class _Spread(Reducing):
    def __init__(self, ranks: Joined, forward: _Forward, device: torch.device) -> None:
        super().__init__(forward)
        # No device_ids: batches are on the device already, and are not of a type that it could move.
        with warnings.catch_warnings():  # releases differ in the name of broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = DistributedDataParallel(forward, broadcast_buffers=False, find_unused_parameters=True)
        self._ranks = ranks

    def __call__(self, *given: Any) -> Any:
        return self._ddp(*given)

    @contextmanager
    def turn(self, *, last: bool) -> Iterator[None]:
        with self._ranks.heard(), nullcontext() if last else self._ddp.no_sync():
            yield

    def nothing(self) -> None:
        with self._ranks.heard():
            self._ddp().backward()


@contextmanager
def joined(place: Place, device: torch.device, *, timeout_s: float, waits: bool) -> Iterator[Ranks]:
    """This process among the others. Raises RankLost if they do not come."""
    if place.world == 1:
        yield ALONE
        return
    ranks = Joined(place, device, timeout_s=timeout_s, waits=waits)
    try:
        yield ranks
    finally:
        # Not waited for: others may be gone, or inside a message that never comes.
        dist.destroy_process_group()


def require_shared(place: Place, batch_packs: int) -> None:
    """Raises StudentError where a rank would have nothing to do."""
    if place.world > batch_packs:
        raise StudentError(
            f"batch_packs is {batch_packs}, and there are {place.world} processes, each of which takes whole packs of "
            f"a step: start at most {batch_packs} (train.processes), or raise batch_packs"
        )
