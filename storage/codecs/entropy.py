"""Adaptive entropy coding in numpy: one arithmetic for writing and reading, many symbols a step.

Enters: arrays of symbols, each with the context that it is to be predicted from. Leaves: bytes, and back. Costs:
about 15 numpy operations for as many symbols as there are lanes; 4 bytes a lane once.

The coder is rANS (Duda 2013, arXiv:1311.2540) with 32-bit states and 16-bit words, its lanes interleaved in one
stream of words (Giesen 2014, arXiv:1402.3392): symbol i of an array goes to lane i mod S, and lanes that need a
word take it in lane order. rANS reads in the opposite order of writing, so the writer keeps all symbols and runs
over them backwards at its end.

Models are counts that grow as positions go by, the same on both sides, so no tables are stored and none can be
damaged. All of it is integer arithmetic: every machine computes the same tables.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

#: Probabilities are multiples of 2^-14.
PRECISION = 14
WHOLE = 1 << PRECISION

#: A state lies in [LOW, LOW · 2^16) between symbols.
LOW = 1 << 16

#: What one symbol seen adds to its weight, and the total weight that a context starts with, spread as its parent's.
#: A start of 32 symbols; 2 cost 0.5 and 128 cost 0.03 bytes a position more (real teacher, groups of 4,096).
SEEN, PRIOR = 32, 1024


class Model:
    """Distributions over `size` symbols, one for each context, learned from what was coded before the last `learn`.

    parents: for each context the group it belongs to. A context starts out as its group, and groups start out
    uniform, so that a context seldom seen costs little.
    """

    def __init__(self, parents: Int64, size: int) -> None:
        self.size = size
        self._parents = parents
        self._seen = np.zeros((len(parents), size), np.int64)
        self._groups = np.ones((int(parents.max()) + 1, size), np.int64)
        self.learn(np.zeros(0, np.int64))

    def learn(self, cells: Int64) -> None:
        """Count coded symbols, given as context · size + symbol, and make the tables anew."""
        self._seen += np.bincount(cells, minlength=self._seen.size).reshape(self._seen.shape)
        context, symbol = np.divmod(cells, self.size)
        grouped = np.bincount(self._parents[context] * self.size + symbol, minlength=self._groups.size)
        self._groups += SEEN * grouped.reshape(self._groups.shape)
        groups = self._groups
        start = 1 + PRIOR * groups // groups.sum(axis=1, keepdims=True)
        weights = SEEN * self._seen + start[self._parents]
        self.frequency = 1 + weights * (WHOLE - self.size) // weights.sum(axis=1, keepdims=True)
        largest = np.argmax(self.frequency, axis=1)
        self.frequency[np.arange(len(weights)), largest] += WHOLE - self.frequency.sum(axis=1)
        # Cumulative frequencies of all contexts as one rising sequence: one binary search finds a symbol of any.
        ends = np.cumsum(self.frequency, axis=1)
        base = np.arange(len(weights), dtype=np.int64)[:, None] << PRECISION
        self.start = (ends - self.frequency + base).ravel()
        self.frequency = self.frequency.ravel()


class Coder(ABC):
    """What writing and reading share: values are coded against a model, or as plain bits.

    Every method takes the values to write and returns the values coded; a reader ignores what it is given.
    """

    reading: bool

    def __init__(self) -> None:
        self._pending: dict[int, tuple[Model, list[Int64]]] = {}

    def symbols(self, model: Model, contexts: Int64, values: Int64 | None) -> Int64:
        """Symbols int64 [n], each below model.size, in contexts int64 [n]."""
        cells = self._cells(model, contexts, values)
        self._pending.setdefault(id(model), (model, []))[1].append(cells)
        return cells - contexts * model.size

    def bits(self, widths: Int64, values: Int64 | None) -> Int64:
        """Values int64 [n], each of its own number of bits 0 … 62, taken as uniform."""
        total = np.zeros(len(widths), np.int64)
        for low in range(0, int(widths.max(initial=0)), PRECISION):
            some = np.flatnonzero(widths > low)
            width = np.minimum(widths[some] - low, PRECISION)
            part = None if values is None else (values[some] >> low) & ((1 << width) - 1)
            total[some] |= self._uniform(width, part) << low
        return total

    def numbers(self, model: Model, contexts: Int64, values: Int64 | None) -> Int64:
        """Numbers int64 [n] ≥ 0 of any size: their class against the model, the rest as bits. See `classify`."""
        classes, widths, rest = (None, None, None) if values is None else classify(values)
        classes = self.symbols(model, contexts, classes)
        lowest, widths = class_range(classes)
        return lowest + self.bits(widths, rest)

    def signed(self, model: Model, contexts: Int64, values: Int64 | None) -> Int64:
        """Numbers int64 [n] of either sign, |value| < 2^40."""
        folded = self.numbers(model, contexts, None if values is None else (values << 1) ^ (values >> 63))
        return (folded >> 1) ^ -(folded & 1)

    def learn(self) -> None:
        """All models take in what was coded since the last time."""
        for model, cells in self._pending.values():
            model.learn(np.concatenate(cells))
        self._pending.clear()

    @abstractmethod
    def _cells(self, model: Model, contexts: Int64, values: Int64 | None) -> Int64:
        """Cells of the model's table, contexts · size + symbols, written or read."""

    @abstractmethod
    def _uniform(self, widths: Int64, values: Int64 | None) -> Int64:
        """Values of at most PRECISION bits, written or read."""


#: Numbers below 2^DIRECT are classes of their own; above, each doubling has 2^FINE classes of equal width.
DIRECT, FINE = 4, 3
CLASSES = (1 << DIRECT) + (42 - DIRECT << FINE)


def classes_below(limit: int) -> int:
    """How many classes numbers 0 … limit − 1 have."""
    return int(classify(np.array([max(limit - 1, 0)]))[0][0]) + 1


def classify(values: Int64) -> tuple[Int64, Int64, Int64]:
    """(class, bits of the rest, rest) of numbers 0 … 2^42 − 1; `class_range` is the inverse."""
    # frexp is exact below 2^53, and its exponent is the bit length.
    length = np.frexp(values.astype(np.float64))[1].astype(np.int64)
    widths = np.where(values < 1 << DIRECT, 0, length - 1 - FINE)
    classes = np.where(widths == 0, values, (1 << DIRECT) + (length - DIRECT - 1 << FINE) + (values >> widths & 7))
    classes = np.where(values < 1 << DIRECT, values, classes)
    return classes, widths, values & ((1 << widths) - 1)


def class_range(classes: Int64) -> tuple[Int64, Int64]:
    """(lowest number, bits of the rest) of classes 0 … CLASSES − 1."""
    octave = classes - (1 << DIRECT) >> FINE
    direct = classes < 1 << DIRECT
    widths = np.where(direct, 0, octave + DIRECT - FINE)
    return np.where(direct, classes, ((1 << FINE) + (classes & 7)) << widths), widths


def lanes_for(symbols: int) -> int:
    """How many lanes for about so many kept values: each costs 4 bytes and makes the others' steps rarer."""
    return 1 << int(np.clip((symbols >> 11).bit_length(), 2, 10))


class Writer(Coder):
    """Keeps what is coded and turns it into bytes at the end."""

    reading = False

    def __init__(self, lanes: int) -> None:
        super().__init__()
        self._lanes = lanes
        self._steps: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def _cells(self, model: Model, contexts: Int64, values: Int64 | None) -> Int64:
        assert values is not None
        cells = contexts * model.size + values
        self._keep(model.frequency[cells], model.start[cells] & (WHOLE - 1))
        return cells

    def _uniform(self, widths: Int64, values: Int64 | None) -> Int64:
        assert values is not None
        self._keep(WHOLE >> widths, values << (PRECISION - widths))
        return values

    def _keep(self, frequency: Int64, start: Int64) -> None:
        self._steps.append((frequency.astype(np.uint16), start.astype(np.uint16)))

    def finish(self) -> bytes:
        """Lanes' states (uint32 little-endian), then words (uint16 little-endian) in the reader's order."""
        state = np.full(self._lanes, LOW, np.uint64)
        words: list[NDArray[Any]] = []
        for frequencies, starts in reversed(self._steps):
            last = len(starts) - 1 - (len(starts) - 1) % self._lanes
            for at in range(last, -1, -self._lanes) if len(starts) else ():
                frequency = frequencies[at : at + self._lanes].astype(np.uint64)
                x = state[: len(frequency)]
                full = x >= frequency << np.uint64(32 - PRECISION)
                words.append(x[full].astype("<u2"))
                x[full] >>= np.uint64(16)
                quotient = x // frequency
                x += (quotient << np.uint64(PRECISION)) - quotient * frequency + starts[at : at + self._lanes]
        return bytes(state.astype("<u4").tobytes()) + b"".join(part.tobytes() for part in reversed(words))


class Reader(Coder):
    """Reads what a `Writer` with as many lanes wrote. Raises ValueError where bytes are missing or left over."""

    reading = True

    def __init__(self, data: memoryview, lanes: int) -> None:
        super().__init__()
        if len(data) < 4 * lanes or len(data) % 2:
            raise ValueError(f"packed data of {len(data):,} bytes, expected an even number of at least {4 * lanes:,}")
        self._lanes = lanes
        self._state = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.int64)
        self._words = np.frombuffer(data[4 * lanes :], "<u2").astype(np.int64)
        self._at = 0
        if (self._state < LOW).any():
            raise ValueError("packed data starts from a state that no writer leaves")

    def _cells(self, model: Model, contexts: Int64, values: Int64 | None) -> Int64:
        cells = np.empty(len(contexts), np.int64)
        base = contexts << PRECISION
        for at in range(0, len(contexts), self._lanes):
            x = self._state[: len(contexts) - at]
            slot = x & (WHOLE - 1)
            slot += base[at : at + self._lanes]
            cell = np.searchsorted(model.start, slot, side="right")
            cell -= 1
            cells[at : at + self._lanes] = cell
            self._advance(x, model.frequency[cell], slot - model.start[cell])
        return cells

    def _uniform(self, widths: Int64, values: Int64 | None) -> Int64:
        found = np.empty(len(widths), np.int64)
        shifts = PRECISION - widths
        for at in range(0, len(widths), self._lanes):
            x, shift = self._state[: len(widths) - at], shifts[at : at + self._lanes]
            slot = x & (WHOLE - 1)
            found[at : at + self._lanes] = value = slot >> shift
            self._advance(x, 1 << shift, slot - (value << shift))
        return found

    def _advance(self, x: Int64, frequency: Int64, offset: Int64) -> None:
        x >>= PRECISION
        x *= frequency
        x += offset
        empty = np.flatnonzero(x < LOW)
        words = self._words[self._at : self._at + len(empty)]
        if len(words) < len(empty):
            raise ValueError("packed data ends before its last symbol")
        self._at += len(empty)
        x[empty] = x[empty] << 16 | words

    def finish(self) -> None:
        """Raises ValueError unless exactly what was written has been read."""
        if self._at != len(self._words) or (self._state != LOW).any():
            raise ValueError("packed data does not end where its last symbol does")
