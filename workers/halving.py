"""Forward passes that do not fit in the device's memory, in halves.

Enters: a batch and what scores it. Leaves: its parts with their results, in order. Costs: nothing where it fits; else
the failed pass.

Which passes fit is no function of the unit: another process may hold the memory. So rows scored in halves may differ
from those of the whole by rounding, and the shard's provenance says which batch shapes it was made of.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import TypeVar

import torch

from stillroom.storage.errors import TeacherError, first_line

Result = TypeVar("Result")


def in_halves(
    group: Seq[int], score: Callable[[Seq[int]], Result], *, alone: bool = True
) -> Iterator[tuple[Seq[int], Result]]:
    """Score a batch, and where it is out of memory its two halves, and so on.

    group: indices of the batch. score: what may raise torch.OutOfMemoryError, or a CPU allocator's RuntimeError.
    alone: whether this process is all of the teacher; other ranks would wait for passes that are not the planned ones.
    Raises TeacherError where one sequence alone does not fit, or this process is not alone.
    """
    try:
        result = score(group)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not _out_of_memory(error):
            raise
        if not alone:
            raise TeacherError(
                f"out of memory with {len(group)} sequences in the batch, on one of several ranks "
                f"({first_line(error)}): lower teacher.batch_tokens or teacher.slice_positions, or raise teacher.ranks"
            ) from error
        if len(group) == 1:
            raise TeacherError(
                f"out of memory with one sequence in the batch ({first_line(error)}): lower corpus.window, "
                "teacher.slice_positions or the teacher's dtype, or give it a larger device"
            ) from error
    else:
        yield group, result
        return
    # Outside of the handler, whose traceback holds the failed pass's tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (len(group) + 1) // 2
    yield from in_halves(group[:half], score)
    yield from in_halves(group[half:], score)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
