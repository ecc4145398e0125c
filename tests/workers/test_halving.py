"""Batches that do not fit."""

from collections.abc import Sequence as Seq

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillroom.storage.errors import TeacherError
from stillroom.workers.halving import in_halves


@given(size=st.integers(1, 40), room=st.integers(1, 40))
def test_every_sequence_is_scored_once_in_order_and_within_the_room(size: int, room: int) -> None:
    def score(group: Seq[int]) -> int:
        if len(group) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return sum(group)

    parts = list(in_halves(range(size), score))
    assert [i for group, _ in parts for i in group] == list(range(size))
    assert all(len(group) <= room and found == sum(group) for group, found in parts)
    assert len(parts) == 1 or size > room


def test_a_cpu_that_really_cannot_allocate() -> None:
    def score(group: Seq[int]) -> int:
        return len(torch.empty(1 << 62 if len(group) > 1 else 1, dtype=torch.uint8))

    assert [found for _, found in in_halves([4, 5, 6], score)] == [1, 1, 1]


def test_one_sequence_that_does_not_fit_is_an_error() -> None:
    def score(_: Seq[int]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    with pytest.raises(TeacherError, match=r"one sequence in the batch \(CUDA out of memory\): lower corpus\.window"):
        list(in_halves([1, 2], score))


def test_other_errors_are_not_caught() -> None:
    def score(_: Seq[int]) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(in_halves([1, 2], score))
