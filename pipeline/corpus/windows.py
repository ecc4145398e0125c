"""Splits a document's tokens into windows.

Enters: a length. Leaves: slices. Costs: nothing.

    window 6, overlap 2, a document of 11 tokens          context      new
    [0 1 2 3 4 5]                                          0            6
            [4 5 6 7 8 9]                                  2            4
                    [8 9 10]                               2            1
"""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens start … end − 1 of a document, of which the first `context` repeat the previous window's end."""

    start: int
    end: int
    context: int


def split(length: int, *, window: int, overlap: int) -> Iterator[Window]:
    """Cover `length` ≥ 1 tokens: every token is new in exactly one window, and no window is without a new one."""
    assert 0 <= overlap < window
    assert length >= 1
    yield Window(0, min(window, length), 0)
    stride = window - overlap
    for new in range(window, length, stride):
        yield Window(new - overlap, min(new + stride, length), overlap)
