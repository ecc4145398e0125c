"""One teacher that is several processes: tensor parallelism, where each matrix is spread over the ranks.

Enters: a `TeacherSpec` with split "tensors", and a way to tell the other ranks. Leaves: a `Teacher` whose calls run on
all ranks at once. Costs: on each rank its share of the weights, and the exchange of activations twice per block; all
ranks but the first throw away what they found.

    driver ─► rank 0, an actor like any other ─► "score this" ─► ranks 1 …, the same calls

transformers spreads the weights (its `tp_plan`) and puts the exchange into the modules, so each forward pass must be
made by all ranks. Which passes a call makes is a function of its arguments; that is why nothing is halved here when
memory runs out: one rank would, and the others would wait for it.
"""

import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from stillroom.storage.errors import StillroomError, TeacherError, first_line
from stillroom.storage.records import Sequence, SignalSpec
from stillroom.workers.head import OutputHead
from stillroom.workers.teacher import Scored, TeacherSpec
from stillroom.workers.torch_teacher import TorchTeacher

#: Until all ranks have met; they are started together, and load after that.
MEETING_S = 300

Result = TypeVar("Result")

#: Calls a method of the teacher on all other ranks; what it returns waits for them, and raises what they raised.
Tell = Callable[..., Callable[[], None]]


class RankedTeacher(TorchTeacher):
    """Rank 0 of a teacher. To be made while the others load theirs: see `Rank.load`."""

    def __init__(self, spec: TeacherSpec, tell: Tell) -> None:
        self._tell = tell
        super().__init__(spec)

    def score_with_truth(
        self, sequences: Seq[Sequence], *, signal: SignalSpec, positions: Mapping[str, Seq[int]]
    ) -> Scored:
        def own() -> Scored:
            return super(RankedTeacher, self).score_with_truth(sequences, signal=signal, positions=positions)

        return self._together(own, "score_with_truth", list(sequences), signal=signal, positions=dict(positions))

    def output_head(self) -> OutputHead:
        return self._together(super().output_head, "output_head")

    def release(self) -> None:
        self._together(super().release, "release")
        leave()

    def _together(self, own: Callable[[], Result], method: str, *arguments: Any, **named: Any) -> Result:
        """Raises what this rank raises; what another does, only if this one does not."""
        wait = self._tell(method, *arguments, **named)
        try:
            found = own()
        except StillroomError:
            with suppress(Exception):
                wait()  # it raises the same; a call must not begin while they are in the last one
            raise
        wait()
        return found


class Rank:
    """A rank above 0: does what it is told, in that order, and returns nothing."""

    def __init__(self, spec: TeacherSpec, rank: int, address: str) -> None:
        self._spec, self._rank, self._address = spec, rank, address
        self._teacher: TorchTeacher | None = None

    def load(self) -> None:
        """Meet the others and load this rank's share. Raises TeacherError."""
        join(self._spec, self._rank, self._address)
        self._teacher = TorchTeacher(self._spec)

    def follow(self, method: str, *arguments: Any, **named: Any) -> None:
        """What rank 0 calls on its own teacher, at the same time."""
        assert self._teacher is not None, "load comes first"
        getattr(self._teacher, method)(*arguments, **named)


def join(spec: TeacherSpec, rank: int, address: str) -> None:
    """Meet the other ranks at rank 0's address, `host:port`. Raises TeacherError if they do not come."""
    host, _, port = address.rpartition(":")
    on_gpu = spec.device != "cpu" and torch.cuda.is_available()
    # transformers reads these. Ray shows each rank its own GPU alone, which is number 0 in its process.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(spec.ranks), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    if host.startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it listens where the host's name leads
    try:
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=spec.ranks,
            timeout=timedelta(seconds=MEETING_S),
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise TeacherError(
            f"rank {rank} of {spec.ranks} of the teacher did not meet the others at {address} within {MEETING_S} s: "
            f"{first_line(error)}"
        ) from error


def leave() -> None:
    """End the process group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
